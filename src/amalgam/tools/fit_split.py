"""A model on a card and on the processors beside it: which of its bytes lie where, and what they let it be.

In: a candidate, what it needs beside its weights, how much room there is. Out: a `Fit` with a part of the experts far
from the card. Must never know: checkpoints, settings.

Everything dense, the KV cache and the workspace are on the card. What is missing there goes to the processors' memory
as whole experts. Which ones is for `amalgam plan` to say, which knows how much each is used; here all count alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from amalgam.models.spec import ModelSpec, Slot
from amalgam.tools.fit_ways import Held


@dataclass(frozen=True)
class Parts:
    """The weights of a candidate, apart.

    Attributes:
        expert_bytes: of all experts; `num_experts`: how many those are, of all layers.
        read_bytes: of everything else that a step multiplies.
        active: share of the experts that a token uses.
    """

    expert_bytes: int = 0
    num_experts: int = 0
    read_bytes: int = 0
    active: float = 0.0

    def far_experts(self, missing_bytes: int) -> int:
        """How many experts have to lie elsewhere for so many bytes; more than there are, if that is not enough."""
        return math.ceil(missing_bytes * self.num_experts / self.expert_bytes) if self.expert_bytes else 2**62

    def bytes_of(self, num_experts: int) -> int:
        return math.ceil(self.expert_bytes * num_experts / max(1, self.num_experts))

    def tokens_per_second(self, far_experts: int, bandwidth: float | None, far_bandwidth: float | None) -> float | None:
        """At most, of one sequence: the bytes of a step over the bandwidths, one after the other; None: one is not
        known. Expected, never measured."""
        share = far_experts / max(1, self.num_experts)
        experts = self.active * self.expert_bytes
        if bandwidth is None or (share and far_bandwidth is None) or not self.read_bytes + experts:
            return None
        seconds = (self.read_bytes + (1 - share) * experts) / bandwidth
        if share and far_bandwidth is not None:
            seconds += share * experts / far_bandwidth
        return 1.0 / seconds


def parts_of(spec: ModelSpec, held: Sequence[tuple[Slot, Held]]) -> Parts:
    """
    Args:
        held: every weight as it would lie in memory.
    """
    experts = [each.memory_bytes for slot, each in held if slot.role == "expert"]
    others = sum(
        each.memory_bytes
        for slot, each in held
        if slot.role != "expert" and (slot.role != "embedding" or spec.has_tied_head)
    )
    counts = spec.expert_counts
    active = spec.num_active_experts * len(counts) / max(1, sum(counts))
    return Parts(sum(experts), sum(counts), others, active)
