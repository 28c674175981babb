"""What a backend is: it makes weights and programs ready to run.

In: weights and programs. Out: logits. Must never know: families, checkpoints, requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from amalgam.kernels.program import Instruction, Mix, Program
from amalgam.kernels.step import Cache, StepContext
from amalgam.kernels.weights import ExpertTable, GatedActivation, PackedWeight

# cos and sin of all positions, contiguous float32 `[positions, r / 2]`, one pair for each rope of a program.
Tables = Sequence[tuple[Tensor, Tensor]]
# What bfloat16 activations become before they meet integer weights.
ActivationType = Literal["int8", "bf16"]


class Compiled(Protocol):
    """A program that is ready to run. Used by one thread at a time."""

    def run(self, step: StepContext) -> Tensor:
        """Run one step: float32 logits `[rows, vocabulary]` of the rows that it wants, good until the next step.

        Writes the tokens' keys and values to the cache and shows the routing to the observer.

        Raises:
            ValueError: caches or tables that do not fit the program.
            IndexError: a token, a slot or a position that there is not; nothing is written then.
        """

    def hidden(self) -> Tensor:
        """What the head reads, `[tokens, hidden]`, of all tokens of the step that was run last; good until the next."""

    def head(self, hidden: Tensor) -> Tensor:
        """float32 logits `[rows, vocabulary]` of such rows, the same bits as `run` gives."""

    def warm_up(self, kv: Cache) -> None:
        """Make now what the first steps over a cache would else wait for. Any thread, before the program's first step;
        beside another program's steps, and nothing of the cache is written."""

    def describe(self) -> dict[str, str]:
        """Instruction → what runs it and where; for people."""


class Backend(Protocol):
    """Runs programs on one device, in one type of activations."""

    @property
    def device(self) -> torch.device: ...

    def coded_bytes(self, shape: tuple[int, ...]) -> int | None:
        """About what a bf16 weight takes that `prepare` codes, as it can trained ones; None if it codes none."""

    def keeps_bits(self, shape: tuple[int, ...], bits: int, group_size: int) -> bool:
        """Whether `prepare` keeps integers of so many bits, in groups along the inputs, in as many; else in 4 or 8."""

    def prepare(self, weight: PackedWeight, activation: ActivationType, *, codes: bool) -> PackedWeight:
        """A weight that is multiplied, on the device and in the layout that programs run fastest with. Thread-safe.

        Args:
            activation: what bfloat16 activations may become for integer weights.
            codes: whether bf16 may be stored in fewer bits, without loss.
        """

    def compile(self, program: Program, tables: Tables) -> Compiled:
        """Make a program ready to run; any thread may do so while another one runs a step."""

    # --- Of mixtures whose experts lie on several devices: each does the first part for its own, one of them adds ---

    def prepare_experts(self, experts: ExpertTable) -> ExpertTable:
        """Experts that lie on the device, ready for `expert_outputs`."""

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
        """out[t, k] = expert(expert_ids[t, k])(x[t]), float32 `[tokens, k, hidden]`; left alone where an id is -1.

        Thread-safe.

        Args:
            num_threads: most that compute, of processors; None: as many as PyTorch has.
        """

    def weighted_sum(self, outputs: Tensor, expert_ids: Tensor, gate_weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Σₖ gate_weights[t, k] × outputs[t, k], in the order of k, `[tokens, hidden]`; not where an id is -1."""


class OwnMixture(ExpertTable):
    """Experts that see to their own multiplication: no backend compiles it, and any runs it."""

    def mix(self, x: Tensor, expert_ids: Tensor, gate_weights: Tensor, activation: GatedActivation) -> Tensor:
        """See `Mix`: `[tokens, hidden]` in x's type."""
        raise NotImplementedError

    def alone(self) -> OwnMixture:
        """The same, but that other devices are given nothing, and the outputs of experts there are anything: for steps
        that are run for what this device makes ready."""
        raise NotImplementedError

    @property
    def who(self) -> str:
        """Who computes it and where; for people."""
        raise NotImplementedError


def describe(runs: Iterable[tuple[Instruction, str]]) -> dict[str, str]:
    """Instructions and who runs each → its name (`attend_latent`) → who runs it, counted if several do."""
    counts: dict[str, Counter[str]] = {}
    for instruction, who in runs:
        kind = type(instruction).__name__
        name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind).lstrip("_")
        if isinstance(instruction, Mix) and isinstance(instruction.experts, OwnMixture):
            who = instruction.experts.who
        counts.setdefault(name, Counter())[who] += 1
    return {
        name: next(iter(found)) if len(found) == 1 else ", ".join(f"{who}: {n}" for who, n in found.items())
        for name, found in counts.items()
    }
