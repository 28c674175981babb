"""The statistics as they are asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from amalgam.errors import RequestError
from amalgam.runtime import statistics
from amalgam.runtime.statistics import ExpertStatistics
from tests.errors import raises
from tests.experts.routing import LAYER_IDS, NUM_EXPERTS, TOP_K, Clock, busy_tracker, make_tracker, run_tokens


def test_a_set_is_not_merged_under_a_name_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker: Any = busy_tracker(0)
    served = ExpertStatistics(tracker, lambda: pytest.fail("no weights are asked for"), lambda _: None, "a")
    assert served.save_set(tmp_path, "a").file_name == "a.safetensors"
    monkeypatch.setattr(statistics, "load_named", lambda *_: pytest.fail("no set is read"))
    with raises(RequestError, "name", "'../x'"):
        served.save_set(tmp_path, "../x", ["a"])


class Version:
    """All experts are in one format, or all but the down projections."""

    devices: ClassVar[dict[str, str]] = {}

    def __init__(self, name: str, down: str) -> None:
        formats = {"gate": name, "up": name, "down": down}
        self.origins = {
            f"layers.{layer}.mlp.experts.{expert}.{part}": SimpleNamespace(name="", format=one, source="", shape=(2, 2))
            for layer in LAYER_IDS
            for expert in range(NUM_EXPERTS)
            for part, one in formats.items()
        }

    def __getitem__(self, slot: str) -> SimpleNamespace:
        return SimpleNamespace(nbytes=8)


def test_activations_stay_with_the_format_that_they_had() -> None:
    tracker, versions = make_tracker(Clock()), [Version("bf16", "bf16"), Version("int4", "bf16")]
    current: list[Any] = versions[:1]
    served = ExpertStatistics(tracker, lambda: current[0], lambda _: None, "a")
    per_token = TOP_K * len(LAYER_IDS)
    run_tokens(tracker, 5)
    served.activations_by_format()  # as a change of the weights does
    current[0] = versions[1]
    assert served.activations_by_format()["gate", "bf16"] == 5 * per_token
    run_tokens(tracker, 3)
    served.reset()
    run_tokens(tracker, 2)
    first, then = 5 * per_token, 5 * per_token
    assert served.activations_by_format() == {
        ("gate", "bf16"): first, ("up", "bf16"): first, ("down", "bf16"): first + then,
        ("gate", "int4"): then, ("up", "int4"): then,
    }  # fmt: skip


def test_what_a_file_brings_along_was_not_activated_here() -> None:
    tracker: Any = busy_tracker(0)
    gone_on = make_tracker(Clock(), pair_sampling=1)
    gone_on.restore(tracker.saved_set(), "test")
    run_tokens(gone_on, 4)
    assert int(gone_on.activations().sum()) == 4 * TOP_K * len(LAYER_IDS)
    assert int(gone_on.snapshot().tally.counts.sum()) > 4 * TOP_K * len(LAYER_IDS)
