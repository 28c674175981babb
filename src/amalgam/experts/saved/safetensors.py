"""Arrays in a safetensors file, texts in its metadata.

In: arrays, or a file's bytes. Out: a file's bytes, or arrays. Must never know what they mean.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from amalgam.checkpoint.safetensors_header import PREFIX_BYTES, SMALL_HEADER_BYTES, parse_header
from amalgam.experts.saved.arrays import ArrayFile

_MAX_HEADER_BYTES = 4 * 2**20


class SafetensorsFile(ArrayFile):
    """A file whose header is parsed by the parser of checkpoints, which refuses.

    Raises:
        ValueError, CheckpointError: it is none, or damaged.
    """

    def __init__(self, content: bytes) -> None:
        if int.from_bytes(content[:PREFIX_BYTES], "little") > _MAX_HEADER_BYTES:
            raise ValueError(f"it announces a header of more than {_MAX_HEADER_BYTES} bytes")
        entries, self._texts = parse_header(io.BytesIO(content), Path("it"))
        self._entries = {entry.name: entry for entry in entries}
        self._content = memoryview(content)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def header(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        if name not in self:
            raise ValueError(f"it has no {name}")
        entry = self._entries[name]
        try:
            return np.dtype(str(entry.dtype).removeprefix("torch.")).newbyteorder("<"), entry.shape
        except TypeError:
            raise ValueError(f"{name} is {entry.dtype}") from None

    def text(self, name: str, max_bytes: int) -> bytes:
        if name not in self._texts:
            raise ValueError(f"it has no {name}")
        text = self._texts[name].encode()
        if len(text) > max_bytes:
            raise ValueError(f"{name} takes {len(text)} bytes")
        return text

    def _load(self, name: str) -> npt.NDArray[Any]:
        (dtype, shape), entry = self.header(name), self._entries[name]
        assert entry.offset is not None
        return np.frombuffer(self._content[entry.offset : entry.offset + entry.nbytes], dtype).reshape(shape)


def write_safetensors(arrays: Mapping[str, npt.NDArray[Any]], texts: Mapping[str, bytes]) -> bytes:
    """A file's content. Integers above zero take the narrowest type that holds them: most counts of pairs are small."""
    narrow = {name: np.asarray(_narrowed(array), order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(narrow, {name: text.decode() for name, text in texts.items()})


def header_sizes(content: bytes) -> tuple[int, int]:
    """The bytes of a written file's header, and the most that a reader takes before that much data."""
    num_bytes = int.from_bytes(content[:PREFIX_BYTES], "little")
    return num_bytes, min(_MAX_HEADER_BYTES, max(SMALL_HEADER_BYTES, len(content) - PREFIX_BYTES - num_bytes))


def _narrowed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype.kind not in "iu" or (array < 0).any():
        return array
    return array.astype(np.min_scalar_type(array.max(initial=0)))
