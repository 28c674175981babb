"""Long texts in chunks: nothing lost between them, and summaries merged until one is left."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from amalgam.errors import RequestError
from amalgam.text import pieces
from amalgam.text.summary import Answer, Chunk, Rounds, Summary, check_sizes, cut, language_of, num_chunks, summarizing
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO
from tests.errors import raises


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(DEMO))


def starts_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [start for piece in tokenizer.token_starts_by_piece(text) for start in piece]


def whole(text: str, chunks: list[Chunk]) -> str:
    """The text put together again; what chunks share stands in it once."""
    assert all(before.end >= after.start for before, after in pairwise(chunks))
    return "".join(text[max(chunk.start, before) : chunk.end]
                   for before, chunk in zip([0, *(chunk.end for chunk in chunks)], chunks, strict=False))  # fmt: skip


TEXTS = {
    "english": "The old man looked at the sea.  He had been there for years,\n\n\tand knew 17 of its tides. " * 40,
    "chinese": "明月几时有？把酒问青天。𠮷野家，不知天上宫阙，今夕是何年。" * 60,
    "mixed": "naïve café 👩‍👩‍👧 עברית ไทย 😀 def f(x):\n    return x\r\n" * 60,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(("size", "overlap"), [(500, 50), (16, 15), (16, 0), (97, 31), (100_000, 1)])
def test_nothing_is_lost_at_a_border(name: str, size: int, overlap: int, tokenizer: Tokenizer) -> None:
    text = TEXTS[name]
    starts = starts_of(tokenizer, text)
    num_tokens = len(tokenizer.encode(text))
    assert len(starts) == num_tokens
    chunks = cut(starts, len(text), size, overlap)
    assert whole(text, chunks) == text
    assert len(chunks) == num_chunks(num_tokens, size, overlap)
    assert all(chunk.num_tokens == size for chunk in chunks[:-1]) and 0 < chunks[-1].num_tokens <= size
    assert sum(chunk.num_tokens for chunk in chunks) - overlap * (len(chunks) - 1) == num_tokens
    for chunk in chunks[1:]:  # cut where a token begins, and so between characters
        assert chunk.start in starts


def test_chunks_are_the_same_however_the_text_is_read(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXTS["chinese"] + TEXTS["english"] + TEXTS["mixed"]
    expected = starts_of(tokenizer, text)
    monkeypatch.setattr(pieces, "PIECE_CHARS", 1024)
    monkeypatch.setattr(pieces, "OVERLAP_CHARS", 256)
    assert starts_of(tokenizer, text) == expected
    with raises(RequestError, "surrogate"):
        starts_of(tokenizer, "\ud800")


def test_overlap_below_the_chunk() -> None:
    check_sizes(500, 499)
    for size, overlap in ((500, 500), (500, 501), (500, -1)):
        with raises(RequestError, size, overlap):
            check_sizes(size, overlap)
    with raises(RequestError, 15, 16):
        check_sizes(15, 0)


def answered(rounds: Rounds, num_tokens: int = 10) -> tuple[list[list[str]], Summary]:
    """Every prompt is answered with its number."""
    asked, count = [next(rounds)], 0
    while True:
        answers = [Answer(f" s{count + index}\n", num_tokens) for index in range(len(asked[-1]))]
        count += len(answers)
        try:
            asked.append(rounds.send(answers))
        except StopIteration as end:
            return asked, end.value


def test_summaries_are_merged_in_order_until_one_is_left() -> None:
    text = "".join(map(chr, range(65, 65 + 26)))
    chunks = [Chunk(index, index + 2, 2) for index in range(9)]
    asked, summary = answered(summarizing(text, chunks, "en", 30))
    assert [len(prompts) for prompts in asked] == [9, 3, 1]
    assert all(text[chunk.start : chunk.end] in prompt for chunk, prompt in zip(chunks, asked[0], strict=True))
    assert [word for prompt in asked[1] for word in prompt.split() if word[0] == "s" and word[1:].isdigit()] == [
        f"s{index}" for index in range(9)
    ]
    assert summary == Summary("s12", tuple(f"s{index}" for index in range(9)), 2)


def test_two_summaries_are_merged_however_long_they_are() -> None:
    chunks = [Chunk(0, 1, 1)] * 7
    asked, summary = answered(summarizing("x", chunks, "zh", 16), num_tokens=1000)
    assert [len(prompts) for prompts in asked] == [7, 3, 2, 1]  # who is left over waits for the next round
    assert summary.text == "s12" and summary.num_merges == 3
    assert "摘要" in asked[0][0]


def test_one_chunk_is_not_merged_and_empty_answers_count_for_nothing() -> None:
    asked, summary = answered(summarizing("x", [Chunk(0, 1, 1)], "en", 500))
    assert [len(prompts) for prompts in asked] == [1] and summary == Summary("s0", ("s0",), 0)
    rounds = summarizing("x", [Chunk(0, 1, 1)] * 3, "en", 500)
    next(rounds)
    with pytest.raises(StopIteration) as end:
        rounds.send([Answer(" ", 1), Answer("only", 1), Answer("", 0)])
    assert end.value.value == Summary("only", ("", "only", ""), 0)
    rounds = summarizing("x", [Chunk(0, 1, 1)] * 2, "en", 500)
    next(rounds)
    with pytest.raises(StopIteration) as end:
        rounds.send([Answer("", 1), Answer("", 0)])
    assert end.value.value.text == ""


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The old man", "en"), ("明月几时有", "zh"), ("使用 Mixtral-8x7B 模型 (MoE) 的推理任务", "zh"),
        ("The word 月 means moon, and so on.", "en"), ("これは日本語の文章です", "en"), ("1234 !?", "en"),
        ("Привет", "en"), ("𠮷𠮷", "zh"),
    ],
)  # fmt: skip
def test_the_language_of_a_text(text: str, language: str) -> None:
    assert language_of(text) == language


def test_random_texts_are_put_together_again(tokenizer: Tokenizer) -> None:
    chooser = random.Random(5)
    for _ in range(30):
        text = "".join(chr(chooser.choice((32, 10, 65, 233, 0x4E2D, 0x1F600, 0x301))) for _ in range(200))
        size = chooser.randint(16, 60)
        chunks = cut(starts_of(tokenizer, text), len(text), size, chooser.randint(0, size - 1))
        assert whole(text, chunks) == text
