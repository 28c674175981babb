"""The answer of /expert_stats adds up and says what it covers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from amalgam.config.statistics import StatisticsSettings
from amalgam.errors import ConfigError, RequestError
from amalgam.experts.saved.files import from_bytes, to_bytes
from amalgam.experts.statistics import balance, concentration, describe_experts
from amalgam.experts.tracker import ExpertTracker
from tests.errors import raises
from tests.experts.routing import LAYER_IDS, NUM_EXPERTS, START, TOP_K, Clock, make_tracker, route, run_step, span

NUM_ALL = NUM_EXPERTS * len(LAYER_IDS)


@pytest.fixture
def tracker() -> ExpertTracker:
    """Twelve prompt and four generated tokens of two requests, ten seconds ago; then one more."""
    clock, rng = Clock(), np.random.default_rng(0)
    tracker = make_tracker(clock)
    clock.now += 90
    tracker.count_request()
    tracker.count_request()
    run_step(tracker, [span(8, generated_from=4), span(8, 8)], route(rng, 16))
    clock.now += 10
    run_step(tracker, [span(1, generated_from=0)], route(rng, 1))
    return tracker


def test_the_summary_adds_up(tracker: ExpertTracker) -> None:
    answer = describe_experts(tracker.snapshot())
    num_activations = 17 * TOP_K * len(LAYER_IDS)
    assert answer["summary"] == {
        "total_activations": num_activations,
        "prompt_activations": 12 * TOP_K * len(LAYER_IDS),
        "generated_activations": 5 * TOP_K * len(LAYER_IDS),
        "total_tokens": 17,
        "prompt_tokens": 12,
        "generated_tokens": 5,
        "total_requests": 2,
        "total_layers": len(LAYER_IDS),
        "total_experts": NUM_ALL,
        "experts_per_layer": NUM_EXPERTS,
        "active_experts_per_token": TOP_K,
        "uptime": 100.0,
        "half_life_minutes": 5.0,
        "rates": {
            "activations_per_second": num_activations / 100,
            "tokens_per_second": 0.17,
            "requests_per_second": 0.02,
        },
    }
    assert answer["window"] == {"minutes": None, "start": START, "end": START + 100, "seconds": 100.0}


def test_layers_experts_and_summary_agree(tracker: ExpertTracker) -> None:
    snapshot = tracker.snapshot()
    answer = describe_experts(snapshot)
    experts = answer["expert_stats"]
    assert [(row["layer_id"], row["expert_id"]) for row in experts] == [
        (layer_id, expert_id) for layer_id in LAYER_IDS for expert_id in range(NUM_EXPERTS)
    ]
    for layer in answer["layer_stats"]:
        rows = [row for row in experts if row["layer_id"] == layer["layer_id"]]
        assert layer["activation_count"] == 17 * TOP_K
        for name in ("activation_count", "prompt_count", "generated_count", "gate_mass", "activations_per_second"):
            assert layer[name] == pytest.approx(sum(row[name] for row in rows))
        assert layer["mean_activations_per_second"] == pytest.approx(layer["activations_per_second"] / NUM_EXPERTS)
        assert layer["num_experts"] == NUM_EXPERTS
        assert layer["num_used_experts"] == sum(row["activation_count"] > 0 for row in rows)
        assert sum(row["layer_share"] for row in rows) == pytest.approx(1)
    for row in experts:
        assert row["activation_count"] == row["prompt_count"] + row["generated_count"]
        assert (row["last_activation"] is None) == (row["activation_count"] == 0)


def test_top_experts_are_the_busiest_in_order(tracker: ExpertTracker) -> None:
    answer = describe_experts(tracker.snapshot(), top_k=5)
    expected = sorted(answer["expert_stats"], key=lambda row: -row["activation_count"])[:5]
    assert answer["top_experts"] == expected
    assert len(describe_experts(tracker.snapshot(), NUM_ALL)["top_experts"]) == NUM_ALL
    assert len(describe_experts(tracker.snapshot())["top_experts"]) == 10


def test_recent_activations_come_newest_first(tracker: ExpertTracker) -> None:
    recent = describe_experts(tracker.snapshot())["recent_activations"]
    times = [row["timestamp"] for row in recent]
    assert times == sorted(times, reverse=True)
    assert [row["token_count"] for row in recent[: TOP_K * len(LAYER_IDS)]] == [1] * TOP_K * len(LAYER_IDS)
    assert sum(row["token_count"] for row in recent) == 17 * TOP_K * len(LAYER_IDS)
    assert all(row["token_count"] == row["prompt_count"] + row["generated_count"] for row in recent)


def test_a_window_is_counted_and_rated_by_itself(tracker: ExpertTracker) -> None:
    answer = describe_experts(tracker.snapshot(minutes=0.05))
    assert answer["summary"]["total_tokens"] == 1
    assert answer["summary"]["uptime"] == 100
    window = answer["window"]
    assert window["minutes"] == 0.05
    assert window["start"] <= window["end"] - 3
    assert answer["summary"]["rates"]["tokens_per_second"] == 1 / window["seconds"]


def test_the_answer_is_plain_json_before_any_traffic() -> None:
    for tracker in (make_tracker(Clock()), ExpertTracker((), 0, 0, StatisticsSettings(), Clock().system)):
        answer = describe_experts(tracker.snapshot())
        assert json.loads(json.dumps(answer, allow_nan=False)) == answer
        assert answer["summary"]["rates"]["tokens_per_second"] == 0


def test_balance_of_even_single_and_idle_layers() -> None:
    measures = balance(np.array([[3, 3, 3, 3], [0, 8, 0, 0], [0, 0, 0, 0]]))
    assert measures["max_to_mean"][:2].tolist() == [1, 4]
    assert measures["coefficient_of_variation"][:2] == pytest.approx([0, np.sqrt(3)])
    assert measures["normalized_entropy"][:2] == pytest.approx([1, 0])
    assert all(np.isnan(values[2]) for values in measures.values())


@pytest.mark.parametrize("top_k", [0, -1, NUM_ALL + 1, 2**63, True, 1.0, "3"])
def test_top_k_out_of_range_is_refused(tracker: ExpertTracker, top_k: Any) -> None:
    with raises(RequestError, "top_k", NUM_ALL):
        describe_experts(tracker.snapshot(), top_k)


def test_top_k_of_a_dense_model_is_refused() -> None:
    tracker = ExpertTracker((), 0, 0, StatisticsSettings(), Clock().system)
    with raises(RequestError, "top_k"):
        describe_experts(tracker.snapshot(), 1)


def test_layers_with_fewer_experts_are_measured_by_those_that_they_have() -> None:
    clock = Clock()
    tracker = ExpertTracker(LAYER_IDS, (8, 4, 2), TOP_K, StatisticsSettings(), clock.system)
    routing = [(np.tile([0, 1], (10, 1)), np.full((10, 2), 0.5, np.float32)) for _ in LAYER_IDS]
    run_step(tracker, [span(10)], routing)
    clock.now += 1
    answer = describe_experts(tracker.snapshot())
    assert (answer["summary"]["total_experts"], answer["summary"]["experts_per_layer"]) == (14, 8)
    assert [row["num_experts"] for row in answer["layer_stats"]] == [8, 4, 2]
    assert [row["num_dead_experts"] for row in answer["layer_stats"]] == [6, 2, 0]
    assert [row["max_to_mean"] for row in answer["layer_stats"]] == [4, 2, 1]
    gini = [row["gini"] for row in answer["layer_stats"]]
    assert gini == pytest.approx([0.75, 0.5, 0.0])
    assert [row["normalized_entropy"] for row in answer["layer_stats"]] == pytest.approx([1 / 3, 1 / 2, 1])
    experts = [(row["layer_id"], row["expert_id"]) for row in answer["expert_stats"]]
    counts = zip(LAYER_IDS, (8, 4, 2), strict=True)
    assert experts == [(layer_id, n) for layer_id, count in counts for n in range(count)]
    assert [len(row["lorenz"]) for row in concentration(tracker.snapshot())] == [9, 5, 3]
    saved = from_bytes(to_bytes(tracker.saved_set()), "a file")
    assert saved.expert_counts == (8, 4, 2)
    with raises(ConfigError):
        make_tracker(clock).restore(saved, "a file")
