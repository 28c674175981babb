"""Texts to calibrate or measure with → token ids.

In: files (`.json`: a list of strings; `.jsonl`: strings, or objects with `text`; others: one text each), a tokenizer.
Out: sequences of token ids. Must never know: models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amalgam.base.counting import counted
from amalgam.base.strict_json import parse_json
from amalgam.errors import ConfigError, describe
from amalgam.text.tokenizer import Tokenizer

MIN_TOKENS = 1024
_MIN_SEQUENCE = 8
_MAX_FILE_BYTES = 2**30


def read_texts(file: Path) -> list[str]:
    """The texts of a file.

    Raises:
        ConfigError: it cannot be read, is not what its name says, or holds no text.
    """
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{file} is larger than 1 GiB.", remedy="Give a part of it.")
        raw = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror or error}).", remedy="Give a file of texts."
        ) from None
    texts = [text for text in _texts_of(file, raw) if text.strip()]
    if not texts:
        raise ConfigError(f"{file} holds no text.", remedy="Give a JSON list of strings, or a text file.")
    return texts


def _texts_of(file: Path, raw: bytes) -> list[str]:
    if file.suffix == ".json":
        found = _parsed(file, raw)
        if not isinstance(found, list):
            raise ConfigError(f"{file} holds no list.", remedy="Expected a JSON list of strings.")
        return [_text_of(file, item) for item in found]
    if file.suffix == ".jsonl":
        return [_text_of(file, _parsed(file, line)) for line in raw.splitlines() if line.strip()]
    try:
        return [raw.decode()]
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 at byte {error.start}.", remedy="Give a text file, .json or .jsonl."
        ) from None


def _parsed(file: Path, raw: bytes) -> Any:
    try:
        return parse_json(raw)
    except ValueError as error:
        raise ConfigError(f"{file} holds invalid JSON: {error}.", remedy="Expected strings in UTF-8.") from None


def _text_of(file: Path, item: Any) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise ConfigError(
            f"{file} holds {describe(item)}, which is no text.", remedy="Expected strings, or objects with `text`."
        )
    return text


def sequences(
    files: Sequence[Path], tokenizer: Tokenizer, *, max_tokens: int, sequence_tokens: int, min_tokens: int = MIN_TOKENS
) -> list[list[int]]:
    """Token ids of texts, as many of each file as of the others where they have so many; the same at every call.

    Texts are read in their order, and long ones cut.

    Args:
        max_tokens: of all sequences together, about.
        sequence_tokens: the longest sequence.

    Raises:
        ConfigError: see `read_texts`; or there are fewer than `min_tokens`.
    """
    found: list[list[int]] = []
    count = 0
    domains = [_pieces(read_texts(file), tokenizer, sequence_tokens) for file in files]
    spent = [0] * len(domains)
    live = set(range(len(domains)))
    while live and count < max_tokens:
        domain = min(live, key=lambda index: (spent[index], index))
        piece = next(domains[domain], None)
        if piece is None:
            live.remove(domain)
            continue
        found.append(piece[: max_tokens - count])
        spent[domain] += len(found[-1])
        count += len(found[-1])
    if count < min_tokens:
        raise ConfigError(
            f"The texts in {', '.join(map(str, files))} have {counted(count, 'token')} together.",
            remedy=f"At least {min_tokens} are needed to tell anything; 16384 and more are better.",
        )
    return [piece for piece in found if len(piece) > 1]


def _pieces(texts: Sequence[str], tokenizer: Tokenizer, longest: int) -> Iterator[list[int]]:
    for text in texts:
        token_ids = tokenizer.encode(text)
        for start in range(0, len(token_ids), longest):
            piece = token_ids[start : start + longest]
            if start == 0 or len(piece) >= _MIN_SEQUENCE:
                yield piece
