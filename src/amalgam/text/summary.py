"""A text longer than a prompt → one summary: chunks at token borders, a summary of each, summaries of summaries.

In: a text, where its tokens begin, answers. Out: prompts, round after round, and the summary in the end. Whoever drives
it has each round answered at once, as a batch. Must never know: tokenizers, the engine, HTTP.

Chunks overlap and together are the whole text: nothing is lost between them, no character is cut. Summaries that do not
fit into one prompt are merged in groups, in the order of the text, until one is left.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

from amalgam.errors import RequestError

Language = Literal["en", "zh"]
CHUNK_TOKENS, OVERLAP_TOKENS, SUMMARY_TOKENS = 500, 50, 120
MIN_CHUNK_TOKENS = 16
_MAX_LETTERS = 20_000  # that a language is told from
_MIN_HAN_SHARE = 0.2  # of a Chinese text's letters: names and figures in Latin letters are part of many
_HAN = (("\u3400", "\u9fff"), ("\uf900", "\ufaff"), ("\U00020000", "\U0003ffff"))
_KANA = ("\u3040", "\u30ff")


@dataclass(frozen=True)
class Chunk:
    """A part of a text, `text[start:end]`; its tokens are those of the whole text."""

    start: int
    end: int
    num_tokens: int


class Answer(NamedTuple):
    """What a prompt was answered with: new text only."""

    text: str
    num_tokens: int


@dataclass(frozen=True)
class Summary:
    """Of a whole text.

    Attributes:
        chunks: the summary of each, in order.
        num_merges: rounds of merging that they took.
    """

    text: str
    chunks: tuple[str, ...]
    num_merges: int


Rounds = Generator[list[str], Sequence[Answer], Summary]


def check_sizes(chunk_tokens: int, overlap_tokens: int) -> None:
    """
    Raises:
        RequestError: a chunk is too small, or the next one would not begin behind it.
    """
    if chunk_tokens < MIN_CHUNK_TOKENS:
        raise RequestError(
            f"chunk_tokens is {chunk_tokens}.", remedy=f"Allowed: at least {MIN_CHUNK_TOKENS}.", param="chunk_tokens"
        )
    if not 0 <= overlap_tokens < chunk_tokens:
        raise RequestError(
            f"overlap_tokens is {overlap_tokens} and chunk_tokens {chunk_tokens}.",
            remedy="Allowed: from 0 to less than a chunk.",
            param="overlap_tokens",
        )


def num_chunks(num_tokens: int, chunk_tokens: int, overlap_tokens: int) -> int:
    """How many chunks `cut` makes."""
    step = chunk_tokens - overlap_tokens
    return 1 + max(0, -(-(num_tokens - chunk_tokens) // step)) if num_tokens else 0


def cut(starts: Sequence[int], num_chars: int, chunk_tokens: int, overlap_tokens: int) -> list[Chunk]:
    """Chunks of at most `chunk_tokens` tokens, each of which repeats the last `overlap_tokens` of the one before.

    Args:
        starts: the character that each token begins in.
        num_chars: of the text.
    """
    borders = [0, *accumulate(starts[1:], max), num_chars]
    num_tokens, begin, chunks = len(starts), 0, list[Chunk]()
    while begin < num_tokens:
        end = min(begin + chunk_tokens, num_tokens)
        chunks.append(Chunk(borders[begin], borders[end], end - begin))
        if end == num_tokens:
            break
        begin = end - overlap_tokens
    return chunks


def language_of(text: str) -> Language:
    """Which of our languages to ask in: Chinese for a Chinese text, and English for any other."""
    letters = [letter for letter in text[:_MAX_LETTERS] if letter.isalpha()]
    num_han = sum(any(low <= letter <= high for low, high in _HAN) for letter in letters)
    num_kana = sum(_KANA[0] <= letter <= _KANA[1] for letter in letters)
    return "zh" if num_han > max(_MIN_HAN_SHARE * len(letters), num_kana) else "en"


def summarizing(text: str, chunks: Sequence[Chunk], language: Language, chunk_tokens: int) -> Rounds:
    """Yields the prompts of each round, and is sent their answers, in order; returns the summary.

    Args:
        chunk_tokens: how many tokens of summaries are merged at once, at most, if that is two of them.
    """
    asked = _PROMPTS[language]
    answers = yield [asked.of_chunk(text[chunk.start : chunk.end]) for chunk in chunks]
    parts = [Answer(answer.text.strip(), answer.num_tokens) for answer in answers]
    of_chunks = tuple(part.text for part in parts)
    left = [part for part in parts if part.text]
    num_merges = 0
    while len(left) > 1:
        groups = _groups(left, chunk_tokens)
        merged = iter((yield [asked.of_summaries([part.text for part in group]) for group in groups if len(group) > 1]))
        after = [next(merged) if len(group) > 1 else group[0] for group in groups]
        left = [Answer(part.text.strip(), part.num_tokens) for part in after]
        left = [part for part in left if part.text]
        num_merges += 1
    return Summary(left[0].text if left else "", of_chunks, num_merges)


def _groups(parts: Sequence[Answer], max_tokens: int) -> list[list[Answer]]:
    """Neighbours that fit into one prompt, and always two: each round leaves half as many at most, and one more."""
    groups: list[list[Answer]] = []
    size = 0
    for part in parts:
        if groups and (len(groups[-1]) < 2 or size + part.num_tokens <= max_tokens):
            groups[-1].append(part)
            size += part.num_tokens
        else:
            groups.append([part])
            size = part.num_tokens
    return groups


@dataclass(frozen=True)
class _Prompts:
    """What a model is asked for, in one language."""

    chunk: str
    summaries: str
    part: str
    end: str

    def of_chunk(self, text: str) -> str:
        return f"{self.chunk}\n\n{text}\n\n{self.end}"

    def of_summaries(self, texts: Sequence[str]) -> str:
        parts = "\n\n".join(self.part.format(number) + text for number, text in enumerate(texts, 1))
        return f"{self.summaries}\n\n{parts}\n\n{self.end}"


_PROMPTS: dict[Language, _Prompts] = {
    "en": _Prompts(
        "Summarize the following part of a text in at most three sentences, in the language of the text. Keep its "
        "subject, names and numbers, and add nothing.",
        "These are summaries of the parts of one text, in order. Write one summary of the whole text from them, in at "
        "most five sentences and in their language. Keep names and numbers, and add nothing.",
        "Part {}: ",
        "Summary:",
    ),
    "zh": _Prompts(
        "请概括下面这段文字，最多三句话。保留主题、人名和数字，不要添加原文没有的内容。",
        "以下是同一篇文章各部分的摘要，按原文顺序排列。请据此写出全文的摘要，最多五句话。保留人名和数字，不要添加内容。",
        "第{}部分：",
        "摘要：",
    ),
}
