"""What a backend is: it makes programs ready to run.

In: programs. Out: logits. Must never know: families, checkpoints, requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from amalgam.kernels.program import Program
from amalgam.kernels.step import StepContext

Tables = Sequence[tuple[Tensor, Tensor]]


class Compiled(Protocol):
    """A program that is ready to run. Used by one thread at a time."""

    def run(self, step: StepContext) -> Tensor:
        """Run one step: float32 logits `[rows, vocabulary]` of the rows that it wants, good until the next step.

        Writes the tokens' keys and values to the cache and shows the routing to the observer.

        Raises:
            ValueError: caches or tables that do not fit the program.
            IndexError: a token, a slot or a position that there is not; nothing is written then.
        """

    def describe(self) -> dict[str, str]:
        """Instruction → what runs it; for people."""


class Backend(Protocol):
    """Runs programs on one device, in one type of activations, with one set of rotary tables."""

    def compile(self, program: Program) -> Compiled:
        """Make a program ready to run; any thread may do so while another one runs a step."""
