"""The statistics of some traffic, apart from the process that counted them.

In and out: `SavedSet`. Must never know: the tracker, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from amalgam.errors import ConfigError
from amalgam.experts.history import Bucket, Tally
from amalgam.experts.pairs import PairCounts


@dataclass(frozen=True)
class SavedSet:
    """The statistics of some traffic. Times in Unix seconds."""

    model: str
    layer_ids: tuple[int, ...]
    num_experts: int
    num_active_experts: int
    start: float
    end: float
    total: Tally
    last_activation: npt.NDArray[np.float64]  # [layers, experts]
    labels: dict[str, Tally] = field(default_factory=dict)
    pairs: PairCounts | None = None
    buckets: tuple[Bucket, ...] = ()
    tick_seconds: float | None = None  # None: a file of before it was written down
    own_counts: tuple[int, ...] = ()  # experts of each layer, where some have fewer than `num_experts`

    @property
    def expert_counts(self) -> tuple[int, ...]:
        """Experts of each layer."""
        return self.own_counts or (self.num_experts,) * len(self.layer_ids)

    def check_fits(
        self,
        layer_ids: Sequence[int],
        expert_counts: Sequence[int],
        where: str,
        num_active_experts: int | None = None,
    ) -> None:
        """
        Args:
            expert_counts: experts of each layer.
            num_active_experts: None where only shares are compared.

        Raises:
            ConfigError: these are the statistics of another model.
        """
        if (self.layer_ids, self.expert_counts) != (tuple(layer_ids), tuple(expert_counts)):
            raise ConfigError(
                f"{where} holds {len(self.layer_ids)} layers of {_counts(self.expert_counts)} experts, and this model "
                f"has {len(layer_ids)} of {_counts(expert_counts)}.",
                remedy="Use statistics of the same model.",
            )
        if num_active_experts not in (None, self.num_active_experts):
            raise ConfigError(
                f"{where} was counted with {self.num_active_experts} active experts per token, and this model has "
                f"{num_active_experts}.",
                remedy="Use statistics of the same model.",
            )


def _counts(expert_counts: Sequence[int]) -> str:
    low, high = min(expert_counts, default=0), max(expert_counts, default=0)
    return str(high) if low == high else f"{low} to {high}"


def merge(sets: Sequence[SavedSet]) -> SavedSet:
    """The traffic of all sets together; the history is left out.

    Raises:
        ConfigError: they are not of the same model.
    """
    first = sets[0]
    grid = len(first.layer_ids), first.num_experts
    total, labels = Tally.zeros(*grid), dict[str, Tally]()
    pairs: PairCounts | None = None
    last = np.full_like(first.last_activation, np.nan)
    for item in sets:
        item.check_fits(first.layer_ids, first.expert_counts, f"The set of {item.model!r}", first.num_active_experts)
        total.add(item.total)
        last = np.fmax(last, item.last_activation)
        for label, tally in item.labels.items():
            labels.setdefault(label, Tally.zeros(*grid)).add(tally)
        if item.pairs is not None:
            pairs = item.pairs if pairs is None else pairs + item.pairs
    return replace(
        first,
        start=min(item.start for item in sets),
        end=max(item.end for item in sets),
        total=total,
        last_activation=last,
        labels=labels,
        pairs=pairs,
        buckets=(),
        tick_seconds=None,
    )
