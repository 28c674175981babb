"""Balance, comparison, drift and hints say what the counts hold."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from amalgam.errors import CheckpointError, RequestError
from amalgam.experts.comparison import compare, jensen_shannon
from amalgam.experts.hints import Hint
from amalgam.experts.overview import build_overview, compare_traffic, drift
from amalgam.experts.precision_map import precision_map
from amalgam.experts.saved.files import save
from amalgam.experts.saved.folder import save_named
from amalgam.experts.statistics import balance, concentration, coverage, grid
from amalgam.experts.tracker import ExpertTracker
from tests.errors import raises
from tests.experts.routing import LAYER_IDS, NUM_EXPERTS, Clock, make_tracker, route, run_step, span

EVEN = np.full((1, NUM_EXPERTS), 5)
ONE = np.eye(1, NUM_EXPERTS, dtype=int) * 40


def run_experts(tracker: ExpertTracker, experts: list[int], num_rows: int, **fields: Any) -> None:
    """Tokens that all take two of `experts` in every layer, in turns."""
    ids = np.array([[experts[row % len(experts)], experts[(row + 1) % len(experts)]] for row in range(num_rows)])
    gates = np.full(ids.shape, 0.5, np.float32)
    run_step(tracker, [span(num_rows, **fields)], [(ids, gates)] * len(LAYER_IDS))


def test_balance_measures() -> None:
    even = {name: float(values[0]) for name, values in balance(EVEN).items()}
    assert even == pytest.approx(
        {
            "max_to_mean": 1,
            "mean_to_max": 1,
            "max_violation": 0,
            "coefficient_of_variation": 0,
            "normalized_entropy": 1,
            "gini": 0,
        },
        abs=1e-12,
    )
    one = {name: float(values[0]) for name, values in balance(ONE).items()}
    assert one["max_violation"] == NUM_EXPERTS - 1
    assert one["gini"] == pytest.approx(1 - 1 / NUM_EXPERTS)
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (3, NUM_EXPERTS))
    for row, gini in zip(counts, balance(counts)["gini"], strict=True):
        differences = np.abs(row[:, None] - row[None]).mean()
        assert gini == pytest.approx(differences / (2 * row.mean()))


def test_coverage_counts_the_busiest() -> None:
    counts = np.array([[50, 30, 10, 5, 3, 1, 1, 0], [1] * 8, [0] * 8, [7, 0, 0, 0, 0, 0, 0, 0]])
    assert coverage(counts) == [
        {"50": 1, "90": 3, "99": 6},
        {"50": 4, "90": 8, "99": 8},
        {"50": None, "90": None, "99": None},
        {"50": 1, "90": 1, "99": 1},
    ]


def test_lorenz_curves_run_from_nothing_to_all() -> None:
    tracker = make_tracker(Clock())
    run_experts(tracker, [0, 1, 2, 3], 40)
    for row in concentration(tracker.snapshot()):
        assert row["lorenz"] == pytest.approx([0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1])
        assert row["gini"] == pytest.approx(0.5)


def test_a_grid_is_cut_by_phase_and_measure() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(1)
    run_step(tracker, [span(10, generated_from=6)], route(rng, 10))
    parts = {phase: grid(tracker.snapshot(), phase) for phase in ("all", "prompt", "generated")}
    assert [parts[phase]["total_tokens"] for phase in parts] == [10, 6, 4]
    np.testing.assert_array_equal(
        np.add(parts["prompt"]["values"], parts["generated"]["values"]), parts["all"]["values"]
    )
    mass = grid(tracker.snapshot(), measure="gate_mass")
    np.testing.assert_allclose(mass["values"], tracker.snapshot().tally.gate_mass.sum(axis=0))
    assert [row["layer_id"] for row in mass["balance"]] == list(LAYER_IDS)


def test_divergence_of_known_distributions() -> None:
    assert jensen_shannon(EVEN, EVEN)[0] == 0
    left, right = np.array([[1, 1, 0, 0]]), np.array([[0, 0, 3, 3]])
    assert jensen_shannon(left, right)[0] == 1
    assert jensen_shannon(np.array([[1, 0]]), np.array([[1, 1]]))[0] == pytest.approx(
        0.5 * math.log2(1 / 0.75) + 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    )
    assert np.isnan(jensen_shannon(left, np.zeros((1, 4)))[0])
    answer = compare(left, np.zeros((1, 4)))
    assert answer["jensen_shannon"] == {"by_layer": [None], "mean": None}
    assert answer["difference"] == [[0.5, 0.5, 0, 0]]


def test_any_two_kinds_of_traffic_are_compared(tmp_path: Any) -> None:
    clock = Clock()
    tracker = make_tracker(clock)
    for label, experts in (("en", [0, 1]), ("zh", [2, 3])):
        tracker.admit(0, label, 0)
        run_experts(tracker, experts, 50, label=label)
    save_named(tmp_path, "monday", tracker.saved_set())
    clock.now += 600
    run_experts(tracker, [0, 1], 50)
    folder = str(tmp_path)
    answer = compare_traffic(tracker, "label:en", "label:zh", folder)
    assert answer["jensen_shannon"]["mean"] == 1
    assert answer["difference"][0][:4] == [0.5, 0.5, -0.5, -0.5]
    assert compare_traffic(tracker, "label:en", "minutes:1", folder)["jensen_shannon"]["mean"] == 0
    assert compare_traffic(tracker, "all", "all", folder)["jensen_shannon"]["mean"] == 0
    assert compare_traffic(tracker, "saved:monday", "all", folder)["jensen_shannon"]["mean"] > 0
    rest = compare_traffic(tracker, "rest:zh", "label:zh", folder)
    assert rest["difference"][0][:4] == [0.5, 0.5, -0.5, -0.5]
    before = compare_traffic(tracker, "before:1", "saved:monday", folder)  # monday's counts are all that came before
    assert before["difference"][0] == [0] * NUM_EXPERTS and before["jensen_shannon"]["mean"] == 0
    assert compare_traffic(tracker, "before:30", "all", folder)["jensen_shannon"]["mean"] is None


def test_gate_mass_and_one_phase_are_compared(tmp_path: Any) -> None:
    tracker = make_tracker(Clock())
    for label, gates, num_prompt in (("a", (0.9, 0.1), 10), ("b", (0.1, 0.9), 0)):
        tracker.admit(0, label, 0)
        routing = (np.tile([[0, 1]], (10, 1)), np.tile(np.array([gates], np.float32), (10, 1)))
        run_step(tracker, [span(10, generated_from=num_prompt, label=label)], [routing] * len(LAYER_IDS))

    def difference(first: str, second: str, **what: str) -> list[float]:
        answer = compare_traffic(tracker, first, second, str(tmp_path), **what)
        assert {name: answer[name] for name in what} == what
        return answer["difference"][0][:2]  # type: ignore[no-any-return]

    assert difference("label:a", "label:b") == [0, 0]
    assert difference("label:a", "label:b", measure="gate_mass") == pytest.approx([0.8, -0.8])
    assert difference("label:a", "rest:a", measure="gate_mass") == pytest.approx([0.8, -0.8])
    assert difference("label:a", "label:b", phase="prompt") == [0.5, 0.5]  # b has no prompt tokens
    assert difference("all", "label:a", phase="prompt", measure="gate_mass") == pytest.approx([0, 0])


@pytest.mark.parametrize(
    "text", ["", "everything", "label:", "label:nobody", "minutes:", "minutes:x", "minutes:-5", "minutes:nan",
             "minutes:1e999", "before:", "before:x", "before:1e9", "rest:", "rest:nobody", "reference", "reference:x",
             "saved:", "saved:none", "saved:../x", "saved:/etc/passwd", "file:/etc/passwd"],
)  # fmt: skip
def test_traffic_that_does_not_exist_is_refused(text: str, tmp_path: Any) -> None:
    with pytest.raises(RequestError):
        compare_traffic(make_tracker(Clock()), text, "all", str(tmp_path))


def test_drift_from_before_and_from_a_reference(tmp_path: Any) -> None:
    clock = Clock()
    tracker = make_tracker(clock)
    run_experts(tracker, [0, 1], 300)
    path = tmp_path / "reference.npz"
    save(tracker.saved_set(), path)
    clock.now += 1200
    run_experts(tracker, [6, 7], 300)
    figures = drift(tracker)
    assert (figures["tokens"], figures["reference_tokens"]) == (300, 300)
    assert figures["jensen_shannon"]["mean"] == 1
    [hint] = [hint for hint in build_overview(tracker, None).hints if hint.kind == "drift"]
    assert hint.severity == "warning" and "1.00 bits" in hint.text
    assert hint.compare == {"a": "minutes:5", "b": "before:5"}
    assert compare_traffic(tracker, **sides(hint))["jensen_shannon"] == figures["jensen_shannon"]

    referring = make_tracker(clock, reference=str(path))
    run_experts(referring, [0, 1], 300)
    assert drift(referring)["jensen_shannon"]["mean"] == 0
    assert "reference" in drift(referring)["reference"]
    run_experts(referring, [6, 7], 300)
    [hint] = [hint for hint in build_overview(referring, None).hints if hint.kind == "drift"]
    assert hint.compare == {"a": "minutes:5", "b": "reference"}
    assert compare_traffic(referring, **sides(hint))["jensen_shannon"]["mean"] == hint.figures["jensen_shannon"]
    with raises(CheckpointError, tmp_path / "nowhere.npz"):
        drift(make_tracker(clock, reference=str(tmp_path / "nowhere.npz")))


def sides(hint: Hint) -> dict[str, str]:
    """A hint's comparison, as arguments."""
    assert hint.compare is not None
    return {"first": hint.compare["a"], "second": hint.compare["b"], "folder": ""}


class Version:
    """Weights of 2.0 bits for experts 0 to 3, of 16 for the others; 100 parameters each. One expert lies apart."""

    version_id = 1

    def __init__(self) -> None:
        self.origins = {}
        self.devices = {f"layers.{LAYER_IDS[1]}.mlp.experts.2.{part}": "cuda" for part in ("gate", "up", "down")}
        for layer_id in LAYER_IDS:
            for expert_id in range(NUM_EXPERTS):
                for part in ("gate", "up", "down"):
                    narrow = expert_id < 4
                    self.origins[f"layers.{layer_id}.mlp.experts.{expert_id}.{part}"] = SimpleNamespace(
                        name=f"l{layer_id}.e{expert_id}.{part}",
                        format="int2" if narrow else "bf16",
                        source="small" if narrow else "base",
                        shape=(10, 10),
                    )

    def __getitem__(self, slot: str) -> SimpleNamespace:
        return SimpleNamespace(nbytes=25 if self.origins[slot].source == "small" else 200)


def test_the_precision_map_has_every_projection() -> None:
    found = precision_map(Version(), LAYER_IDS, NUM_EXPERTS).as_json()  # type: ignore[arg-type]
    assert found["projections"] == ["gate", "up", "down"]
    assert found["formats"][0][3] == ["int2"] * 3 and found["sources"][2][4] == ["base"] * 3
    assert found["bytes"][1][0] == [25] * 3 and found["names"][1][7][2] == "l2.e7.down"
    assert (found["wide_bits"], found["narrow_bits"]) == (16, 2)
    assert found["devices"][1] == [None, None, "cuda", *[None] * 5] and {*found["devices"][0]} == {None}
    assert found["bytes_by_format"] == {"bf16": 3 * 4 * 600, "int2": 3 * 4 * 75}


class ThreeWidths(Version):
    """Expert 7 has 8 bits: narrower than the widest, wider than the narrowest."""

    def __getitem__(self, slot: str) -> SimpleNamespace:
        return SimpleNamespace(nbytes=100) if ".experts.7." in slot else super().__getitem__(slot)


def test_narrow_and_wide_have_one_definition() -> None:
    tracker, version = make_tracker(Clock()), ThreeWidths()
    found = precision_map(version, LAYER_IDS, NUM_EXPERTS)  # type: ignore[arg-type]
    assert found.is_narrow.tolist() == [[True] * 4 + [False] * 3 + [True]] * 3
    assert found.is_wide.tolist() == [[False] * 4 + [True] * 4] * 3
    assert found.as_json()["is_wide"] == found.is_wide.tolist()
    run_experts(tracker, [4, 5, 6], 900)
    [cold] = [hint for hint in build_overview(tracker, version).hints if hint.kind == "cold_wide"]  # type: ignore[arg-type]
    assert cold.figures["experts"] == [{"layer_id": layer_id, "expert_id": 7} for layer_id in LAYER_IDS]
    assert cold.figures["wide_bits"] == 8
    assert (cold.figures["bytes"], cold.figures["saved_bytes"]) == (3 * 300, 3 * 225)


def test_a_single_expert_is_spoken_of_as_one() -> None:
    tracker, version = make_tracker(Clock()), Version()
    routing = []
    for num_used in (NUM_EXPERTS, NUM_EXPERTS, NUM_EXPERTS - 1):  # of each layer
        rows = np.arange(300)
        ids = np.stack([rows % num_used, (rows + 1) % num_used], axis=1)
        routing.append((ids, np.full(ids.shape, 0.5, np.float32)))
    run_step(tracker, [span(300)], routing)
    hints = {hint.kind: hint.text for hint in build_overview(tracker, version).hints}  # type: ignore[arg-type]
    assert hints["unused"] == "1 of 24 experts was never used in 300 tokens."
    assert hints["cold_wide"].startswith("1 expert with at most a quarter of the mean use is kept in wide formats")


def test_hints_name_what_stands_out_with_their_figures() -> None:
    tracker, version = make_tracker(Clock()), Version()
    tracker.admit(0, "verse", 0)
    run_experts(tracker, [0, 1, 2], 900)
    run_experts(tracker, [5, 6], 300, label="verse")
    hints = build_overview(tracker, version).hints  # type: ignore[arg-type]
    kinds = [hint.kind for hint in hints]
    assert set(kinds) == {"hot_narrow", "cold_wide", "unused", "domain"}
    assert [hint.severity for hint in hints] == sorted(
        (hint.severity for hint in hints), key=["warning", "notice", "info"].index
    )
    hot = hints[kinds.index("hot_narrow")]
    assert hot.expert_id in (0, 1, 2) and hot.layer_id in LAYER_IDS
    assert hot.figures["times_mean"] == pytest.approx(2.0) and hot.figures["bits"] == 2
    assert "2.0 bits" in hot.text and "2.0 位" in hot.text_zh
    cold = hints[kinds.index("cold_wide")]
    assert cold.figures["num_experts"] == 6 and cold.figures["bytes"] == 6 * 600
    assert cold.figures["saved_bytes"] == 6 * 525
    assert cold.text.startswith("6 experts with at most a quarter of the mean use are kept in wide formats")
    assert "3.5 KiB" in cold.text and "3.1 KiB less" in cold.text and "可节省 3.1 KiB" in cold.text_zh
    unused = hints[kinds.index("unused")]
    assert unused.figures["num_experts"] == 9
    assert {"layer_id": 1, "expert_id": 3} in unused.figures["experts"]
    domain = hints[kinds.index("domain")]
    assert domain.figures["label"] == "verse" and domain.figures["jensen_shannon"] == pytest.approx(1)
    assert compare_traffic(tracker, **sides(domain))["jensen_shannon"]["mean"] == domain.figures["jensen_shannon"]


def test_an_unbalanced_layer_is_named() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(0)
    routing = route(rng, 600)
    routing[1] = (np.tile([[2, 5]], (600, 1)), np.full((600, 2), 0.5, np.float32))
    run_step(tracker, [span(600)], routing)
    [hint] = [hint for hint in build_overview(tracker, None).hints if hint.kind == "unbalanced"]
    assert hint.layer_id == LAYER_IDS[1]
    assert hint.figures["max_to_mean"] == 4 and "4.0 times" in hint.text


def test_even_traffic_and_little_traffic_give_no_hints() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(0)
    run_experts(tracker, [0, 1], 200)
    assert build_overview(tracker, Version()).hints == []  # type: ignore[arg-type]
    tracker = make_tracker(Clock())
    tracker.admit(0, "half", 0)
    for _ in range(20):
        run_step(tracker, [span(50, label="half"), span(50, 50)], route(rng, 100))
    assert [hint.kind for hint in build_overview(tracker, None).hints] == []
