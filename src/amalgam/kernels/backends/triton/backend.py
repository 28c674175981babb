"""The Triton backend: weights stay in their layouts, and kernels find them by tables on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from weakref import WeakSet

import torch

from amalgam.kernels.backends.base import ActivationType, Compiled, OwnMixture, Tables
from amalgam.kernels.backends.reference.interpreter import ByOperators, Interpreted
from amalgam.kernels.backends.triton import products
from amalgam.kernels.backends.triton.experts import Launch, TritonExperts, launches_of, prepare_experts
from amalgam.kernels.backends.triton.kinds import TritonWeight
from amalgam.kernels.backends.triton.operators import TritonOperators, who_runs
from amalgam.kernels.packed import ExpertTable, PackedWeight
from amalgam.kernels.program import Embed, Head, Instruction, Mix, Program, Project


class TritonBackend(ByOperators):
    """See `Backend`. Runs on a CUDA device; on the CPU, where Triton's interpreter runs kernels.

    A version's experts are launched as those of the versions beside it: where it brings no kind of weights that they
    have not, its launches are theirs, and only tables differ.
    """

    operators = TritonOperators

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self._dtype = dtype
        # Of each place in a program that has experts, those of all versions that somebody still holds.
        self._experts: list[WeakSet[TritonExperts]] = []

    def coded_bytes(self, shape: tuple[int, ...]) -> int | None:
        return None

    def keeps_bits(self, shape: tuple[int, ...], bits: int, group_size: int) -> bool:
        return False

    def prepare(self, weight: PackedWeight, activation: ActivationType, *, codes: bool) -> PackedWeight:
        """`activation` changes nothing: kernels multiply activations as they are."""
        return TritonWeight.of(weight.to(self.device))

    def prepare_experts(self, experts: ExpertTable) -> ExpertTable:
        launches = launches_of(experts)
        return experts if launches is None else prepare_experts(experts, launches)

    def compile(self, program: Program, tables: Tables) -> Compiled:
        return Interpreted(self.ready(program), self._dtype, tables, TritonOperators, self._who)

    def ready(self, program: Program) -> Program:
        """The program with all tables that its launches read; see `sharing.py` for whose launches are alike."""
        program = Program(tuple(self._read_by_kernels(program)))
        for instruction in program.instructions:
            _look_up(instruction)
        return program

    def _read_by_kernels(self, program: Program) -> Iterator[Instruction]:
        place = 0
        for one in program.instructions:
            if isinstance(one, Embed) and not isinstance(one.weight, TritonWeight):
                yield replace(
                    one, weight=TritonWeight.of(one.weight)
                )  # which nobody has prepared: it multiplies nothing
            elif isinstance(one, Mix):
                yield replace(one, experts=self._prepared(one.experts, place))
                place += 1
            else:
                yield one

    def _prepared(self, experts: ExpertTable, place: int) -> ExpertTable:
        if isinstance(experts, TritonExperts | OwnMixture):
            return experts
        self._experts += [WeakSet() for _ in range(place + 1 - len(self._experts))]
        beside = self._experts[place]
        others: dict[Launch, None] = {}
        for version in sorted(beside, key=lambda one: len(one.launches), reverse=True):
            others |= dict.fromkeys(version.launches)
        launches = launches_of(experts, tuple(others))
        if launches is None:
            return experts
        prepared = prepare_experts(experts, launches)
        beside.add(prepared)
        return prepared

    def _who(self, instruction: Instruction, dtype: torch.dtype) -> str:
        return who_runs(instruction, dtype, self.device)


def _look_up(instruction: Instruction) -> None:
    """Make the tables that an instruction's products will look for, so that no step waits for them."""
    match instruction:
        case Project(projections=projections):
            weights, biases = [one.weight for one in projections], [one.bias for one in projections]
        case Head(weight=weight, bias=bias):
            weights, biases = [weight], [bias]
        case Embed(weight=weight):
            weights, biases = [weight], [None]
        case _:
            return
    if all(isinstance(weight, TritonWeight) for weight in weights):
        products.stacks_of(weights, biases)
