"""Programs with the operators of a step in Triton, products of weights in torch, and what stands in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amalgam.kernels.backends import Compiled, Tables
from amalgam.kernels.backends.reference.interpreter import Interpreted, ReferenceBackend
from amalgam.kernels.backends.reference.operators import Operators
from amalgam.kernels.backends.triton.graphs import Outputs
from amalgam.kernels.backends.triton.steps import StepOperators, has_kernel
from amalgam.kernels.packed import SWIGLU, Activation, ExpertTable
from amalgam.kernels.program import Instruction, Program

CPU = torch.device("cpu")


class Steps(StepOperators):
    """Products of weights as in the reference, but a mixture that does not ask the host how many rows an expert has."""

    @classmethod
    def moe(
        cls, x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: Activation = SWIGLU
    ) -> Tensor:
        results = []
        for expert_id in range(len(experts)):
            one = experts[expert_id]
            gate, up = cls.linear(x, one.gate, one.gate_bias), cls.linear(x, one.up, one.up_bias)
            results.append(cls.linear(Operators.gated(gate, up, activation), one.down, one.down_bias).float())
        places = expert_ids.unsqueeze(2).expand(-1, -1, x.shape[1])
        chosen = torch.stack(results, dim=1).gather(1, places)
        return (chosen * gate_weights.unsqueeze(2)).sum(1).to(x.dtype)


class StepBackend(ReferenceBackend):
    """Everything but products of weights in Triton."""

    def compile(self, program: Program, tables: Tables) -> Compiled:
        return Interpreted(program, self._dtype, tables, Steps, who)


def who(instruction: Instruction, dtype: torch.dtype) -> str:
    return "triton" if has_kernel(instruction, dtype) else "torch"


class NothingAsked(TorchDispatchMode):
    """Raises where the host wants to know what a tensor holds, or shapes depend on it: a capture would fail there."""

    _ASKING = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::masked_select"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in self._ASKING, func.name()
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class Again:
    """Runs the work again, and leaves what it makes where the first run has left it."""

    work: Callable[[], Outputs]
    outputs: Outputs

    def replay(self) -> None:
        new = self.work()
        self.outputs.logits.copy_(new.logits)
        self.outputs.hidden.copy_(new.hidden)
        for (_, *kept), (_, *made) in zip(self.outputs.routing, new.routing, strict=True):
            for one, other in zip(kept, made, strict=True):
                one.copy_(other)


class Repeater:
    """See `graphs.Recorder`; refuses work that asks the host."""

    def __init__(self) -> None:
        self.recordings: list[Again] = []

    def record(self, work: Callable[[], Outputs], device: torch.device) -> Again:
        with NothingAsked():
            outputs = work()
        self.recordings.append(Again(work, outputs))
        return self.recordings[-1]
