"""The tracker counts exactly, whatever the routing, the steps' fate, the readers and the uptime."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from amalgam.config.statistics import StatisticsSettings
from amalgam.errors import RequestError
from amalgam.experts.history import GENERATED, PROMPT, Tally
from amalgam.experts.snapshot import ExpertSnapshot
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.routing import TokenSpan
from tests.errors import raises
from tests.experts.routing import (
    LAYER_IDS,
    NUM_EXPERTS,
    START,
    TOP_K,
    Clock,
    make_tracker,
    route,
    run_step,
    run_tokens,
    span,
)


def brute_force(steps: list[tuple[list[TokenSpan], list[tuple[np.ndarray, np.ndarray]]]]) -> Tally:
    """Row by row, choice by choice."""
    tally = Tally.zeros(len(LAYER_IDS), NUM_EXPERTS)
    for spans, routing in steps:
        for item in spans:
            for row in range(item.start, item.stop):
                if row < item.record_from:
                    continue
                phase = GENERATED if row >= item.generated_from else PROMPT
                tally.num_tokens[phase] += 1
                for layer, (expert_ids, gate_weights) in enumerate(routing):
                    for expert_id, gate in zip(expert_ids[row], gate_weights[row], strict=True):
                        tally.counts[phase, layer, expert_id] += 1
                        tally.gate_mass[phase, layer, expert_id] += gate
    return tally


def assert_consistent(snapshot: ExpertSnapshot) -> None:
    assert snapshot.tally.counts.sum() == snapshot.tally.num_tokens.sum() * TOP_K * len(LAYER_IDS)


def test_counts_equal_brute_force_over_random_steps() -> None:
    rng = np.random.default_rng(1)
    tracker, steps = make_tracker(Clock()), []
    for _ in range(60):
        spans, row = [], 0
        for _ in range(rng.integers(1, 6)):
            row += rng.integers(0, 3)  # rows of nobody, as padding leaves them
            stop = row + int(rng.integers(1, 9))
            record_from, generated_from = (int(value) for value in rng.integers(row, stop + 1, size=2))
            spans.append(TokenSpan(len(spans), int(row), stop, record_from, generated_from))
            row = stop
        steps.append((spans, route(rng, row + 2)))
        run_step(tracker, *steps[-1])
    expected, snapshot = brute_force(steps), tracker.snapshot()
    np.testing.assert_array_equal(snapshot.tally.counts, expected.counts)
    np.testing.assert_array_equal(snapshot.tally.num_tokens, expected.num_tokens)
    np.testing.assert_allclose(snapshot.tally.gate_mass, expected.gate_mass, rtol=1e-12)
    assert_consistent(snapshot)
    np.testing.assert_array_equal(tracker.snapshot(minutes=60).tally.counts, expected.counts)


def test_distinct_experts_are_those_that_any_row_of_a_step_used() -> None:
    """Rows that are not counted are computed all the same."""
    rng = np.random.default_rng(8)
    tracker, expected = make_tracker(Clock()), []
    for num_rows in rng.integers(1, 9, size=100).tolist():
        routing = route(rng, num_rows)
        run_step(tracker, [span(num_rows, record_from=num_rows // 2)], routing)
        expected.append(np.mean([len(np.unique(expert_ids)) for expert_ids, _ in routing]))
    tracker.reset()
    histogram = tracker.distinct_experts()
    assert sum(histogram.counts) == 100
    assert histogram.sum == pytest.approx(sum(expected))
    assert histogram.counts[histogram.bounds.index(4)] == sum(2 < value <= 4 for value in expected)


def test_a_preempted_request_is_counted_once() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(2)
    prompt, last = route(rng, 5), route(rng, 1)
    again = [
        (np.vstack([ids, more_ids]), np.vstack([gates, more_gates]))
        for (ids, gates), (more_ids, more_gates) in zip(prompt, last, strict=True)
    ]
    run_step(tracker, [span(5)], prompt)
    run_step(tracker, [span(6, record_from=5, generated_from=5)], again)  # all six anew, of which five were recorded
    run_step(tracker, [span(6, record_from=6, generated_from=5)], again)  # nothing new
    snapshot = tracker.snapshot()
    assert snapshot.tally.num_tokens.tolist() == [5, 1]
    np.testing.assert_array_equal(
        snapshot.tally.counts, brute_force([([span(5)], prompt), ([span(1, generated_from=0)], last)]).counts
    )


def test_a_failed_step_counts_nothing() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(3)
    run_step(tracker, [span(4)], route(rng, 4), fails=True)
    assert tracker.snapshot().tally.counts.sum() == 0
    routing = route(rng, 3)
    run_step(tracker, [span(3)], routing)
    np.testing.assert_array_equal(tracker.snapshot().tally.counts, brute_force([([span(3)], routing)]).counts)
    run_step(tracker, [span(4)], route(rng, 4), fails=True)
    assert tracker.snapshot().tally.num_tokens.sum() == 3


def test_bfloat16_gates_and_int32_ids_are_taken() -> None:
    tracker = make_tracker(Clock())
    tracker.begin_step([span(2)])
    for layer_id in LAYER_IDS:
        tracker.observe(layer_id, torch.tensor([[0, 7], [7, 1]], dtype=torch.int32), torch.full((2, 2), 0.5).bfloat16())
    tracker.end_step()
    tally = tracker.snapshot().tally
    assert tally.counts[PROMPT].tolist() == [[1, 1, 0, 0, 0, 0, 0, 2]] * 3
    assert tally.gate_mass[PROMPT].tolist() == [[0.5, 0.5, 0, 0, 0, 0, 0, 1.0]] * 3


def test_a_dense_model_counts_tokens_only() -> None:
    tracker = ExpertTracker((), 0, 0, StatisticsSettings(), Clock().system)
    tracker.begin_step([span(4, generated_from=3)])
    tracker.end_step()
    tally = tracker.snapshot(minutes=1).tally
    assert tally.num_tokens.tolist() == [3, 1]
    assert tally.counts.sum() == 0


def test_readers_always_see_whole_steps() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(4)
    failures: list[BaseException] = []
    is_done = threading.Event()

    def read(minutes: float | None) -> None:
        last = 0
        try:
            while not is_done.is_set():
                snapshot = tracker.snapshot(minutes)
                assert_consistent(snapshot)
                assert snapshot.tally.num_tokens.sum() >= last
                last = int(snapshot.tally.num_tokens.sum())
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read, args=(minutes,)) for minutes in (None, 1, 60)]
    for reader in readers:
        reader.start()
    routing = route(rng, 7)
    for _ in range(300):
        tracker.count_request()
        run_step(tracker, [span(3), span(4, 3, generated_from=3)], routing)
    is_done.set()
    for reader in readers:
        reader.join()
    assert failures == []
    snapshot = tracker.snapshot()
    assert snapshot.tally.num_tokens.tolist() == [900, 1200]
    assert snapshot.tally.num_requests == 300


def test_a_reset_forgets_and_says_what() -> None:
    clock = Clock()
    tracker = make_tracker(clock)
    tracker.count_request()
    run_tokens(tracker, 5)
    clock.now += 30
    result = tracker.reset()
    assert (result.num_activations, result.num_tokens, result.num_requests) == (5 * TOP_K * len(LAYER_IDS), 5, 1)
    assert result.seconds == 30
    for minutes in (None, 1):
        snapshot = tracker.snapshot(minutes)
        assert snapshot.tally.counts.sum() == snapshot.tally.num_tokens.sum() == snapshot.tally.num_requests == 0
        assert np.isnan(snapshot.last_activation).all()
        assert snapshot.recent == ()
        assert (snapshot.window_start, snapshot.started_at) == (START + 30, START)
    run_tokens(tracker, 2)
    assert tracker.snapshot(1).tally.num_tokens.sum() == 2


def test_a_step_under_way_survives_a_reset() -> None:
    tracker = make_tracker(Clock())
    tracker.begin_step([span(1)])
    tracker.reset()
    for layer_id in LAYER_IDS:
        tracker.observe(layer_id, torch.tensor([[0, 1]]), torch.ones(1, 2))
    tracker.end_step()
    assert_consistent(tracker.snapshot())
    assert tracker.snapshot().tally.num_tokens.sum() == 1


def test_windows_hold_what_happened_since_their_start() -> None:
    clock = Clock()
    tracker, times = make_tracker(clock, bucket_seconds=5, history_minutes=60), []
    rng = np.random.default_rng(5)
    while clock.now < START + 2 * 3600:
        clock.now += float(rng.exponential(7))
        times.append(clock.now)
        tracker.count_request()
        run_tokens(tracker, 1)
    for minutes in (0.01, 0.5, 1, 5, 17.3, 60):
        snapshot = tracker.snapshot(minutes)
        expected = sum(time >= snapshot.window_start for time in times)
        assert snapshot.tally.num_tokens.sum() == snapshot.tally.num_requests == expected
        assert_consistent(snapshot)
        early = (clock.now - 60 * minutes) - snapshot.window_start
        assert 0 <= early <= max(5, 60 * minutes / 24 + 5)
        assert snapshot.window_end == clock.now
    assert tracker.snapshot().tally.num_tokens.sum() == len(times)


def test_a_window_after_idle_time_is_empty() -> None:
    clock = Clock()
    tracker = make_tracker(clock)
    run_tokens(tracker, 3)
    clock.now += 120
    snapshot = tracker.snapshot(minutes=1)
    assert snapshot.tally.num_tokens.sum() == 0
    assert snapshot.recent == ()
    assert snapshot.window_start == clock.now - 60
    assert np.nanmax(snapshot.last_activation) == START


def test_a_window_does_not_reach_behind_the_start() -> None:
    clock = Clock()
    tracker = make_tracker(clock)
    clock.now += 10
    assert tracker.snapshot(minutes=5).window_seconds == 10


@pytest.mark.parametrize("step", [-3600.0, -50.0, 50.0, 3 * 3600.0])
def test_a_clock_that_is_set_moves_what_is_shown_and_nothing_that_is_counted(step: float) -> None:
    clock = Clock()
    tracker = make_tracker(clock, half_life_minutes=5)
    run_tokens(tracker, 1)
    clock.now += 100
    run_tokens(tracker, 2)
    before = tracker.snapshot(minutes=2)
    clock.ahead += step
    after = tracker.snapshot(minutes=2)
    assert (after.window_start, after.window_end) == (before.window_start + step, before.window_end + step)
    assert after.window_end == clock.wall()
    assert np.array_equal(after.last_activation, before.last_activation + step, equal_nan=True)
    assert [item.timestamp for item in after.recent] == [item.timestamp + step for item in before.recent]
    assert after.started_at == before.started_at + step
    assert np.array_equal(after.decaying_rate, before.decaying_rate)
    clock.now += 60
    run_tokens(tracker, 4)
    assert tracker.snapshot(minutes=1).tally.num_tokens.sum() in (4, 6)  # a window may begin a little early
    assert tracker.snapshot(minutes=2).window_seconds == pytest.approx(120, abs=5)


def test_an_idle_server_whose_clock_is_set_back_has_fading_rates() -> None:
    clock = Clock()
    tracker = make_tracker(clock, half_life_minutes=5)
    clock.now += 3600
    run_tokens(tracker, 8)
    clock.ahead = -3600.0
    rates = []
    for _ in range(4):
        rates.append(tracker.snapshot(minutes=10).decaying_rate.sum())
        clock.now += 300
    assert np.array(rates[1:]) / np.array(rates[:-1]) == pytest.approx([0.5] * 3, rel=0.01)
    assert tracker.snapshot(minutes=10).tally.num_tokens.sum() == 0


@pytest.mark.parametrize("ahead", [0.0, -7200.0, 7200.0])
def test_a_saved_set_has_the_times_of_the_wall_clock(ahead: float) -> None:
    clock = Clock()
    tracker = make_tracker(clock)
    run_tokens(tracker, 2)
    clock.now += 600
    run_tokens(tracker, 1)
    clock.ahead = ahead
    saved = tracker.saved_set(with_history=True)
    assert (saved.start, saved.end) == (START + ahead, START + 600 + ahead)
    assert np.nanmax(saved.last_activation) == START + 600 + ahead
    later = Clock(START + 660 + ahead)
    restored = make_tracker(later)
    restored.restore(saved, "The file")
    assert restored.snapshot(minutes=5).tally.num_tokens.sum() == 1
    assert restored.snapshot(minutes=15).tally.num_tokens.sum() == 3


def test_a_file_from_the_future_is_as_old_as_when_it_was_written() -> None:
    clock = Clock()
    tracker = make_tracker(clock)
    run_tokens(tracker, 2)
    clock.now += 600
    run_tokens(tracker, 1)
    restored = make_tracker(Clock(START - 86400.0))
    restored.restore(tracker.saved_set(with_history=True), "The file")
    assert restored.snapshot(minutes=5).tally.num_tokens.sum() == 1
    assert restored.snapshot(minutes=20).tally.num_tokens.sum() == 3
    assert np.nanmax(restored.snapshot().last_activation) <= START - 86400.0


def test_last_activation_is_the_latest_step_of_each_expert() -> None:
    clock, rng, expected = Clock(), np.random.default_rng(6), {}
    tracker = make_tracker(clock)
    for _ in range(5):
        clock.now += 1
        routing = route(rng, 1)
        run_step(tracker, [span(1)], routing)
        for layer, (expert_ids, _) in enumerate(routing):
            expected |= {(layer, int(expert_id)): clock.now for expert_id in expert_ids[0]}
    actual = tracker.snapshot().last_activation
    assert {tuple(cell): actual[tuple(cell)] for cell in np.argwhere(~np.isnan(actual)).tolist()} == expected


@pytest.mark.parametrize("limit", [0, 1, 7, 1000])
def test_recent_activations_are_the_latest_in_order(limit: int) -> None:
    clock, rng, expected = Clock(), np.random.default_rng(7), []
    tracker = make_tracker(clock, recent_activations=limit)
    for _ in range(20):
        clock.now += 1
        routing = route(rng, 3)
        run_step(tracker, [span(3, generated_from=2)], routing)
        for layer_id, (expert_ids, _) in zip(LAYER_IDS, routing, strict=True):
            for expert_id in range(NUM_EXPERTS):
                counts = int((expert_ids[:2] == expert_id).sum()), int((expert_ids[2:] == expert_id).sum())
                if sum(counts):
                    expected.append((clock.now, layer_id, expert_id, *counts))
    recent = tracker.snapshot().recent
    actual = [(r.timestamp, r.layer_id, r.expert_id, r.num_prompt_tokens, r.num_generated_tokens) for r in recent]
    assert actual == expected[max(0, len(expected) - limit) :]


def test_memory_is_bounded_for_a_large_model() -> None:
    """94 × 128 experts: under 64 MB through and after an hour, and no more after two."""
    clock = Clock()
    tracker = ExpertTracker(range(94), 128, 8, StatisticsSettings(bucket_seconds=5, history_minutes=60), clock.system)
    expert_ids, gate_weights = torch.arange(8).view(1, 8), torch.full((1, 8), 0.125)
    sizes = []
    for _ in range(2 * 720):
        clock.now += 5
        tracker.begin_step([span(1, generated_from=0)])
        for layer_id in range(94):
            tracker.observe(layer_id, expert_ids, gate_weights)
        tracker.end_step()
        sizes.append(tracker.nbytes)
    assert max(sizes) < 64e6
    assert max(sizes[720:]) < 1.1 * max(sizes[:720])
    snapshot = tracker.snapshot(minutes=60)
    assert snapshot.tally.counts.sum() == snapshot.tally.num_tokens.sum() * 94 * 8
    assert 720 <= snapshot.tally.num_tokens.sum() <= 720 * 25 / 24 + 1


@pytest.mark.parametrize("minutes", [0, -1, 60.01, float("nan"), float("inf"), True, "5", 10**400])
def test_a_window_out_of_range_is_refused(minutes: float) -> None:
    tracker = make_tracker(Clock(), history_minutes=60)
    with raises(RequestError, "minutes", 60, "statistics.history_minutes"):
        tracker.snapshot(minutes)
