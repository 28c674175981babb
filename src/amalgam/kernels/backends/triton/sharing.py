"""Which programs differ in nothing but where their experts lie, so that one captured graph does for all of them.

In: programs whose experts kernels read. Out: their tables, and what else they are. Must never know: graphs, versions.

A graph is captured of a program `with_tables` of the graph's own. A program of the same signature is run by copying its
tables there, between two steps, in the order of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from amalgam.kernels.backends.base import OwnMixture
from amalgam.kernels.backends.triton.experts import TritonExperts
from amalgam.kernels.program import Mix, Program, Projection
from amalgam.kernels.weights import Expert, ExpertTable, PackedWeight


def tables_of(program: Program) -> tuple[Tensor, ...]:
    """The tables that say where experts lie, in order; of experts that kernels read."""
    return tuple(experts.table for experts in _experts_of(program))


def with_tables(program: Program, tables: Sequence[Tensor]) -> Program:
    """The program with experts wherever other tables, of the same shapes, say that they are; it holds none of them."""
    left = iter(tables)
    return Program(
        tuple(
            replace(one, experts=one.experts.anywhere(next(left)))
            if isinstance(one, Mix) and isinstance(one.experts, TritonExperts)
            else one
            for one in program.instructions
        )
    )


def signature_of(program: Program) -> tuple[Any, ...]:
    """Equal for programs that launch the same kernels on the same weights, but for what their tables say.

    Tensors, and mixtures over several devices, are told apart by where they lie: only among programs that somebody
    keeps.
    """
    return tuple(
        (type(one), *(_essence(getattr(one, part.name)) for part in fields(one))) for one in program.instructions
    )


def _experts_of(program: Program) -> list[TritonExperts]:
    mixes = (one.experts for one in program.instructions if isinstance(one, Mix))
    return [experts for experts in mixes if isinstance(experts, TritonExperts)]


def _essence(value: Any) -> Any:
    match value:
        case Tensor():
            return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
        case TritonExperts():
            return value.launches, value.has_bias, tuple(value.table.shape), value.hidden, value.width
        case OwnMixture():  # its experts lie on several devices, and it alone knows where
            return id(value)
        case ExpertTable():
            return tuple(map(_essence, value.experts))
        case PackedWeight():
            return value.layout.name, value.shape, value.block, *map(_essence, value.parts.values())
        case tuple():
            return tuple(map(_essence, value))
        case Expert() | Projection():
            return tuple(_essence(getattr(value, part.name)) for part in fields(value))
        case _:
            return value
