"""Questions of files and of lengths."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from amalgam.errors import ConfigError
from amalgam.tools.load import datasets
from amalgam.tools.load.client import Client, Question
from amalgam.tools.load.datasets import Lengths, Measure, from_file, synthetic
from amalgam.tools.load.http import Address
from tests.errors import raises

SHARE_GPT = {
    "id": "x",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "I."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "So."},
    ],
}
ROLES = ["system", "user", "assistant", "user"]


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_prompts_have_their_lengths_and_share_what_they_are_told() -> None:
    measure = Measure(base=3, per_word=2)
    questions = list(islice(synthetic(Lengths(103, 203), Lengths(5, 9), measure, shared_prefix=43, seed=1), 50))
    words = [str(question.prompt).split() for question in questions]
    assert {len(found) for found in words} <= set(range(50, 101)) and len({len(found) for found in words}) > 10
    assert len({tuple(found[:20]) for found in words}) == 1, "(43 - 3) / 2 words are shared"
    assert len({tuple(found[20:24]) for found in words}) > 40
    assert {question.num_tokens for question in questions} == {5, 6, 7, 8, 9}
    again = list(islice(synthetic(Lengths(103, 203), Lengths(5, 9), measure, shared_prefix=43, seed=1), 50))
    assert again == questions


def test_several_beginnings() -> None:
    questions = islice(
        synthetic(Lengths(30, 30), Lengths(1, 1), Measure(), shared_prefix=20, num_prefixes=3, seed=0), 60
    )
    assert len({tuple(str(question.prompt).split()[:20]) for question in questions}) == 3


def test_a_tokenizer_makes_the_length_exact() -> None:
    """Here a word has a token for each third letter, which no measure tells before."""

    def count(text: str) -> int:
        return 1 + len(text) // 3

    questions = synthetic(Lengths(100, 140), Lengths(1, 1), Measure.of(count), shared_prefix=40, count=count)
    prompts = [str(question.prompt) for question in islice(questions, 30)]
    assert all(96 < count(prompt) <= 140 for prompt in prompts)
    (shared,) = {prompt[:100] for prompt in prompts}
    assert len(set(prompts)) == 30 and shared


def test_words_are_single_and_different() -> None:
    assert len(datasets.words(random.Random(0), 1000)) == 1000
    assert all(word.isalpha() for word in datasets.WORDS)


@pytest.mark.parametrize("is_list", [False, True])
def test_rows_of_all_kinds(tmp_path: Path, is_list: bool) -> None:
    rows = [
        "a text",
        {"prompt": "p", "output_tokens": 7},
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5},
        SHARE_GPT,
        {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "q"}},
    ]
    path = write(tmp_path / "rows", rows) if is_list else write(tmp_path / "rows", *rows)
    questions = from_file(path, "chat", Lengths(9, 9))
    assert questions[:2] == [Question("a text", 9), Question("p", 7)]
    assert [question.num_tokens for question in questions] == [9, 7, 5, 9, 9]
    assert [message["role"] for message in questions[3].prompt] == ROLES  # type: ignore[union-attr]
    assert questions[4].prompt == "q"
    assert from_file(write(tmp_path / "one", "x"), "completions", None) == [Question("x", None)]
    assert not datasets.has_messages(path) and datasets.has_messages(write(tmp_path / "two", SHARE_GPT))


BAD = {
    "no JSON": ('{"prompt": "a"}\n{', "line 2"),
    "not text": (b'"a"\n"\xff"\n', "line 2"),
    "no question": ('"a"\n5', "line 2"),
    "an empty prompt": ('""', "line 1"),
    "no user": ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1"),
    "a strange turn": ('{"conversations": [{"from": "bing", "value": "a"}]}', "bing"),
    "no length": ('{"prompt": "a", "max_tokens": 0}', "0"),
    "a number that no request can carry": ('{"body": {"prompt": "a", "seed": 1180591620717411303424}}', "line 1"),
    "nothing": ("\n\n", "rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(tmp_path: Path, case: str) -> None:
    content, named = BAD[case]
    path = tmp_path / "rows"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with raises(ConfigError, path, named):
        from_file(path, "chat", None)


def test_a_batch_file_s_row_is_asked_as_it_says(tmp_path: Path) -> None:
    body = {"model": "m", "stream": False, "messages": [{"role": "user", "content": "q"}], "temperature": 0, "n": 2}
    path = write(tmp_path / "rows", {"custom_id": "1", "body": {**body, "max_completion_tokens": 3}})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert from_file(path, "chat", None) == [Question(body["messages"], 3, {"temperature": 0, "n": 2})]  # type: ignore[arg-type]
    asked = Client(Address("http", "h", 1), "chat", "mine", fields={"temperature": 1, "top_p": 0.5}, wants_usage=False)
    assert asked.body(from_file(path, "chat", None)[0]) == {
        "model": "mine", "stream": True, "temperature": 0, "top_p": 0.5, "n": 2, "max_tokens": 3,
        "messages": body["messages"],
    }  # fmt: skip


def test_messages_are_for_chats(tmp_path: Path) -> None:
    with raises(ConfigError, "--endpoint"):
        from_file(write(tmp_path / "rows", SHARE_GPT), "completions", None)
    with raises(ConfigError, "nowhere"):
        from_file(Path("nowhere"), "chat", None)


def test_lengths() -> None:
    assert (Lengths.parse("--x", "5"), Lengths.parse("--x", "5-9")) == (Lengths(5, 5), Lengths(5, 9))
    for text in ("", "0", "9-5", "-3", "a", "5-", "1.5"):
        with raises(ConfigError, "--x"):
            Lengths.parse("--x", text)
