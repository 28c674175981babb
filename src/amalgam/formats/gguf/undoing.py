"""What undoes the changes that llama.cpp's converter makes to the values of float32 tensors.

In: a stored tensor. Out: the published values. Must never know: names, architectures. What these undo, `placing.py`
does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

Arrange = Callable[[Tensor], Tensor]


def without_one(stored: Tensor) -> Tensor:
    return stored - 1.0


def flat(stored: Tensor) -> Tensor:
    """Numbers of heads or channels, of which the converter makes a column or rows for each group."""
    return stored.flatten()


def logarithm(stored: Tensor) -> Tensor:
    """The converter writes -exp(A_log)."""
    return torch.log(-stored.flatten())


def logarithm_of_rate(stored: Tensor) -> Tensor:
    """The converter writes exp(A_log), as a column."""
    return torch.log(stored.flatten())


def apart(stored: Tensor) -> Tensor:
    """A depthwise convolution has one input per channel, whose dimension the converter leaves out."""
    return stored.view(stored.shape[0], 1, -1)


def of_channels(stored: Tensor) -> Tensor:
    """The same, with ones before and behind the channels; who quantizes a file leaves out those before."""
    return stored.view(-1, 1, stored.shape[-1])


# What becomes of a shape; of others it stays.
SHAPES: Mapping[Arrange, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    apart: lambda shape: (*shape[:1], 1, *shape[1:]),
    of_channels: lambda shape: (prod(shape[:-1]), 1, *shape[-1:]),
    flat: lambda shape: (prod(shape),),
    logarithm: lambda shape: (prod(shape),),
    logarithm_of_rate: lambda shape: (prod(shape),),
}
