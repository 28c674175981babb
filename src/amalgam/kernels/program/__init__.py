"""A step as instructions over named buffers.

In: the blocks of a model, which emit instructions when a weight version is built. Out: a `Program`, which a backend
compiles and runs (`amalgam.kernels.backends`). Must never know: families, checkpoints, requests, how it is run.

    token ids ─ Embed ─ x ─ Normalize ─ normed ─ Project ─ query, key, value ─ Attend ─ attended ─ Project ─ delta
                        x + delta ─ Normalize ─ normed ─ Route ─ Mix ─ delta ─ … ─ Head ─ logits

Every buffer has one row per token of the step. What an instruction does is said by its docstring and, exactly, by
`amalgam.kernels.backends.reference`. What no instruction says is a `Call` into Python.
"""

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
from amalgam.kernels.program.experts import Mix, Route, Scoring, WeighInput
from amalgam.kernels.program.linear import Embed, Head, Normalize, Project, Projection
from amalgam.kernels.program.program import Call, Emitter, Instruction, Program, rows_of
from amalgam.kernels.program.recurrent import Convolve, DeltaRule, ScanStates
from amalgam.kernels.program.rows import Rows

__all__ = [
    "Add",
    "Attend",
    "AttendLatent",
    "Call",
    "Choose",
    "Clamp",
    "Convolve",
    "DeltaRule",
    "Embed",
    "Emitter",
    "Gelu",
    "Head",
    "Instruction",
    "KeepIndexKey",
    "Mix",
    "Normalize",
    "Program",
    "Project",
    "Projection",
    "Route",
    "Rows",
    "Scale",
    "ScaleByPosition",
    "ScaleBySigmoid",
    "ScaleHeads",
    "ScanStates",
    "Scoring",
    "Split",
    "SwiGlu",
    "WeighInput",
    "rows_of",
]
