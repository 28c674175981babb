"""What a file of named arrays offers, whatever its container.

In: a name, and what the array should be. Out: the array. Must never know what the arrays mean.

What the file claims is held against what is expected before anything is read, so that a small file cannot take much
memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class ArrayFile(ABC):
    """Named arrays, and texts beside them, of a file that somebody else may have made."""

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether there is an array of that name."""

    @abstractmethod
    def header(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape that the file claims.

        Raises:
            ValueError: it is absent, or no array of numbers.
        """

    @abstractmethod
    def text(self, name: str, max_bytes: int) -> bytes:
        """A text in UTF-8.

        Raises:
            ValueError: it is absent, or longer than `max_bytes`.
        """

    @abstractmethod
    def _load(self, name: str) -> npt.NDArray[Any]:
        """The array; it need not be writable."""

    def read(self, name: str, shape: Sequence[int], kinds: str) -> npt.NDArray[Any]:
        """
        Args:
            shape: what it must be.
            kinds: what its type may be, as numpy calls them: `i`, `u`, `f`.

        Raises:
            ValueError: it is absent, damaged, or something else.
        """
        dtype, found = self.header(name)
        if found != tuple(shape) or dtype.kind not in kinds:
            raise ValueError(f"{name} has shape {found} and type {dtype}, not {tuple(shape)}")
        return self._load(name)
