"""The CPU backend: weights in panels, programs that run in one call."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from amalgam.kernels.backends.base import ActivationType, Compiled, Tables
from amalgam.kernels.backends.cpu import extension, panels
from amalgam.kernels.backends.cpu.encoders import Encoder, LatentMatrices
from amalgam.kernels.backends.cpu.operators import CpuOperators, who_runs
from amalgam.kernels.backends.cpu.products import prepare_experts
from amalgam.kernels.backends.cpu.program import CpuProgram
from amalgam.kernels.backends.cpu.workspace import Workspace
from amalgam.kernels.backends.reference.interpreter import ByOperators, Interpreted
from amalgam.kernels.program import Mix, Program
from amalgam.kernels.weights import ExpertTable, PackedWeight


class CpuBackend(ByOperators):
    """See `Backend`. What its programs write to is kept here, so that the first step of a new version finds it."""

    device = torch.device("cpu")
    operators = CpuOperators

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._workspace = Workspace(dtype)
        self._latent: WeakKeyDictionary[PackedWeight, LatentMatrices] = WeakKeyDictionary()

    def coded_bytes(self, shape: tuple[int, ...]) -> int | None:
        """Portable code takes ten times as long to undo the code as to read the weight, so it is not used there."""
        return None if extension.isa() in ("amx_emulated", "portable") else panels.coded_bytes(shape)

    def keeps_bits(self, shape: tuple[int, ...], bits: int, group_size: int) -> bool:
        return panels.keeps_bits(shape, bits, group_size)

    def prepare(self, weight: PackedWeight, activation: ActivationType, *, codes: bool) -> PackedWeight:
        return panels.prepare(weight.to(self.device), activation, codes=codes)

    def compile(self, program: Program, tables: Tables) -> Compiled:
        """
        Raises:
            ValueError: tables of other types or shapes than `Tables` says.
        """
        for pair in tables:
            if any(
                t.dtype is not torch.float32 or t.dim() != 2 or t.shape != pair[0].shape or not t.is_contiguous()
                for t in pair
            ):
                raise ValueError(f"rotary tables of {[(t.dtype, tuple(t.shape)) for t in pair]}")
        if self._dtype not in extension.FLOAT_TYPES or len({route.k for route in program.routes}) > 1:
            return self.interpret(program, tables)
        program = _with_prepared_experts(program)
        return CpuProgram(self._workspace, tables, Encoder(program, self._dtype, self._latent))

    def prepare_experts(self, experts: ExpertTable) -> ExpertTable:
        return prepare_experts(experts)

    def interpret(self, program: Program, tables: Tables) -> Interpreted:
        """A program that runs one operator after the other."""
        program = _with_prepared_experts(program)
        return Interpreted(program, self._dtype, tables, CpuOperators, who_runs)


def _with_prepared_experts(program: Program) -> Program:
    return Program(
        tuple(
            replace(one, experts=prepare_experts(one.experts)) if isinstance(one, Mix) else one
            for one in program.instructions
        )
    )
