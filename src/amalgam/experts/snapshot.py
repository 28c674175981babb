"""What the tracker tells: the statistics of one window of time, at one moment.

Out: frozen values. Must never know how they were counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from amalgam.experts.history import Tally
from amalgam.experts.recent import RecentActivation


@dataclass(frozen=True)
class ExpertSnapshot:
    """A consistent copy of the statistics of one window of time. Times in Unix seconds."""

    layer_ids: tuple[int, ...]  # decoder layer of each row of the grids
    num_experts: int  # of the widest layer
    expert_counts: tuple[int, ...]  # of each layer
    num_active_experts: int  # per token and layer
    started_at: float  # the tracker's start; a reset does not move it
    minutes: float | None  # the window asked for; None: since the start or the last reset
    window_start: float  # true start: where old buckets are coarse, somewhat before the one asked for
    window_end: float
    tally: Tally
    last_activation: npt.NDArray[np.float64]  # [layers, experts], since the last reset whatever the window; NaN: never
    recent: tuple[RecentActivation, ...]  # within the window, oldest first
    half_life_minutes: float  # of the next
    decaying_rate: npt.NDArray[np.float64]  # [layers, experts], activations per second; whatever the window
    labels: Mapping[str, int]  # label → tokens, since the last reset whatever the window
    label: str | None = None  # the tally is that of this label only

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Experts of each layer, [layers]."""
        return np.array(self.expert_counts, np.int64)

    @cached_property
    def exists(self) -> npt.NDArray[np.bool_]:
        """Which cells of the grids are experts, [layers, experts]."""
        return np.asarray(np.arange(self.num_experts) < self.sizes[:, None])

    @property
    def window_seconds(self) -> float:
        return self.window_end - self.window_start


@dataclass(frozen=True)
class ResetResult:
    """What a reset forgot."""

    num_activations: int
    num_tokens: int
    num_requests: int
    seconds: float  # since the start or the reset before
