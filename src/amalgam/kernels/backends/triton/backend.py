"""The Triton backend: weights stay in their layouts, and kernels find them by tables on the device."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch

from amalgam.kernels.backends.base import ActivationType, Compiled, OwnMixture, Tables
from amalgam.kernels.backends.reference.interpreter import ByOperators, Interpreted
from amalgam.kernels.backends.triton import products
from amalgam.kernels.backends.triton.experts import Launch, TritonExperts, launches_of, prepare_experts
from amalgam.kernels.backends.triton.graphs import SIZES, CapturedProgram, CudaRecorder, Recorder, Recordings
from amalgam.kernels.backends.triton.kinds import TritonWeight
from amalgam.kernels.backends.triton.operators import TritonOperators, who_runs, why_not_recorded
from amalgam.kernels.backends.triton.sharing import signature_of, tables_of, with_tables
from amalgam.kernels.backends.triton.steps import with_expanded_latents
from amalgam.kernels.backends.triton.warming import Warmed, WarmUp
from amalgam.kernels.program import Embed, Head, Instruction, Mix, Program, Project
from amalgam.kernels.weights import ExpertTable, PackedWeight

_Key = tuple[Any, ...]


class TritonBackend(ByOperators):
    """See `Backend`. Runs on a CUDA device; on the CPU, where Triton's interpreter runs kernels.

    A version's experts are launched as those of the versions beside it: where it brings no kind of weights that they
    have not, its launches are theirs, only tables differ, and what has been recorded of their steps is run for its own.

    Args:
        recorder: of small steps; None: CUDA graphs on a CUDA device, else nothing is recorded.
        sizes: rows of what it records, ascending.
    """

    operators = TritonOperators

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        recorder: Recorder | None = None,
        sizes: Sequence[int] = SIZES,
    ) -> None:
        self.device = device
        self._dtype = dtype
        self._recorder = CudaRecorder() if recorder is None and device.type == "cuda" else recorder
        self._sizes = sizes
        # Of each place in a program that has experts, those of all versions that somebody still holds.
        self._experts: list[WeakSet[TritonExperts]] = []
        self._latents: WeakKeyDictionary[PackedWeight, PackedWeight] = WeakKeyDictionary()
        # What is recorded stays as long as a version's program needs it, and what it reads as long as that: so no
        # address in a key has come to mean another tensor.
        self._recordings: WeakValueDictionary[_Key, Recordings] = WeakValueDictionary()
        self._warmed: WeakValueDictionary[_Key, Warmed] = WeakValueDictionary()
        self._compiling = threading.Lock()  # any thread compiles

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
        with self._compiling:
            program = self.ready(program)
            compiled = self._interpreted(program, tables)
            if self._recorder is None:
                return CapturedProgram(compiled, None, reason=f"there are no graphs on {self.device}")
            key = _key(program, tables)
            warm_up = self._warm_up(program, tables, key)
            reason = why_not_recorded(program, self._dtype)
            if reason is not None:
                return CapturedProgram(compiled, None, reason=reason, warm_up=warm_up)
            recordings = self._recorded(program, tables, key, self._recorder)
            return CapturedProgram(compiled, recordings, tables_of(program), warm_up=warm_up)

    def ready(self, program: Program) -> Program:
        """The program with all tables that its launches read; see `sharing.py` for whose launches are alike."""
        program = with_expanded_latents(program, self._dtype, self._latents)
        program = Program(tuple(self._read_by_kernels(program)))
        for instruction in program.instructions:
            _look_up(instruction)
        return program

    def _interpreted(self, program: Program, tables: Tables) -> Interpreted:
        return Interpreted(program, self._dtype, tables, TritonOperators, self._who)

    def _warm_up(self, program: Program, tables: Tables, key: _Key) -> WarmUp:
        """What compiles the kernels of programs like this one."""
        found = self._warmed.get(key)
        if found is None:
            found = self._warmed[key] = Warmed(_num_positions(program, tables))
        alone = Program(tuple(map(_alone, program.instructions)))
        return WarmUp(lambda: self._interpreted(alone, tables), found)

    def _recorded(self, program: Program, tables: Tables, key: _Key, recorder: Recorder) -> Recordings:
        """What is recorded of programs like this one, which differ in where their experts lie."""
        found = self._recordings.get(key)
        if found is None:
            own = [torch.empty_like(table) for table in tables_of(program)]
            found = self._recordings[key] = Recordings(
                self._interpreted(with_tables(program, own), tables),
                recorder,
                max_positions=_num_positions(program, tables),
                tables=own,
                sizes=self._sizes,
            )
        return found

    def _read_by_kernels(self, program: Program) -> Iterator[Instruction]:
        place = 0
        for one in program.instructions:
            if isinstance(one, Embed) and not isinstance(one.weight, TritonWeight):
                # Nobody has prepared an embedding: it multiplies nothing.
                yield replace(one, weight=TritonWeight.of(one.weight))
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


def _key(program: Program, tables: Tables) -> _Key:
    """Equal for programs that launch the same kernels on the same weights and rotations."""
    return signature_of(program), tuple(part.data_ptr() for pair in tables for part in pair)


def _alone(one: Instruction) -> Instruction:
    if isinstance(one, Mix) and isinstance(one.experts, OwnMixture):
        return replace(one, experts=one.experts.alone())
    return one


def _num_positions(program: Program, tables: Tables) -> int:
    """How many positions a sequence can have; a program that turns and learns none leaves it to the cache."""
    learned = [one.weight.shape[0] for one in program.instructions if isinstance(one, Embed) and one.by_position]
    return min([len(cos) for cos, _ in tables] + learned, default=sys.maxsize)


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
