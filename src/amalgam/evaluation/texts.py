"""Texts that a model is measured on.

In: files. Out: `Window`s, runs of tokens that are computed as one prompt each. Must never know: models, plans.

A file is a domain, named as the file, or as `NAME=FILE` says. A `.json` file holds a list, a `.jsonl` file one line for
each document: a text, or an object with one under `text`. Any other file is one document.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from amalgam.calibration import texts as calibration_texts
from amalgam.errors import ConfigError
from amalgam.text.tokenizer import Tokenizer

DEFAULT_WINDOW = 256
MIN_DOCUMENTS = 20  # of a domain; of fewer, windows are resampled instead
_MIN_TOKENS = 2  # one to see, one to predict


@dataclass(frozen=True)
class Document:
    """One text of a domain."""

    domain: str
    text: str


@dataclass(frozen=True)
class Window:
    """Tokens that are computed as one prompt.

    Attributes:
        unit: what is resampled for confidence intervals: windows of one unit belong together.
        num_bytes: of the text that the tokens from `first` on stand for, about; for bits per byte. 0: not known.
        first: place of the first token that counts; those before it are only read.
    """

    domain: str
    unit: int
    token_ids: tuple[int, ...]
    num_bytes: float
    first: int = 1

    @property
    def num_rows(self) -> int:
        return len(self.token_ids) - self.first


@dataclass(frozen=True)
class Sample:
    """Windows of some texts.

    Attributes:
        unit: what is resampled: `documents`, `windows` of domains that have few documents, or both.
    """

    windows: tuple[Window, ...]
    unit: str

    @property
    def num_tokens(self) -> int:
        return sum(len(window.token_ids) for window in self.windows)

    @property
    def num_units(self) -> int:
        return len({window.unit for window in self.windows})

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(window.domain for window in self.windows))

    @property
    def digest(self) -> str:
        """Names the tokens."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(repr((window.domain, window.unit, window.token_ids)).encode())
        return digest.hexdigest()[:16]

    def split(self, share: float, seed: int = 0) -> tuple[Sample, Sample]:
        """Two samples without a unit in common; the second has about `share` of each domain's units."""
        generator = random.Random(seed)
        held_out: set[int] = set()
        for domain in self.domains:
            units = sorted({window.unit for window in self.windows if window.domain == domain})
            generator.shuffle(units)
            held_out.update(units[: round(share * len(units))])
        first = tuple(window for window in self.windows if window.unit not in held_out)
        second = tuple(window for window in self.windows if window.unit in held_out)
        return Sample(first, self.unit), Sample(second, self.unit)


def read_texts(files: Sequence[str]) -> list[Document]:
    """The documents of some files, each `FILE` or `NAME=FILE`.

    Raises:
        ConfigError: there is no such file, it is no text, or holds none.
    """
    if not files:
        raise ConfigError("No text is given.", remedy="Give --text FILE (.txt, .jsonl, or a .json list of texts).")
    documents: list[Document] = []
    for item in files:
        domain, equals, path = item.partition("=")
        file = Path(path if equals and not Path(item).exists() else item).expanduser()
        name = domain if equals and not Path(item).exists() else file.stem
        documents += [Document(name, text) for text in calibration_texts.read_texts(file)]
    return documents


def sample_of(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    window: int = DEFAULT_WINDOW,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Sample:
    """Cut documents into windows.

    Args:
        window: most tokens of a window.
        max_tokens: of all windows. They are then drawn at random, as many tokens of each domain, and of as many
            documents as there are.

    Raises:
        ConfigError: no document has two tokens.
        RequestError: a text holds lone surrogates.
    """
    domains = list(dict.fromkeys(document.domain for document in documents))
    chosen: list[tuple[tuple[int, int], Window]] = []
    for domain in domains:
        numbers = [number for number, document in enumerate(documents) if document.domain == domain]
        if max_tokens is None:
            for number in numbers:
                pieces = enumerate(_windows(documents[number], number, tokenizer, window))
                chosen += [((number, place), piece) for place, piece in pieces]
        else:
            share = max(_MIN_TOKENS, max_tokens // len(domains))
            chosen += _drawn(documents, numbers, tokenizer, window, share, random.Random(seed))
    if not chosen:
        raise ConfigError("The texts have no document of two tokens.", remedy="Give more text.")
    windows = [piece for _, piece in sorted(chosen, key=lambda entry: entry[0])]
    is_few = {domain: len({w.unit for w in windows if w.domain == domain}) < MIN_DOCUMENTS for domain in domains}
    kinds = {"windows" if is_few[window_.domain] else "documents" for window_ in windows}
    numbered = (
        replace(piece, unit=len(documents) + number) if is_few[piece.domain] else piece
        for number, piece in enumerate(windows)
    )
    return Sample(tuple(numbered), " and ".join(sorted(kinds)))


def _drawn(
    documents: Sequence[Document],
    numbers: Sequence[int],
    tokenizer: Tokenizer,
    window: int,
    num_tokens: int,
    generator: random.Random,
) -> Iterator[tuple[tuple[int, int], Window]]:
    """Windows at random, by document and place: one of each document, then a second one of each, and so on."""
    order = generator.sample(numbers, len(numbers))
    waiting = deque(order)
    left: dict[int, list[tuple[int, Window]]] = {}
    while waiting and num_tokens >= _MIN_TOKENS:
        number = waiting.popleft()
        if number not in left:
            left[number] = list(enumerate(_windows(documents[number], number, tokenizer, window)))
            generator.shuffle(left[number])
        if not left[number]:
            continue
        place, piece = left[number].pop()
        waiting.append(number)
        size = min(len(piece.token_ids), num_tokens)
        num_tokens -= size
        share = (size - 1) / (len(piece.token_ids) - 1)
        yield (number, place), replace(piece, token_ids=piece.token_ids[:size], num_bytes=piece.num_bytes * share)


def _windows(document: Document, number: int, tokenizer: Tokenizer, window: int) -> Iterator[Window]:
    size = len(document.text.encode())
    ids = tokenizer.encode(document.text)
    per_token = size / max(1, len(ids))
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        if len(piece) >= _MIN_TOKENS:
            yield Window(document.domain, number, tuple(piece), per_token * (len(piece) - 1))
