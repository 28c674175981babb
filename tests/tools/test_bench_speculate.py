"""What `amalgam bench speculate` says and measures, on the first layers of the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amalgam.cli import main
from tests.planning.conftest import small

__all__ = ["small"]


def test_a_dense_model_gains_what_experts_lose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "speculate", "--json", "--experts", "8/128", "--expert-share", "1"]) == 0
    simulated = json.loads(capsys.readouterr().out)["simulated"]
    dense, experts = simulated["a dense model"], simulated["8 of 128 experts"]
    assert [row["chance"] for row in dense] == [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert dense[4]["speed_up"]["4"] > 2 and experts[4]["speed_up"]["4"] < 1


@pytest.mark.parametrize(
    "arguments",
    [["--experts", "8"], ["--experts", "9/8"], ["--speculation.kind", "ngram"], ["--chances", "2"], ["--shape", "S"]],
)
def test_what_cannot_be_said_is_refused(arguments: list[str]) -> None:
    assert main(["bench", "speculate", *arguments]) == 2


def test_a_model_is_measured_in_turns(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(small / "base"), "--speculation.kind", "ngram", "--batches", "1,2", "--chances", "0.5"]
    small_run = ["--num-tokens", "24", "--repeats", "1", "--json"]
    assert main(["bench", "speculate", *arguments, *small_run]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["simulated"]) == ["base"]
    rows = document["measured"]
    known = [row for row in rows if row["prompt"] == "prose, 50% true" and row["mode"] == "always"]
    assert len(known) == 2 and all(0 <= row["acceptance"] < 0.8 for row in known)
    assert [(row["num_sequences"], row["mode"]) for row in rows[:4]] == [
        (1, "off"), (1, "always"), (1, "adaptive"), (2, "off"),
    ]  # fmt: skip
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert (row["acceptance"] is None) or row["mode"] != "off"
        assert row["num_tokens_per_step"] >= 1 and (row["mode"] != "off" or row["num_tokens_per_step"] == 1)
