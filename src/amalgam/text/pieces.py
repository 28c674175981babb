"""Long texts → token ids, a piece at a time, and how few tokens a text can have at least.

In: a tokenizer of the tokenizers library, a text. Out: exactly the ids that the whole text has, or where its tokens
begin, in portions of bounded work and memory. Must never know: models, requests, HTTP.

A tokenizer takes a megabyte of text in a second, with a hundred times as much memory, and cannot be interrupted. Pieces
overlap: where one ends, its last tokens may be wrong, and where the next one begins, its first. In between, both must
give the same tokens at the same places, and there the one is joined to the other. Where they do not, the piece grows.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PIECE_CHARS = 1 << 15
OVERLAP_CHARS = 1 << 12
_NUM_AGREED = 16  # tokens in a row that two pieces must have in common
_NUM_STARTS = 4  # tokens of a piece at which the next one is tried to begin

# How many times fewer bytes a normalizer may leave, and the pre-tokenizers that leave nothing out; none else is known.
_SHRINKAGE = {"NFC": 3, "NFD": 3, "NFKC": 6, "NFKD": 6, "Lowercase": 3, "Prepend": 1, "ByteLevel": 1}
_COMPLETE_SPLITS = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}


def token_ids_by_piece(backend: Any, text: str) -> Iterator[list[int]]:
    """The ids of a text without the tokens around it, in portions that together are those of the whole text."""
    for piece, first, end in _parts_of(backend, text):
        yield piece.ids[first:end]


def token_starts_by_piece(backend: Any, text: str) -> Iterator[list[int]]:
    """For each of the same tokens the character that it begins in: several tokens may spell one character."""
    for piece, first, end in _parts_of(backend, text, needs_places=True):
        yield piece.starts[first:end]


def _parts_of(backend: Any, text: str, *, needs_places: bool = False) -> Iterator[tuple[Piece, int, int]]:
    """Pieces, and which of their tokens together are the text's."""
    piece, first = Piece(backend, text, 0, PIECE_CHARS, needs_places=needs_places), 0
    while piece.end < len(text):
        joint = _next_piece(backend, text, piece)
        if joint is None:
            cut = piece.starts[first]
            piece = Piece(backend, text, piece.start, 2 * (piece.end - piece.start), needs_places=needs_places)
            first = bisect_left(piece.starts, cut)
            continue
        yield piece, first, joint[1]
        piece, _, first = joint
    yield piece, first, len(piece.ids)


class Piece:
    """Tokens of a part of a text; `starts` and `ends` are their places in the text."""

    def __init__(self, backend: Any, text: str, start: int, num_chars: int, *, needs_places: bool = False) -> None:
        self.start = start
        self.end = min(start + num_chars, len(text))
        if start == 0 and self.end == len(text) and not needs_places:  # nothing to be joined
            self.ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            self.starts, self.ends = [0] * len(self.ids), [0] * len(self.ids)
            return
        # Unlike `encode`, the batch calls let other threads run meanwhile.
        encoding = backend.encode_batch([text[start : self.end]], add_special_tokens=False)[0]
        self.ids = encoding.ids
        self.starts = [start + begin for begin, _ in encoding.offsets]
        self.ends = [start + end for _, end in encoding.offsets]

    def begins_character(self, index: int) -> bool:
        """Whether no character has tokens both before `index` and from it on."""
        return index == 0 or self.starts[index] >= self.ends[index - 1]


def _next_piece(backend: Any, text: str, piece: Piece) -> tuple[Piece, int, int] | None:
    """The piece after `piece`, and the token of each from which on the later one is right; None if there is none."""
    index = bisect_left(piece.starts, piece.end - OVERLAP_CHARS, lo=1)
    tried = 0
    while index < len(piece.ids) and tried < _NUM_STARTS:
        if piece.begins_character(index) and piece.starts[index] > piece.start:
            following = Piece(backend, text, piece.starts[index], piece.end - piece.start)
            if (joint := _joint(piece, index, following)) is not None:
                return (following, *joint)
            tried += 1
        index += 1
    return None


def _joint(piece: Piece, index: int, following: Piece) -> tuple[int, int] | None:
    """Where to cut two pieces: the middle of the first row of tokens, from `index` on, that they have in common."""
    other = num_agreed = 0
    while index < len(piece.ids) and other < len(following.ids):
        here, there = piece.starts[index], following.starts[other]
        same_place = here == there and piece.ends[index] == following.ends[other]
        if same_place and piece.ids[index] == following.ids[other]:
            num_agreed += 1
            cut, other_cut = index - num_agreed // 2, other - num_agreed // 2
            if num_agreed >= _NUM_AGREED and piece.begins_character(cut) and following.begins_character(other_cut):
                return cut, other_cut
            index, other = index + 1, other + 1
            continue
        num_agreed = 0
        index, other = index + (here <= there), other + (there <= here)
    return None


def surrounding_ids(backend: Any) -> tuple[list[int], list[int]] | None:
    """The ids that the tokenizer puts before and after every text; None if they are not told apart from a text's."""
    inner = backend.encode("x", add_special_tokens=False).ids
    outer = backend.encode("x", add_special_tokens=True).ids
    for start in range(len(outer) - len(inner) + 1):
        end = start + len(inner)
        if outer[start:end] == inner and not set(outer[:start] + outer[end:]) & set(inner):
            return outer[:start], outer[end:]
    return None


class LengthBound:
    """How few tokens a text can have, told from its bytes alone; nothing is told where a tokenizer drops text."""

    def __init__(self, backend: Any) -> None:
        added = backend.get_added_tokens_decoder().values()
        self._counts_spaces = not any(token.lstrip or token.rstrip for token in added)
        normalizer = _state(backend.normalizer)
        shrinkage = _shrinkage(normalizer)
        longest = _longest_piece(backend, [*_parts(normalizer), *_parts(_state(backend.pre_tokenizer))])
        self._bytes_per_token: float | None = None
        if shrinkage is not None and longest is not None:
            self._bytes_per_token = max([longest * shrinkage, *(len(token.content.encode()) for token in added)])

    def min_tokens(self, text: str) -> int:
        """Never more than the tokens that `text` has."""
        if self._bytes_per_token is None:
            return 0
        if not self._counts_spaces:  # a token may take any number of them along
            text = re.sub(r"\s+", "", text)
        return math.ceil(len(text.encode()) / self._bytes_per_token)


def _state(component: Any) -> Any:
    """A component's own description; None if there is none."""
    return None if component is None else json.loads(component.__getstate__())


def _shrinkage(normalizer: Any) -> float | None:
    """How many times fewer bytes than the text the normalizer may leave; None: unknown."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        factors = [_shrinkage(part) for part in normalizer["normalizers"]]
        known = [factor for factor in factors if factor is not None]
        return math.prod(known) if len(known) == len(factors) else None
    if kind == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        return max(1.0, len(pattern.encode()) / len(content.encode())) if pattern and content else None
    return _SHRINKAGE.get(kind)


def _longest_piece(backend: Any, parts: Sequence[Mapping[str, Any]]) -> int | None:
    """Most bytes that the model makes one token of; None if some characters give none, or many of them one."""
    if type(backend.model).__name__ != "BPE" or not all(map(_leaves_nothing_out, parts)):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if backend.model.byte_fallback:
        is_complete = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        return max(len(piece.encode()) for piece in vocabulary) if is_complete else None
    if any(part["type"] == "ByteLevel" for part in parts) and vocabulary.keys() >= _byte_letters():
        return max(map(len, vocabulary))  # a letter is a byte
    return None


def _byte_letters() -> set[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for part in component.get("pretokenizers") or component.get("normalizers") or ():
        yield from _parts(part)


def _leaves_nothing_out(part: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer keeps all text; of normalizers, `_shrinkage` knows."""
    kind = part["type"]
    if kind in ("Split", "Punctuation"):
        return bool(part["behavior"] != "Removed")
    return kind in _COMPLETE_SPLITS or kind in _SHRINKAGE or kind == "Replace"
