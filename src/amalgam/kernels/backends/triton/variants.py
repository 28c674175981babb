"""Kernels as they are launched, written down beside them, so that they can be compiled where there is no card.

In: nothing. Out: `Variant`. Must never know: weights, programs, devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Variant:
    """One kernel as it is launched: what is compiled ahead of time to see registers, shared memory and spills."""

    name: str
    kernel: Any  # a triton.JITFunction
    signature: Mapping[str, str]  # parameter → type ("*bf16", "i32", "fp32"), constants left out
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
