"""Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019).

In: parameters with gradients. Out: the parameters, changed in place. Must never know: models, losses.

PyTorch's own imports its compiler, which takes seconds, and keeps its state by number; here it is by name, ready to be
written. A parameter without a gradient, of an expert that no token was sent to, keeps its means as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_FIRST_DECAY, _SECOND_DECAY, _EPSILON = 0.9, 0.95, 1e-8


class Adam:
    """Changes parameters along their gradients.

    Attributes:
        first, second: by name, means of gradients and of their squares; only of parameters that have had gradients.
        counts: by name, how many gradients they have had.
    """

    def __init__(self, parameters: Mapping[str, Tensor], weight_decay: float = 0.0) -> None:
        self._parameters = dict(parameters)
        self._weight_decay = weight_decay
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def forget_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def shorten_gradients(self, max_norm: float) -> float:
        """Scale all gradients so that together they are no longer than `max_norm`; returns how long they were."""
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        if norm > max_norm:
            for gradient in gradients:
                gradient.mul_(max_norm / norm)
        return norm

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if name not in self.counts:
                self.first[name], self.second[name] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            count = self.counts[name] = self.counts.get(name, 0) + 1
            first, second = self.first[name], self.second[name]
            first.lerp_(gradient, 1 - _FIRST_DECAY)
            second.mul_(_SECOND_DECAY).addcmul_(gradient, gradient, value=1 - _SECOND_DECAY)
            deviation = (second / (1 - _SECOND_DECAY**count)).sqrt_().add_(_EPSILON)
            parameter.mul_(1 - rate * self._weight_decay)
            parameter.addcdiv_(first, deviation, value=-rate / (1 - _FIRST_DECAY**count))

    def restore(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Go on from what another run had."""
        self.counts = dict(counts)
        for mine, theirs in ((self.first, first), (self.second, second)):
            mine |= {name: tensor.to(self._parameters[name].device) for name, tensor in theirs.items()}
