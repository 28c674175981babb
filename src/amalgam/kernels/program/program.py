"""Instructions in order: a program, and how blocks make one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from amalgam.kernels.program.attention import Attend, AttendLatent, Choose, KeepIndexKey
from amalgam.kernels.program.elementwise import (
    Add,
    Clamp,
    Gelu,
    Scale,
    ScaleByPosition,
    ScaleBySigmoid,
    ScaleHeads,
    Split,
    SwiGlu,
)
from amalgam.kernels.program.experts import Mix, Route, WeighInput
from amalgam.kernels.program.linear import Embed, Head, Normalize, Project, Projection
from amalgam.kernels.program.recurrent import Convolve, DeltaRule, ScanStates
from amalgam.kernels.program.rows import Rows
from amalgam.kernels.weights import PackedWeight


@dataclass(frozen=True, eq=False)
class Call:
    """outputs = function(*inputs, step): a block that no instruction fits, in torch.

    A row of the result must have the same bits whatever rows stand beside it (the reference's operators say how).

    Attributes:
        function: takes a tensor `[tokens, width]` per input, and the step; returns one per output.
    """

    function: Callable[..., Sequence[Tensor]]
    inputs: tuple[Rows, ...]
    outputs: tuple[Rows, ...]


Instruction = (
    Embed
    | Normalize
    | Project
    | Attend
    | AttendLatent
    | KeepIndexKey
    | Choose
    | Route
    | Mix
    | WeighInput
    | SwiGlu
    | Gelu
    | Clamp
    | Scale
    | ScaleByPosition
    | ScaleBySigmoid
    | ScaleHeads
    | Split
    | Convolve
    | DeltaRule
    | ScanStates
    | Add
    | Call
    | Head
)


@dataclass(frozen=True, eq=False)
class Program:
    """A model with one weight version; made once, run at every step.

    Attributes:
        instructions: in order; the last one is the head.
    """

    instructions: tuple[Instruction, ...]

    @cached_property
    def head(self) -> Head:
        head = self.instructions[-1]
        assert isinstance(head, Head)
        return head

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        return tuple(one for one in self.instructions if isinstance(one, Route))

    @cached_property
    def buffers(self) -> Mapping[str, tuple[int, bool]]:
        """Name → elements per token, and whether they are float32 whatever the activations are."""
        found: dict[str, tuple[int, bool]] = {}
        for instruction in self.instructions:
            for rows in rows_of(instruction):
                stride, is_wide = found.get(rows.buffer, (0, rows.is_wide))
                assert is_wide == rows.is_wide, rows
                found[rows.buffer] = max(stride, rows.stride), is_wide
        return found


def rows_of(instruction: Instruction) -> list[Rows]:
    """All rows that an instruction reads or leaves."""
    found: list[Rows] = []
    for value in vars(instruction).values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Rows):
                found.append(item)
            elif isinstance(item, Projection):
                found.append(item.out)
    return found


class Emitter:
    """What blocks emit their instructions to.

    Args:
        ropes: whatever rotations are told apart by, in the order of the tables that steps are run with.

    Attributes:
        layer_id: the layer whose blocks are emitting.
    """

    def __init__(self, ropes: Sequence[object] = ()) -> None:
        self._instructions: list[Instruction] = []
        self._ropes = tuple(ropes)
        self.layer_id = 0

    def rope(self, rope: object | None) -> int | None:
        """Index of a rotation; None for none."""
        return None if rope is None else self._ropes.index(rope)

    def rows(self, buffer: str, width: int, *, is_wide: bool = False) -> Rows:
        """A whole buffer of this width. The name is shared by all blocks, and so is what the buffer holds."""
        return Rows(buffer, width, 0, width, is_wide)

    def add(self, *instructions: Instruction) -> None:
        self._instructions += instructions

    def project(self, x: Rows, *projections: tuple[PackedWeight, Tensor | None, str]) -> tuple[Rows, ...]:
        """The same rows times several weights with their biases, each into a buffer as wide as the weight has rows."""
        outs = tuple(self.rows(buffer, weight.shape[0]) for weight, _, buffer in projections)
        parts = tuple(Projection(w, bias, out) for (w, bias, _), out in zip(projections, outs, strict=True))
        self.add(Project(x, parts))
        return outs

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """What has been added so far."""
        return tuple(self._instructions)

    def finish(self) -> Program:
        return Program(self.instructions)
