"""Counts which experts the traffic activates, exactly.

In: the routing of each step, from the step thread (`models.context.RoutingObserver`). Out: `ExpertSnapshot`, to any
thread. Must never know HTTP, tokens' text, or which experts are stored in which format.

A step is counted as a whole, in `end_step`, or not at all; so at every moment
`activations = tokens × active experts × MoE layers`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.config import StatisticsSettings
from amalgam.errors import RequestError, describe
from amalgam.experts.history import GENERATED, NUM_PHASES, PROMPT, History, Tally, total

if TYPE_CHECKING:
    from amalgam.models.context import TokenSpan

_UNCOUNTED = NUM_PHASES  # the phase of rows that were recorded before, or belong to nobody


@dataclass(frozen=True)
class RecentActivation:
    """One expert's use in one step."""

    timestamp: float
    layer_id: int
    expert_id: int
    num_prompt_tokens: int
    num_generated_tokens: int


@dataclass(frozen=True)
class ExpertSnapshot:
    """A consistent copy of the statistics of one window of time. Times in seconds of the tracker's clock."""

    layer_ids: tuple[int, ...]  # decoder layer of each row of the grids
    num_experts: int  # per layer
    num_active_experts: int  # per token and layer
    started_at: float  # the tracker's start; a reset does not move it
    minutes: float | None  # the window asked for; None: since the start or the last reset
    window_start: float  # true start: where old buckets are coarse, somewhat before the one asked for
    window_end: float
    tally: Tally
    last_activation: npt.NDArray[np.float64]  # [layers, experts], since the last reset whatever the window; NaN: never
    recent: tuple[RecentActivation, ...]  # within the window, oldest first

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


@dataclass(frozen=True)
class _StepRecord:
    """The last cells that one step used, compact: `cells` are indices into the flattened [layers, experts] grid."""

    timestamp: float
    cells: npt.NDArray[np.int64]  # [n]
    counts: npt.NDArray[np.integer]  # [phases, n]


class ExpertTracker:
    """The `RoutingObserver` that keeps the statistics.

    `begin_step`, `observe` and `end_step` belong to the step thread; everything else may be called by any. `observe`
    only keeps what it is given, `end_step` adds it up on the device in a few operations over all layers and reads one
    grid back.

    Args:
        moe_layer_ids: decoder layer ids that have experts, in order.
        num_experts: experts per layer.
        top_k: active experts per token and layer.
        clock: seconds; the statistics' time never runs back even if the clock does.
    """

    def __init__(
        self,
        moe_layer_ids: Sequence[int],
        num_experts: int,
        top_k: int,
        settings: StatisticsSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._layer_ids = tuple(moe_layer_ids)
        self._num_experts = num_experts
        self._top_k = top_k
        self._settings = settings
        self._clock = clock

        self._spans: Sequence[TokenSpan] | None = None  # of the step under way
        self._routing: dict[int, tuple[Tensor, Tensor]] = {}

        self._lock = threading.Lock()  # guards everything below
        self._latest = clock()
        self._started_at = self._latest
        grid = (len(self._layer_ids), num_experts)
        self._history = History(*grid, settings.bucket_seconds, settings.history_minutes * 60)
        self._clear(self._latest)

    def begin_step(self, spans: Sequence[TokenSpan]) -> None:
        """Start a step. Whatever a step before it left unfinished is forgotten."""
        self._spans = spans
        self._routing.clear()

    def observe(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        """Take one layer's routing: `expert_ids` and `gate_weights`, each [tokens, top_k], on any device.

        The tensors are read in `end_step`: until then nobody may write to them.
        """
        self._routing[layer_id] = expert_ids, gate_weights

    def end_step(self) -> None:
        """Count the step."""
        spans, routing = self._spans, [self._routing[layer_id] for layer_id in self._layer_ids]
        assert spans is not None, "end_step without begin_step"
        self._spans = None
        self._routing.clear()
        step = count_step(spans, routing, self._num_experts)
        with self._lock:
            now = self._now()
            self._total.add(step)
            self._history.at(now).add(step)
            counts = step.counts.reshape(NUM_PHASES, -1)
            cells = np.flatnonzero(counts[PROMPT] + counts[GENERATED])
            self._last_activation.reshape(-1)[cells] = now
            self._remember(now, cells, counts)

    def count_request(self) -> None:
        """Count one request."""
        with self._lock:
            for tally in (self._total, self._history.at(self._now())):
                tally.num_requests[...] += 1

    def snapshot(self, minutes: float | None = None) -> ExpertSnapshot:
        """The statistics of the last `minutes`; None: since the start or the last reset.

        Raises:
            RequestError: `minutes` is not a number above 0 and at most `statistics.history_minutes`.
        """
        if minutes is not None:
            self._check_minutes(minutes)
        with self._lock:
            now = self._now()
            if minutes is None:
                start, tally, buckets = self._cleared_at, self._total.copy(), []
            else:
                start = now - minutes * 60
                buckets = self._history.since(start)
                if buckets:
                    start = min(start, self._history.start_of(buckets[0]))
                start = max(start, self._cleared_at)
            last_activation = self._last_activation.copy()
            records = list(self._records)
        if minutes is not None:  # closed buckets never change, so the step thread need not wait for their sum
            tally = total(buckets, *last_activation.shape)
        return ExpertSnapshot(
            layer_ids=self._layer_ids,
            num_experts=self._num_experts,
            num_active_experts=self._top_k,
            started_at=self._started_at,
            minutes=minutes,
            window_start=start,
            window_end=now,
            tally=tally,
            last_activation=last_activation,
            recent=self._expand([record for record in records if record.timestamp >= start]),
        )

    def reset(self) -> ResetResult:
        """Forget everything counted so far. A step under way is counted afterwards."""
        with self._lock:
            now = self._now()
            result = ResetResult(
                num_activations=int(self._total.counts.sum()),
                num_tokens=int(self._total.num_tokens.sum()),
                num_requests=int(self._total.num_requests),
                seconds=now - self._cleared_at,
            )
            self._clear(now)
            return result

    @property
    def nbytes(self) -> int:
        """Memory that the counters and the history hold."""
        with self._lock:
            records = sum(record.cells.nbytes + record.counts.nbytes for record in self._records)
            return self._history.nbytes + self._total.nbytes + self._last_activation.nbytes + records

    def _clear(self, now: float) -> None:
        grid = (len(self._layer_ids), self._num_experts)
        self._cleared_at = now
        self._total = Tally.zeros(*grid)
        self._last_activation = np.full(grid, np.nan)
        self._records: deque[_StepRecord] = deque()
        self._num_recorded = 0
        self._history.clear()

    def _now(self) -> float:
        self._latest = max(self._latest, self._clock())
        return self._latest

    def _remember(self, now: float, cells: npt.NDArray[np.int64], counts: npt.NDArray[np.integer]) -> None:
        """Keep the step's last cells, and of older steps only those that are needed to fill the list."""
        limit = self._settings.recent_activations
        cells = cells[max(0, len(cells) - limit) :]
        if not len(cells):
            return
        self._records.append(_StepRecord(now, cells, counts[:, cells]))
        self._num_recorded += len(cells)
        while self._num_recorded - len(self._records[0].cells) >= limit:
            self._num_recorded -= len(self._records.popleft().cells)

    def _expand(self, records: Sequence[_StepRecord]) -> tuple[RecentActivation, ...]:
        expanded = []
        for record in records:
            rows = zip(record.cells.tolist(), *record.counts.tolist(), strict=True)
            for cell, num_prompt, num_generated in rows:
                row, expert_id = divmod(cell, self._num_experts)
                layer_id = self._layer_ids[row]
                expanded.append(RecentActivation(record.timestamp, layer_id, expert_id, num_prompt, num_generated))
        return tuple(expanded[max(0, len(expanded) - self._settings.recent_activations) :])

    def _check_minutes(self, minutes: float) -> None:
        limit = self._settings.history_minutes
        is_number = isinstance(minutes, int | float) and not isinstance(minutes, bool)
        if not is_number or not 0 < minutes <= limit:
            raise RequestError(
                f"minutes is {describe(minutes)}.",
                remedy=f"Allowed: a number above 0 up to {limit:g} (statistics.history_minutes).",
            )


@torch.inference_mode()
def count_step(spans: Sequence[TokenSpan], routing: Sequence[tuple[Tensor, Tensor]], num_experts: int) -> Tally:
    """Add up one step on the routing's device and read the result back.

    Args:
        routing: per MoE layer, expert ids and gate weights, each [tokens, top_k].
    """
    num_rows = len(routing[0][0]) if routing else max((span.stop for span in spans), default=0)
    phases = _row_phases(spans, num_rows)
    num_tokens = np.bincount(phases, minlength=NUM_PHASES + 1)[:NUM_PHASES]
    if not routing:
        return replace(Tally.zeros(0, num_experts), num_tokens=num_tokens)
    expert_ids = torch.stack([ids for ids, _ in routing])  # [layers, tokens, top_k]
    gate_weights = torch.stack([weights for _, weights in routing]).double()
    device, num_cells = expert_ids.device, len(routing) * num_experts
    layers = torch.arange(0, num_cells, num_experts, device=device).view(-1, 1, 1)
    rows = torch.from_numpy(phases * num_cells).to(device).view(1, -1, 1)
    cells = (expert_ids + layers + rows).view(-1)  # into [phases + 1, layers, experts], the last plane uncounted

    def grid(values: Tensor) -> np.ndarray:
        planes = torch.zeros((NUM_PHASES + 1) * num_cells, dtype=values.dtype, device=device)
        planes.scatter_add_(0, cells, values)
        return planes[: NUM_PHASES * num_cells].cpu().numpy().reshape(NUM_PHASES, len(routing), num_experts)

    return Tally(grid(torch.ones_like(cells)), grid(gate_weights.view(-1)), num_tokens, np.zeros((), np.int64))


def _row_phases(spans: Sequence[TokenSpan], num_rows: int) -> npt.NDArray[np.int64]:
    """The phase of each row of a step, [tokens]; rows recorded before, and rows of no span, are uncounted."""
    phases = np.full(num_rows, _UNCOUNTED, np.int64)
    for span in spans:
        first = max(span.start, span.record_from)
        turn = min(max(first, span.generated_from), span.stop)
        phases[first:turn] = PROMPT
        phases[turn : span.stop] = GENERATED
    return phases
