"""Texts that a model is measured on.

In: files. Out: `Window`s, runs of tokens that are computed as one prompt each. Must never know: models, plans.

A file is a domain, named as the file, or as `NAME=FILE` says. A `.json` file holds a list, a `.jsonl` file one line for
each document: a text, or an object with one under `text`. Any other file is one document.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amalgam.base.strict_json import parse_json
from amalgam.errors import ConfigError, describe
from amalgam.text.tokenizer import Tokenizer

MAX_FILE_BYTES = 2**30
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
        num_bytes: of the text that the tokens from the second on stand for, about; for bits per byte.
    """

    domain: str
    unit: int
    token_ids: tuple[int, ...]
    num_bytes: float


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
        found = [Document(name, text) for text in _read(file) if text.strip()]
        if not found:
            raise ConfigError(f"{file} holds no text.", remedy="Give a file with text in it.")
        documents += found
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
        max_tokens: of all windows; documents are then drawn at random, as many tokens from each domain.

    Raises:
        ConfigError: no document has two tokens.
        RequestError: a text holds lone surrogates.
    """
    domains = list(dict.fromkeys(document.domain for document in documents))
    generator = random.Random(seed)
    chosen: list[tuple[int, Window]] = []
    share = None if max_tokens is None else max(_MIN_TOKENS, max_tokens // len(domains))
    for domain in domains:
        numbers = [number for number, document in enumerate(documents) if document.domain == domain]
        if share is not None:
            generator.shuffle(numbers)
        left = share
        for number in numbers:
            if left is not None and left < _MIN_TOKENS:
                break
            for piece in _windows(documents[number], number, tokenizer, window, left):
                chosen.append((number, piece))
                left = None if left is None else left - len(piece.token_ids)
    if not chosen:
        raise ConfigError("The texts have no document of two tokens.", remedy="Give more text.")
    windows = [piece for _, piece in sorted(chosen, key=lambda item: item[0])]
    is_few = {domain: len({w.unit for w in windows if w.domain == domain}) < MIN_DOCUMENTS for domain in domains}
    kinds = {"windows" if is_few[window_.domain] else "documents" for window_ in windows}
    numbered = (
        replace(piece, unit=len(documents) + number) if is_few[piece.domain] else piece
        for number, piece in enumerate(windows)
    )
    return Sample(tuple(numbered), " and ".join(sorted(kinds)))


def _windows(document: Document, number: int, tokenizer: Tokenizer, window: int, most: int | None) -> Iterator[Window]:
    num_tokens = 0
    size = len(document.text.encode())
    ids = tokenizer.encode(document.text)
    per_token = size / max(1, len(ids))
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        if most is not None:
            piece = piece[: most - num_tokens]
        if len(piece) < _MIN_TOKENS:
            return
        num_tokens += len(piece)
        yield Window(document.domain, number, tuple(piece), per_token * (len(piece) - 1))


def _read(file: Path) -> list[str]:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file} has more than {MAX_FILE_BYTES} bytes.", remedy="Give a part of it.")
        raw = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read {str(file)!r}: {error.strerror or error}.", remedy="Name a text.") from None
    try:
        if file.suffix == ".json":
            value = parse_json(raw)
            if not isinstance(value, list):
                raise ValueError("it is no list")
            return [_text(item, number) for number, item in enumerate(value)]
        if file.suffix == ".jsonl":
            lines = raw.splitlines()
            return [_text(parse_json(line), number) for number, line in enumerate(lines) if line.strip()]
        return [raw.decode()]
    except ValueError as error:
        raise ConfigError(
            f"{file} is no text: {error}.", remedy="Give UTF-8: .txt, .jsonl, or a .json list of texts."
        ) from None


def _text(item: Any, number: int) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise ValueError(f"document {number} is {describe(item)}, neither a text nor an object with one under 'text'")
    return text
