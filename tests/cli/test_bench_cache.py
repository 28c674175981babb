"""`amalgam bench cache`: the same tokens both ways, and how many went through the model for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import DEMO

from amalgam.cli import main
from amalgam.tools.bench_cache import tokens_computed


def test_tokens_that_go_through_the_model() -> None:
    """As they are added up one by one; a hundred tokens from nothing are the textbook's 1 + 2 + … + 100."""
    for prompt, new in ((1, 100), (16, 128), (700, 50), (5, 1)):
        without = sum(prompt + index for index in range(new))
        assert tokens_computed(prompt, new) == (prompt + new - 1, without)
    assert tokens_computed(1, 100) == (100, 5050)


def test_both_ways_give_the_same_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "cache.html"
    sizes = ("--prompts", "8,24", "--num-tokens", "5", "--repeats", "1", "--inference.dtype", "float32")
    guesses = ("--speculation.kind", "draft", "--speculation.draft", "nowhere")  # which are not made
    assert main(["bench", "cache", "--model", str(DEMO), *sizes, *guesses, "--out", str(page)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["num_equal"] == report["num_compared"] == 10
    rows = [(row["num_prompt_tokens"], row["num_new_tokens"]) for row in report["rows"]]
    assert rows == [(prompt, new) for prompt in (8, 24) for new in (1, 2, 4, 5)]
    for row in report["rows"]:
        assert 0 < row["with_seconds"] and 0 < row["without_seconds"] and row["ratio"] > 0
    assert [step["num_tokens"] for step in report["steps"]] == [10, 26]
    assert any("24\t5" in line for line in table)
    assert "prompt of 24, measured" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", str(DEMO), "--num-tokens", "9999999"], "inference.max_seq_length"),
        (["--model", str(DEMO), "--prompts", "none"], "--prompts"),
        ([], "--shape"),
        (["--model", str(DEMO), "--weights", "int4"], "--weights"),
        (["--shape", "XXL"], "XXL"),
    ],
)
def test_mistakes(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cache", *arguments]) == 2
    assert named in capsys.readouterr().err
