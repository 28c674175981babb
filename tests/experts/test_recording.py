"""Labels, traces, pairs of experts, decaying rates and rejected proposals: each against brute force."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from amalgam.config.statistics import StatisticsSettings
from amalgam.errors import OverloadedError, RequestError
from amalgam.experts.statistics import describe_experts, grid
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

HOSTILE = ["<img src=x onerror=alert(1)>", "'; DROP TABLE x; --", "../../etc/passwd", "{{7*7}}", "日本語", "a" * 64]


def counts_of(routing: list[tuple[np.ndarray, np.ndarray]], rows: list[int]) -> np.ndarray:
    """`[layers, experts]` of some rows."""
    counts = np.zeros((len(LAYER_IDS), NUM_EXPERTS), np.int64)
    for layer, (expert_ids, _) in enumerate(routing):
        np.add.at(counts[layer], expert_ids[rows], 1)
    return counts


def test_labels_are_counted_apart_and_in_the_total() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(0)
    routing = route(rng, 10)
    for label in ("en", "zh"):
        tracker.admit(1, label, 0)
        tracker.count_request(label)
    tracker.count_request(None)
    spans = [
        span(3, label="en", generated_from=2),
        span(4, 3, label="zh", record_from=5),
        span(2, 7, label="en"),
        span(1, 9),
    ]
    run_step(tracker, spans, routing)
    tallies = tracker.label_tallies()
    np.testing.assert_array_equal(tallies["en"].counts.sum(axis=0), counts_of(routing, [0, 1, 2, 7, 8]))
    np.testing.assert_array_equal(tallies["zh"].counts.sum(axis=0), counts_of(routing, [5, 6]))
    assert tallies["en"].num_tokens.tolist() == [4, 1]
    assert [int(tally.num_requests) for tally in tallies.values()] == [1, 1]
    snapshot = tracker.snapshot()
    np.testing.assert_array_equal(snapshot.tally.counts.sum(axis=0), counts_of(routing, [0, 1, 2, 5, 6, 7, 8, 9]))
    assert snapshot.labels == {"en": 5, "zh": 2}
    gate_mass = tracker.snapshot(label="zh").tally.gate_mass.sum()
    assert gate_mass == pytest.approx(sum(gates[[5, 6]].sum() for _, gates in routing))
    assert grid(tracker.snapshot(label="zh"))["total_tokens"] == 2


def test_the_number_of_labels_is_bounded() -> None:
    tracker = make_tracker(Clock(), max_labels=3)
    for label in ("a", "b", "c", "a"):
        tracker.admit(0, label, 0)
    with raises(RequestError, "domain", "d", 3, "statistics.max_labels"):
        tracker.admit(0, "d", 0)
    tracker.reset()
    tracker.admit(0, "d", 0)
    # A request of before the reset is still counted, if need be without its label.
    for label in ("a", "b", "c"):
        run_step(tracker, [span(1, label=label)], route(np.random.default_rng(1), 1))
    assert tracker.snapshot().labels == {"d": 0, "a": 1, "b": 1}
    assert tracker.snapshot().tally.num_tokens.sum() == 3


@pytest.mark.parametrize("label", ["", "a" * 65, "a\nb", "\x1b[31m", "\u202eabc", 3, None, ["a"]])
def test_a_label_that_is_no_name_is_refused(label: Any) -> None:
    tracker = make_tracker(Clock())
    if label is None:
        tracker.admit(0, None, 0)
        assert tracker.snapshot().labels == {}
        return
    with raises(RequestError, "domain", 1, 64):
        tracker.admit(0, label, 0)


@pytest.mark.parametrize("label", HOSTILE)
def test_a_hostile_label_is_only_a_name(label: str) -> None:
    tracker = make_tracker(Clock())
    tracker.admit(0, label, 0)
    run_step(tracker, [span(1, label=label)], route(np.random.default_rng(1), 1))
    assert describe_experts(tracker.snapshot())["labels"] == [{"label": label, "tokens": 1}]


def test_an_unknown_label_and_a_label_with_a_window_are_refused() -> None:
    tracker = make_tracker(Clock())
    with raises(RequestError, "label", "nobody"):
        tracker.snapshot(label="nobody")
    with raises(RequestError, "minutes", "label"):
        tracker.snapshot(5, "nobody")


def test_a_request_that_is_not_counted_leaves_no_trace_in_the_statistics() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(2)
    tracker.admit(7, None, 4)
    routing = route(rng, 6)
    run_step(tracker, [span(4, request_id=7, is_counted=False, wants_trace=True), span(2, 4)], routing)
    assert tracker.snapshot().tally.num_tokens.sum() == 2
    np.testing.assert_array_equal(tracker.snapshot().tally.counts.sum(axis=0), counts_of(routing, [4, 5]))
    trace = tracker.take_trace(7)
    assert trace is not None and trace.expert_ids.shape == (4, len(LAYER_IDS), TOP_K)


def test_a_trace_is_put_together_over_steps_and_preemptions() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(3)
    tracker.admit(1, None, 20)
    first, second, third = route(rng, 9), route(rng, 6), route(rng, 1)
    run_step(tracker, [span(4), span(5, 4, request_id=1, wants_trace=True)], first)
    # Preempted: the first five tokens again, and one that is new.
    run_step(tracker, [span(6, request_id=1, wants_trace=True, record_from=5)], second)
    run_step(tracker, [span(1, request_id=1, wants_trace=True, position=6)], third)
    trace = tracker.take_trace(1)
    assert trace is not None and trace.layer_ids == LAYER_IDS
    for layer in range(len(LAYER_IDS)):
        expected = np.vstack([first[layer][0][4:9], second[layer][0][5:6], third[layer][0]])
        gates = np.vstack([first[layer][1][4:9], second[layer][1][5:6], third[layer][1]])
        np.testing.assert_array_equal(trace.expert_ids[:, layer], expected)
        np.testing.assert_array_equal(trace.gate_weights[:, layer], gates)
    assert tracker.take_trace(1) is None


def test_tokens_that_were_not_computed_have_no_experts_in_a_trace() -> None:
    """As with a prompt whose beginning is cached."""
    tracker = make_tracker(Clock())
    tracker.admit(1, None, 20)
    run_step(tracker, [span(2, request_id=1, wants_trace=True, position=3)], route(np.random.default_rng(4), 2))
    trace = tracker.take_trace(1)
    assert trace is not None and len(trace.expert_ids) == 5
    assert (trace.expert_ids[:3] == -1).all() and (trace.expert_ids[3:] >= 0).all()
    assert tracker.snapshot().tally.num_tokens.sum() == 2


def test_memory_for_traces_is_bounded() -> None:
    per_token = len(LAYER_IDS) * TOP_K * 6
    tracker = make_tracker(Clock(), trace_bytes=100 * per_token)
    with raises(RequestError, 101, 3600, "statistics.trace_bytes"):
        tracker.admit(1, None, 101)
    tracker.admit(1, None, 60)
    with pytest.raises(OverloadedError):
        tracker.admit(2, None, 60)
    tracker.take_trace(1)
    tracker.admit(2, None, 60)


def test_rejected_proposals_are_neither_counted_nor_traced() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(5)
    tracker.admit(1, "a", 10)
    routing = route(rng, 7)
    spans = [
        span(4, request_id=1, generated_from=0, wants_trace=True, label="a"),
        span(3, 4, request_id=2, generated_from=0),
    ]
    run_step(tracker, spans, routing, rejected={1: 2})
    np.testing.assert_array_equal(tracker.snapshot().tally.counts.sum(axis=0), counts_of(routing, [0, 1, 4, 5, 6]))
    assert tracker.snapshot().labels == {"a": 2}
    trace = tracker.take_trace(1)
    assert trace is not None and len(trace.expert_ids) == 2


def test_pairs_are_those_of_every_token() -> None:
    tracker, rng = make_tracker(Clock(), pair_sampling=1), np.random.default_rng(6)
    together = np.zeros((len(LAYER_IDS), NUM_EXPERTS, NUM_EXPERTS), np.int64)
    onward = np.zeros((len(LAYER_IDS) - 1, NUM_EXPERTS, NUM_EXPERTS), np.int64)
    for _ in range(5):
        routing = route(rng, 20)
        run_step(tracker, [span(20)], routing)
        for row in range(20):
            for layer, (ids, _) in enumerate(routing):
                for a in ids[row]:
                    together[layer, a, ids[row]] += 1
                    if layer + 1 < len(LAYER_IDS):
                        onward[layer, a, routing[layer + 1][0][row]] += 1
    for layer, layer_id in enumerate(LAYER_IDS):
        pairs = tracker.layer_pairs(layer_id)
        np.testing.assert_array_equal(pairs.together, together[layer])
        assert (pairs.num_tokens, pairs.sampling) == (100, 1)
        if pairs.onward is not None:
            np.testing.assert_array_equal(pairs.onward, onward[layer])
    assert pairs.onward is None and pairs.next_layer_id is None
    assert tracker.layer_pairs(1).next_layer_id == 2
    with raises(RequestError, "layer_id", 3):
        tracker.layer_pairs(3)


def test_pairs_are_sampled_without_favouring_a_place_in_the_batch() -> None:
    tracker = make_tracker(Clock(), pair_sampling=4)
    ids = [np.tile(np.array([[row, 7] for row in range(4)]), (2000, 1))[:8000] for _ in LAYER_IDS]
    run_step(tracker, [span(8000)], [(layer, np.full(layer.shape, 0.5, np.float32)) for layer in ids])
    pairs = tracker.layer_pairs(1)
    assert 1800 < pairs.num_tokens < 2200
    assert np.diagonal(pairs.together)[:4].min() > 400
    assert np.diagonal(pairs.together)[7] == pairs.num_tokens
    nothing = make_tracker(Clock(), pair_sampling=0)
    run_tokens(nothing, 5)
    assert nothing.layer_pairs(1).num_tokens == nothing.layer_pairs(1).together.sum() == 0


def test_decaying_rates_follow_the_traffic() -> None:
    clock = Clock()
    tracker = make_tracker(clock, half_life_minutes=1)
    for _ in range(600):
        clock.now += 1
        run_tokens(tracker, 2)
    rate = tracker.snapshot().decaying_rate
    assert rate.sum() == pytest.approx(2 * TOP_K * len(LAYER_IDS), rel=0.05)  # steps of one tick count as its last
    clock.now += 60
    assert tracker.snapshot().decaying_rate.sum() == pytest.approx(rate.sum() / 2, rel=0.02)
    tracker.reset()
    assert tracker.snapshot().decaying_rate.sum() == 0


def test_an_early_rate_is_the_mean_since_the_start() -> None:
    clock = Clock()
    tracker = make_tracker(clock)
    for _ in range(10):
        clock.now += 1
        run_tokens(tracker, 3)
    assert tracker.snapshot().decaying_rate.sum() == pytest.approx(3 * TOP_K * len(LAYER_IDS), rel=0.02)


def big_tracker(**settings: Any) -> ExpertTracker:
    """94 × 128 experts, 8 active, with some traffic of every label allowed."""
    tracker = ExpertTracker(range(94), 128, 8, StatisticsSettings(**settings))
    generator = torch.Generator().manual_seed(0)
    for index in range(tracker.settings.max_labels):
        tracker.admit(index, f"label {index}", 0)
        tracker.begin_step([TokenSpan(index, 0, 4, 0, 2, label=f"label {index}")])
        for layer_id in range(94):
            tracker.observe(layer_id, torch.rand(4, 128, generator=generator).topk(8).indices, torch.rand(4, 8))
        tracker.end_step()
    return tracker


def test_a_large_grid_is_consistent_while_steps_run() -> None:
    """How long it takes, benchmarks/dashboard.py says."""
    tracker, is_done = big_tracker(), threading.Event()

    def run() -> None:
        expert_ids, gates = torch.arange(8).view(1, 8), torch.full((1, 8), 0.125)
        while not is_done.wait(0.002):
            tracker.begin_step([TokenSpan(0, 0, 1, 0, 0)])
            for layer_id in range(94):
                tracker.observe(layer_id, expert_ids, gates)
            tracker.end_step()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for minutes in (None, 60):
            for _ in range(50):
                answer = grid(tracker.snapshot(minutes))
                assert {sum(row) for row in answer["values"]} == {answer["total_tokens"] * 8}
    finally:
        is_done.set()
        thread.join()


def test_memory_with_every_label_is_bounded() -> None:
    """Totals, 64 labels, pairs: under 64 MB beside the history, whatever happens next."""
    tracker = big_tracker()
    before = tracker.nbytes
    assert before < 64e6
    for index in range(200):
        with raises(RequestError, f"one more {index}", 64):
            tracker.admit(0, f"one more {index}", 0)
    run = [torch.arange(8).view(1, 8)] * 94
    for _ in range(300):
        tracker.begin_step([TokenSpan(0, 0, 1, 0, 0, label="label 1")])
        for layer_id, ids in enumerate(run):
            tracker.observe(layer_id, ids, torch.ones(1, 8))
        tracker.end_step()
    tracker.snapshot()
    assert tracker.nbytes < before + 1e6


def test_uptime_does_not_move_with_a_reset_and_revision_does() -> None:
    clock = Clock()
    tracker = make_tracker(clock)
    before = tracker.revision
    run_tokens(tracker, 1)
    assert tracker.revision > before
    clock.now += 10
    tracker.reset()
    assert tracker.snapshot().started_at == START
    assert tracker.revision > before + 1
