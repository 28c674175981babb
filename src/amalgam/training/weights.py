"""What of a weight is trained, and what becomes of it: leaves of autograd in, a packed weight of the same layout out.

In: packed weights in runtime layouts. Out: `Trained`. Must never know: layers, files, losses.

Whatever is stored in few bits is rounded to them on the way forward and passed by on the way back (straight-through,
Bengio et al. 2013), so that what is trained is what is served. Scales are trained as factors of what they were, codes
in units of codes, other values in units of the weight's own root mean square: one learning rate is the same share of
weights of any size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.training.codes import Range, codes_of, expanded, in_codes, nearest, with_codes

_FLOATS_OF_CODES = 128  # steps that a trained fp8 code has between 0 and the largest
_INSIDE = 0.49  # how far from a code a number may be that is rounded to it, with something to spare


class Trained(ABC):
    """One weight that learns.

    Attributes:
        parameters: by name, float32 leaves of autograd.
    """

    parameters: Mapping[str, Tensor]

    @abstractmethod
    def value(self) -> Tensor:
        """The weight as it would be served now, float32 of its logical shape; gradients go to the parameters."""

    @abstractmethod
    def packed(self) -> PackedWeight:
        """The weight as it is now, in the layout that it came in."""


class TrainedValues(Trained):
    """A floating weight, all of it.

    Args:
        weight: dense.
        rank: of a low-rank update, which is all that is trained then (Hu et al. 2022); None: every value is.
    """

    def __init__(self, weight: PackedWeight, rank: int | None = None, *, generator: torch.Generator) -> None:
        self._dtype = weight.dense.dtype
        wide = weight.dense.float()
        self._unit = float(wide.square().mean().sqrt()) or 1.0
        start = wide / self._unit
        self._start = None if rank is None else start
        self.parameters = {"values": _leaf(start)} if rank is None else _low_rank(start, rank, generator)

    def value(self) -> Tensor:
        return _rounded(self._wide(), self._dtype)

    def packed(self) -> PackedWeight:
        return dense(_stored(self._wide(), self._dtype))

    def _wide(self) -> Tensor:
        values = self.parameters["values"] if self._start is None else self._start + _product(self.parameters)
        return self._unit * values


class TrainedScales(Trained):
    """A quantized weight with its codes as they are; the scales learn (of any layout that has some)."""

    def __init__(self, weight: PackedWeight) -> None:
        self._weight = weight
        self._scales = _Scales(weight.parts["scale"])
        self.parameters = {"growth": self._scales.growth}

    def value(self) -> Tensor:
        return replace(self._weight, parts={**self._weight.parts, "scale": self._scales.value()}).unpack()

    def packed(self) -> PackedWeight:
        return replace(self._weight, parts={**self._weight.parts, "scale": self._scales.stored()})


class TrainedCodes(Trained):
    """A quantized weight whose codes are rounded anew from numbers that learn, beside its scales.

    Args:
        allowed: what codes may be.
        wide: the weight that it was made from, where that is known: a code's number begins where its value was, as far
            as that is still rounded to the code.
        rank: the numbers learn as a product of two matrices (Bondarenko et al. 2024); None: each by itself.
    """

    def __init__(
        self,
        weight: PackedWeight,
        allowed: Range,
        wide: Tensor | None,
        rank: int | None = None,
        *,
        generator: torch.Generator,
    ) -> None:
        self._weight = weight
        self._allowed = allowed
        self._scales = _Scales(weight.parts["scale"])
        codes = codes_of(weight)
        is_integer = not weight.parts["weight"].dtype.is_floating_point
        self._unit = 1.0 if is_integer else allowed.high / _FLOATS_OF_CODES
        if wide is not None and is_integer:
            codes = codes + (in_codes(weight, wide.float()) - codes).clamp(-_INSIDE, _INSIDE)
        start = codes / self._unit
        self._start = None if rank is None else start
        numbers = {"codes": _leaf(start)} if rank is None else _low_rank(start, rank, generator)
        self.parameters = {"growth": self._scales.growth, **numbers}

    def value(self) -> Tensor:
        numbers = self._numbers()
        codes = numbers + (nearest(numbers.detach(), self._weight, self._allowed) - numbers.detach())
        return expanded(self._weight, codes, self._scales.value())

    def packed(self) -> PackedWeight:
        codes = nearest(self._numbers().detach(), self._weight, self._allowed)
        made = with_codes(self._weight, codes)
        return replace(made, parts={**made.parts, "scale": self._scales.stored()})

    def _numbers(self) -> Tensor:
        codes = self.parameters["codes"] if self._start is None else self._start + _product(self.parameters)
        return self._unit * codes


class _Scales:
    """Scales that learn, each with its sign.

    Attributes:
        growth: the logarithms of what they are multiplied by; 0 at first.
    """

    def __init__(self, start: Tensor) -> None:
        self._start = start
        self.growth = _leaf(torch.zeros(start.shape, device=start.device))

    def value(self) -> Tensor:
        """As they would be served, float32."""
        return _rounded(self._grown(), self._start.dtype)

    def stored(self) -> Tensor:
        return _stored(self._grown(), self._start.dtype)

    def _grown(self) -> Tensor:
        return self._start.float() * self.growth.exp()


def _leaf(start: Tensor) -> Tensor:
    return start.detach().clone().float().requires_grad_()


def _low_rank(start: Tensor, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Two matrices whose product is 0 at first; `down` is drawn, `up` is 0."""
    rows, columns = start.shape
    rank = min(rank, rows, columns)
    down = torch.randn(rank, columns, generator=generator) * columns**-0.5
    return {"down": _leaf(down.to(start.device)), "up": _leaf(torch.zeros(rows, rank, device=start.device))}


def _product(parameters: Mapping[str, Tensor]) -> Tensor:
    return parameters["up"] @ parameters["down"]


def _rounded(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is stored, float32; a gradient passes by the rounding."""
    if dtype is torch.float32:
        return wide
    return wide + (_stored(wide, dtype).float() - wide.detach())


def _stored(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is stored; what is larger than the type can say becomes its largest, where fp8 would have NaN."""
    largest = torch.finfo(dtype).max
    return wide.detach().clamp(-largest, largest).to(dtype)
