"""Runs a program instruction by instruction: the specification, on any device.

In: a `Program`. Out: logits. Must never know: families, checkpoints, requests, other backends.

What an instruction computes with are `operators`; another backend may hand in its own for what it has no instruction
for. Who wants to see activations, for a calibration, hands in a `Watch`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amalgam.kernels.backends.base import ActivationType, Compiled, Tables, describe
from amalgam.kernels.backends.reference.execution import execute, logits_of
from amalgam.kernels.backends.reference.frame import Frame, Watch
from amalgam.kernels.backends.reference.operators import Operators
from amalgam.kernels.program import Instruction, Program
from amalgam.kernels.step import Cache, StepContext
from amalgam.kernels.weights import ExpertTable, GatedActivation, PackedWeight


class ByOperators:
    """What a `Backend` does for mixtures over several devices, by its operators."""

    operators: type[Operators] = Operators

    def prepare_experts(self, experts: ExpertTable) -> ExpertTable:
        return experts

    def expert_outputs(
        self,
        x: Tensor,
        expert_ids: Tensor,
        experts: ExpertTable,
        activation: GatedActivation,
        out: Tensor,
        *,
        num_threads: int | None = None,
    ) -> None:
        self.operators.expert_outputs(x, expert_ids, experts, activation, out, num_threads=num_threads)

    def weighted_sum(self, outputs: Tensor, expert_ids: Tensor, gate_weights: Tensor, dtype: torch.dtype) -> Tensor:
        return self.operators.weighted_sum(outputs, expert_ids, gate_weights, dtype)


class ReferenceBackend(ByOperators):
    """See `Backend`; any device, any floating type.

    Args:
        watch: sees each instruction of every step.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, watch: Watch | None = None) -> None:
        self.device = device
        self._dtype = dtype
        self._watch = watch

    def coded_bytes(self, shape: tuple[int, ...]) -> int | None:
        return None

    def keeps_bits(self, shape: tuple[int, ...], bits: int, group_size: int) -> bool:
        return False

    def prepare(self, weight: PackedWeight, activation: ActivationType, *, codes: bool) -> PackedWeight:
        return weight.to(self.device)

    def compile(self, program: Program, tables: Tables) -> Compiled:
        return Interpreted(program, self._dtype, tables, Operators, self._who, self._watch)

    def _who(self, instruction: Instruction, dtype: torch.dtype) -> str:
        return f"torch ({self.device})"


class Interpreted:
    """See `Compiled`.

    Args:
        who: says of an instruction, with activations of a type, who computes it.
    """

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype,
        tables: Tables,
        operators: type[Operators],
        who: Callable[[Instruction, torch.dtype], str],
        watch: Watch | None = None,
    ) -> None:
        self._program = program
        self._dtype = dtype
        self._tables = tables
        self._operators = operators
        self._who = who
        self._watch = watch
        self._hidden: Tensor | None = None

    def run(self, step: StepContext) -> Tensor:
        if not len(step.token_ids):
            head = self._program.head
            return torch.empty((0, head.weight.shape[0]), dtype=torch.float32, device=step.kv.device)
        frame = Frame(step, self._dtype, self._tables, self._operators)
        for instruction in self._program.instructions:
            if self._watch is not None:
                self._watch(instruction, frame)
            execute(instruction, frame)
        assert frame.logits is not None
        self._hidden = frame.get(self._program.head.x)
        return frame.logits

    def hidden(self) -> Tensor:
        assert self._hidden is not None, "no step has been run"
        return self._hidden

    def head(self, hidden: Tensor) -> Tensor:
        return logits_of(self._program.head, hidden, self._operators)

    def warm_up(self, kv: Cache) -> None:
        pass

    def describe(self) -> dict[str, str]:
        return describe(
            (instruction, self._who(instruction, self._dtype)) for instruction in self._program.instructions
        )
