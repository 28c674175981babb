"""The benchmark of re-maps reads streams right, and tells answers and gaps apart."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.errors import raises

sys.path.append(str(ROOT / "benchmarks"))

import remaps
from remapping import exact, pause
from remapping.bench import Bench, Weights
from remapping.exact import Made, Offline
from remapping.live import Question, StreamedAnswer

QUESTION = Question("a", 3, seed=1)
EVENTS = [
    {"text": "a"},
    {"text": "bc"},
    {"text": "", "weight_version": 4, "generated_tokens": 3, "finish_reason": "length"},
]
STREAM = b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in EVENTS) + b"data: [DONE]\n\n"


def answered(*parts: bytes, status: int = 200) -> StreamedAnswer:
    answer = StreamedAnswer(QUESTION)
    answer.head(status, ())
    for index, part in enumerate(parts):
        answer.piece(part, float(index))
    return answer


@pytest.mark.parametrize("size", [1, 7, len(STREAM)])
def test_a_stream_is_read_however_it_is_cut(size: int) -> None:
    answer = answered(*(STREAM[at : at + size] for at in range(0, len(STREAM), size)))
    assert (answer.text, answer.version, answer.num_tokens, answer.error) == ("abc", 4, 3, "")
    assert len(answer.arrivals) == 2


def test_errors_and_streams_that_are_cut_are_no_answers() -> None:
    assert answered(b'{"error": 1}', status=503).error
    assert answered(b'data: {"error": {"type": "unavailable"}}\n\n').error
    assert answered(STREAM[:20]).version is None


def test_gaps_that_overlap_a_remap_are_told_from_others() -> None:
    answer = StreamedAnswer(QUESTION, arrivals=[0.0, 1.0, 3.0, 4.0])
    assert pause.gaps_beside([answer], [(1.5, 2.0)]) == ([2000.0], [1000.0, 1000.0])
    assert pause.gaps_beside([answer], [(0.5, 3.5)])[1] == []


def test_changes_in_turn_always_change_something() -> None:
    weights = Weights({0: [["a"], ["b"]], 3: [["c"]]}, ["q"], ("base", "int8", "int4"))
    rng, now = random.Random(0), {}
    for change in itertools.islice(weights.in_turn(rng, lambda: weights.any_expert(rng)), 50):
        [(name, source)] = change.items()
        assert now.get(name, "base") != source
        now[name] = source


@pytest.mark.parametrize(
    ("found", "is_whole"),
    [
        ({"exact": [{"differing": 0}, {"differing": 0}], "flip": [{"p99": 900.0}]}, True),
        ({"exact": [{"differing": 0}, {"differing": 1}]}, False),
        ({"kills": [{"kills": 50, "midway": 40, "differing": 0, "leftovers": 0}]}, True),
        ({"kills": [{"differing": 2, "leftovers": 0}]}, False),
        ({"exact": [{"differing": 0}], "kills": [{"differing": 0, "leftovers": 1}]}, False),
        ({}, True),
    ],
)
def test_what_is_wrong_or_left_over_fails_the_benchmark(found: dict[str, list[dict[str, Any]]], is_whole: bool) -> None:
    assert remaps.is_whole(found) is is_whole


def test_answers_that_differ_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(bench: Bench, rules: dict[str, str], asked: list[Question]) -> Offline:
        return Offline(dict.fromkeys(asked, (rules["a"], 1)), fingerprint=rules["a"], kernels={"isa": "avx2"})

    def answer(version: int, text: str, num_tokens: int = 1) -> StreamedAnswer:
        return StreamedAnswer(QUESTION, text=text, version=version, num_tokens=num_tokens)

    monkeypatch.setattr(exact, "offline", offline)
    bench = Bench(tmp_path, tmp_path, (), 1, random.Random(0))
    answers = [answer(1, "x"), answer(2, "y"), answer(2, "x"), answer(1, "x", num_tokens=2)]
    made = {1: Made({"a": "x"}, "x"), 2: Made({"a": "y"}, "y")}
    kernels = {"isa": "avx2"}

    def compare(num_checked: int | None = None, **others: Any) -> dict[str, Any]:
        given = {"made": made, "kernels": kernels, **others}
        return exact.compare(bench, answers, given["made"], given["kernels"], num_checked, lambda text: None)

    found = compare()
    examples = [(one["version"], one["found"], one["expected"]) for one in found.pop("examples")]
    assert examples == [(1, ["x", 2], ("x", 1)), (2, ["x", 1], ("y", 1))]
    assert found == {"versions": 2, "versions_checked": 2, "answers_checked": 4, "differing": 2}
    assert compare(1)["versions_checked"] == 1
    with raises(RuntimeError, "version 2"):
        compare(made={**made, 2: Made({"a": "y"}, "z")})
    with raises(RuntimeError, "avx512"):
        compare(kernels={"isa": "avx512"})
