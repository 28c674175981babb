"""The choice of next tokens in compiled code.

In: logits on the CPU and what each row wants. Out: token ids. Must never know: requests, the step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension

if TYPE_CHECKING:
    from amalgam import _native

# How `draw` chooses a row's next token: ((top_k, temperature, top_p, min_p), seed, place).
#     top_k: 0, or as many as the vocabulary has or more: no limit
#     temperature: 0 takes the first of the largest logits, and the rest is not used
#     top_p, min_p: shares, as in `SamplingParams`
#     seed, place: of the number that decides; 0 to 2^64 - 1 each
DrawParams = tuple[tuple[int, float, float, float], int, int]


def draw(logits: Tensor, rows: Sequence[DrawParams]) -> list[int]:
    """The next token of each row of contiguous logits, float32 `[rows, vocabulary]`; -1 where one is not finite.

    Raises:
        ValueError: types, shapes or a `top_k` that do not fit.
    """
    return _draw()(extension.kernels(), logits, rows, torch.get_num_threads())


@functools.cache
def _draw() -> Callable[[_native.Kernels, Tensor, Sequence[DrawParams], int], list[int]]:
    # Imported once: the weights have just driven the interpreter's code out of the caches, and every call costs more.
    from amalgam import _native

    return _native.draw
