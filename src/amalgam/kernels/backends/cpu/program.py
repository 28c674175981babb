"""Runs a program with the compiled CPU kernels, the whole step in one call where every instruction has one.

In: a `Program` whose weights are in panels. Out: `CpuProgram`, which gives, bit for bit, what `CpuOperators` give one
by one wherever those are compiled. Must never know: names, plans, requests.

Between two products a layer's many small calls would fetch Python's code and data back into caches that the weights
have just filled: with one sequence that was a fifth of a step. An instruction that the extension cannot take, because a
weight is in a layout that it does not know or because it is a `Call`, goes through the interpreter, and the program
goes on in the extension behind it. So does a `Choose`, but only in steps in which a token has positions to choose from:
the others are as if it was not there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.kernels.backends.base import Tables, describe
from amalgam.kernels.backends.cpu import attention, extension
from amalgam.kernels.backends.cpu.encoders import Encoder
from amalgam.kernels.backends.cpu.operators import CpuOperators, who_runs
from amalgam.kernels.backends.cpu.workspace import Workspace, new_routing
from amalgam.kernels.backends.reference.execution import execute, logits_of
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.chosen import chooses
from amalgam.kernels.program import Choose, Instruction, Mix, Rows, WeighInput
from amalgam.kernels.step import Cache, StepContext

# Instructions [first, end) of the native program, or one for the interpreter with its last route.
_Part = tuple[int, int] | tuple[Instruction, int]


def _join(parts: list[_Part], first: int, end: int) -> None:
    """Add native instructions to what runs in one call, if such a part is the last."""
    start = parts[-1][0] if parts else None
    if isinstance(start, int):
        parts[-1] = (start, end)
    else:
        parts.append((first, end))


def _without_choice(parts: Sequence[_Part]) -> list[_Part]:
    """The same without any `Choose`."""
    found: list[_Part] = []
    for part in parts:
        first, end = part
        if isinstance(first, int):
            _join(found, first, end)
        elif not isinstance(first, Choose):
            found.append(part)
    return found


class CpuProgram:
    """See `Compiled`."""

    def __init__(self, workspace: Workspace, tables: Tables, encoder: Encoder) -> None:
        """
        Args:
            encoder: of the program, and nothing added yet.
        """
        program = encoder.program
        self.tables = tables
        self._workspace = workspace
        self._program = program
        self._buffers = program.buffers
        self._index = encoder.index
        self._native = encoder.native
        self._kernels, self._attention = extension.kernels(), attention.table(extension.isa())
        self._gated = extension.gated_kernels()
        self._native_dtype = extension.native_dtype(workspace.dtype)
        self._num_active = program.routes[0].k if program.routes else 1
        self._num_routes = len(program.routes)
        self._vocab_size = program.head.weight.shape[0]
        self._starts: list[int] = []  # of the buffers, for so many tokens in this arena
        self._placed: tuple[int, Tensor | None] = (-1, None)
        self._parts: list[_Part] = []
        self._interpreted: set[int] = set()
        for number, instruction in enumerate(program.instructions):
            self._add(number, instruction, encoder)
        self._least_chosen = min((one.k for one in program.instructions if isinstance(one, Choose)), default=None)
        self._parts_without_choice = _without_choice(self._parts)

    def _add(self, number: int, instruction: Instruction, encoder: Encoder) -> None:
        first = self._native.num_instructions
        if encoder.add(instruction):
            _join(self._parts, first, self._native.num_instructions)
            return
        self._interpreted.add(number)
        self._parts.append((instruction, encoder.num_routes - 1))

    def warm_up(self, kv: Cache) -> None:
        pass

    def describe(self) -> dict[str, str]:
        native = f"native ({extension.isa()})"
        return describe(
            (instruction, who_runs(instruction, self.dtype) if number in self._interpreted else native)
            for number, instruction in enumerate(self._program.instructions)
        )

    def run(self, step: StepContext) -> Tensor:
        workspace, sequences, observer = self._workspace, step.sequences, step.observer
        memory = workspace.memory(step.kv, self.tables)
        tokens = rows = 0
        for token_ids, _, _, num_logits, _ in sequences:
            tokens += len(token_ids)
            rows += min(num_logits, len(token_ids))
        logits = workspace.logits((rows, self._vocab_size))
        if not tokens:
            return logits
        shape = (self._num_routes, tokens, self._num_active)
        expert_ids, gate_weights = workspace.routing(shape) if observer is None else new_routing(shape)
        starts = self._place(tokens)  # which may make a larger arena
        has_choice = self._least_chosen is not None and chooses(step, self._least_chosen)
        arguments = (
            self._kernels,
            self._attention,
            self._gated,
            memory.native,
            sequences,
            self._native_dtype,
            workspace.arena,
            starts,
            expert_ids,
            gate_weights,
            logits,
        )
        threads = torch.get_num_threads()
        frame: _CpuFrame | None = None
        for first, end in self._parts if has_choice else self._parts_without_choice:
            if isinstance(first, int):
                chosen = None if frame is None or frame.chosen is None else attention.plan_of(frame.chosen)
                self._native.run(first, end, *arguments, chosen, threads)
                continue
            if frame is None:
                frame = _CpuFrame(step, self, expert_ids, gate_weights, tokens)
            frame.execute(first, end)
        if frame is not None and frame.logits is not None:
            logits = frame.logits
        if observer is not None and self._num_routes:
            observer.observe_all(expert_ids, gate_weights)
        return logits

    def hidden(self) -> Tensor:
        return self.view(self._program.head.x, self._placed[0])

    def head(self, hidden: Tensor) -> Tensor:
        return logits_of(self._program.head, hidden, CpuOperators)

    def view(self, rows: Rows, tokens: int) -> Tensor:
        """`[tokens, width]` of the arena as `run` has laid it out."""
        arena = self._workspace.arena
        start = self._starts[self._index[rows.buffer]]
        dtype = torch.float32 if rows.is_wide else self.dtype
        whole = arena[start : start + tokens * rows.stride * dtype.itemsize].view(dtype).view(tokens, rows.stride)
        return whole[:, rows.start : rows.start + rows.width]

    @property
    def dtype(self) -> torch.dtype:
        return self._workspace.dtype

    def _place(self, tokens: int) -> list[int]:
        """Where in the arena the buffers start, for so many tokens."""
        if self._placed[0] != tokens or self._placed[1] is not self._workspace.arena:
            self._starts = self._workspace.place(self._buffers, tokens)
            self._placed = tokens, self._workspace.arena
        return self._starts


class _CpuFrame(Frame):
    """The interpreter's view of a step whose other instructions run in the extension: buffers are in its arena."""

    def __init__(
        self, step: StepContext, program: CpuProgram, expert_ids: Tensor, gate_weights: Tensor, tokens: int
    ) -> None:
        super().__init__(step, program.dtype, program.tables, CpuOperators)
        self._program = program
        self._expert_ids, self._gate_weights = expert_ids, gate_weights
        self._tokens = tokens
        self._route_index = -1

    def execute(self, instruction: Instruction, route_index: int) -> None:
        """Run one instruction behind so many routes."""
        self._route_index = route_index
        if isinstance(instruction, Mix | WeighInput):
            self.routing = self._expert_ids[route_index], self._gate_weights[route_index]
        execute(instruction, self)

    def get(self, rows: Rows) -> Tensor:
        return self._program.view(rows, self._tokens)

    def put(self, rows: Rows, value: Tensor) -> None:
        view = self._program.view(rows, self._tokens)
        if view.data_ptr() != value.data_ptr():
            view.copy_(value)

    def route(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self._expert_ids[self._route_index].copy_(expert_ids)
        self._gate_weights[self._route_index].copy_(gate_weights)
