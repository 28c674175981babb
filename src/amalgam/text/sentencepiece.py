"""`tokenizer.model`: a SentencePiece model, from its bytes to the keys under which a GGUF file has the same tables.

In: the bytes of a `ModelProto` (sentencepiece_model.proto of google/sentencepiece). Out: a dictionary for
`gguf.metadata.build_tokenizer`. Must never know: files, configurations.

Only what generative models publish: BPE over text that is not normalized.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NoReturn

from amalgam.errors import CheckpointError, UnsupportedError, describe

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2


def read_model(data: bytes, where: str) -> dict[str, Any]:
    """
    Args:
        where: the file, for messages.

    Raises:
        CheckpointError: this is no SentencePiece model.
        UnsupportedError: it normalizes or cuts text in a way that is not implemented.
    """
    try:
        return _Model(data, where).keys()
    except (IndexError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{where} is not a SentencePiece model: {describe(str(error), 200)}.",
            remedy="Add the published tokenizer.json, or copy the file again.",
        ) from None


class _Model:
    def __init__(self, data: bytes, where: str) -> None:
        self._where = where
        self._tokens: list[str] = []
        self._scores: list[float] = []
        self._types: list[int] = []
        self._trainer: dict[int, Any] = {}
        self._normalizer: dict[int, Any] = {}
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(_message(value)))
                self._tokens.append(_message(piece.get(1, b"")).decode())
                self._scores.append(struct.unpack("<f", _message(piece.get(2, bytes(4))))[0])
                self._types.append(piece.get(3, 1))
            elif field == 2:
                self._trainer = dict(_fields(_message(value)))
            elif field == 3:
                self._normalizer = dict(_fields(_message(value)))
        if not self._tokens:
            raise ValueError("it has no pieces")

    def keys(self) -> dict[str, Any]:
        if (kind := self._trainer.get(3, 1)) != _BPE:
            self._unsupported("trainer_spec.model_type", kind, f"{_BPE} (BPE)")
        if self._trainer.get(24, 0):
            self._unsupported("trainer_spec.treat_whitespace_as_suffix", True, "false")
        if rules := self._normalizer.get(2, b""):
            self._unsupported("normalizer_spec.precompiled_charsmap", f"{len(rules)} bytes", "no normalization")
        if self._normalizer.get(4, 1):
            self._unsupported("normalizer_spec.remove_extra_whitespaces", True, "false")
        if not self._normalizer.get(5, 1):
            self._unsupported("normalizer_spec.escape_whitespaces", False, "true")
        found = {
            "model": "llama",
            "tokens": self._tokens,
            "scores": self._scores,
            "token_type": self._types,
            "add_space_prefix": bool(self._normalizer.get(3, 1)),
        }
        for name, field, default in (("unknown", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("padding", 43, -1)):
            token_id = self._trainer.get(field, default)
            if 0 <= token_id < len(self._tokens):
                found[f"{name}_token_id"] = token_id
        return {f"tokenizer.ggml.{name}": value for name, value in found.items()}

    def _unsupported(self, name: str, value: Any, known: str) -> NoReturn:
        raise UnsupportedError(
            f"{self._where} has {name} = {describe(value)}; known: {known}.",
            remedy="Add the published tokenizer.json, or make one with transformers.",
        )


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes belong")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: varints as integers, all else as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, position = _varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"a field of wire type {wire}")
        if size > len(data) - position:
            raise ValueError("a field is longer than the file")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value - 2**64 if value >= 2**63 else value), position
        shift += 7
    raise ValueError("a number of more than ten bytes")
