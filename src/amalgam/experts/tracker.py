"""Counts which experts the traffic activates, exactly.

In: the routing of each step, from the step thread (`models.routing.RoutingObserver`). Out: `ExpertSnapshot`, to any
thread. Must never know HTTP, tokens' text, or which experts are stored in which format.

A step is counted as a whole, in `end_step`, or not at all; so at every moment
`activations = tokens × active experts × MoE layers`. Steps are kept as they are and summed up together, when there are
some dozens or somebody asks: for each to be summed up alone would cost several times as much.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.base.clock import Clock
from amalgam.base.histogram import Bins, Histogram
from amalgam.config.statistics import StatisticsSettings
from amalgam.errors import RequestError, describe
from amalgam.experts.autosave import Autosave
from amalgam.experts.history import DecayingRate, History, Tally, moved, total
from amalgam.experts.labels import LabelTallies
from amalgam.experts.pairs import LayerPairs, PairCounter
from amalgam.experts.recent import RecentActivations
from amalgam.experts.recording import Rows, Step
from amalgam.experts.saved.sets import SavedSet
from amalgam.experts.snapshot import ExpertSnapshot, ResetResult
from amalgam.experts.traces import TraceStore

if TYPE_CHECKING:
    from amalgam.models.routing import RoutingTrace, TokenSpan

_MAX_PENDING_ROWS = 256
_MAX_PENDING_STEPS = 64
_DISTINCT_BOUNDS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_NOISE_SECONDS = 1.0  # a clock that is corrected by so little has not been set
_FORMER_TICK_SECONDS = 5.0  # the default when files did not hold it yet

logger = logging.getLogger("amalgam.experts")


class ExpertTracker:
    """The `RoutingObserver` that keeps the statistics.

    `begin_step`, `observe`, `observe_all` and `end_step` belong to the step thread; everything else, to any.

    Args:
        moe_layer_ids: decoder layer ids that have experts, in order.
        num_experts: experts of each layer; one number: all have as many.
        top_k: active experts per token and layer.
        clock: gives the times; what is shown and saved follows the wall clock as it is set then.
        model: its name, for saved sets.
    """

    def __init__(
        self,
        moe_layer_ids: Sequence[int],
        num_experts: int | Sequence[int],
        top_k: int,
        settings: StatisticsSettings,
        clock: Clock | None = None,
        model: str = "",
    ) -> None:
        self.layer_ids = tuple(moe_layer_ids)
        if isinstance(num_experts, int):
            num_experts = (num_experts,) * len(self.layer_ids)
        self.expert_counts = tuple(num_experts)
        self.num_experts = max(self.expert_counts, default=0)
        self.settings = settings
        self._top_k = top_k
        self._clock = Clock() if clock is None else clock
        self._model = model
        self._autosave: Autosave | None = None

        self._spans: Sequence[TokenSpan] | None = None  # of the step under way
        self._routing: dict[int, tuple[Tensor, Tensor]] = {}  # layer by layer
        self._routing_of_all: tuple[Tensor, Tensor] | None = None  # or at once
        self._latest_ids: Tensor | None = None  # of the step that has ended last, [layers, tokens, top_k]

        self._lock = threading.Lock()  # guards everything below
        self.revision = 0  # changes whenever the statistics do
        self._latest = self._clock.now()
        self._started_at = self._latest
        self._tick_end = -np.inf
        self._pending: list[Step] = []
        self._num_pending_rows = 0
        grid = (len(self.layer_ids), self.num_experts)
        self._history = History(*grid, settings.bucket_seconds, settings.history_minutes * 60)
        self._recent = RecentActivations(self.layer_ids, self.num_experts, settings.recent_activations)
        self._labels = LabelTallies(*grid, settings.max_labels)
        self._pairs = PairCounter(*grid, settings.pair_sampling)
        self._traces = TraceStore(self.layer_ids, top_k, settings.trace_bytes)
        self._distinct = Bins(_DISTINCT_BOUNDS)
        self._beside_total = np.zeros(grid, np.int64)  # forgotten since the start, less what came from a file
        self._clear(self._latest)

    def admit(self, request_id: int, label: str | None, num_traced_tokens: int) -> None:
        """See `RoutingObserver.admit`."""
        with self._lock:
            if label is not None:
                self._labels.admit(label)
            if num_traced_tokens:
                self._traces.admit(request_id, num_traced_tokens)

    def begin_step(self, spans: Sequence[TokenSpan]) -> None:
        """Start a step. Whatever a step before it left unfinished is forgotten."""
        self._spans, self._routing_of_all = spans, None
        self._routing.clear()

    def observe(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        """Take one layer's routing: `expert_ids` and `gate_weights`, each [tokens, top_k], on any device.

        Nobody may write to the tensors before `end_step` has returned.
        """
        self._routing[layer_id] = expert_ids, gate_weights

    def observe_all(self, expert_ids: Tensor, gate_weights: Tensor) -> None:
        """Take all layers' routing, each [layers, tokens, top_k]. On the CPU, nobody may write to them ever after."""
        self._routing_of_all = expert_ids, gate_weights

    def end_step(self, rejected: Mapping[int, int] | None = None) -> None:
        """Count the step; see `RoutingObserver.end_step`."""
        spans = self._spans
        assert spans is not None, "end_step without begin_step"
        self._spans = None
        if rejected:
            spans = [span._replace(stop=span.stop - rejected.get(span.request_id, 0)) for span in spans]
        routing, self._routing_of_all = self._routing_of_all, None
        if routing is None:
            routing = self._layer_by_layer(spans)
        elif not routing[0].is_cpu:
            # A captured graph writes to the same tensors again; on the CPU each step has its own.
            routing = routing[0].clone(), routing[1].clone()
        self._latest_ids, num_rows = routing[0], routing[0].shape[1]
        with self._lock:
            now = self._advance()  # which may take what was pending
            self._pending.append(Step(now, spans, num_rows, *routing))
            self._num_pending_rows += num_rows
            self.revision += 1
            if self._num_pending_rows >= _MAX_PENDING_ROWS or len(self._pending) >= _MAX_PENDING_STEPS:
                self._sum_up()

    def count_request(self, label: str | None = None) -> None:
        """Count one request."""
        with self._lock:
            tallies = [self._total, self._history.at(self._advance())]
            if label is not None and (tally := self._labels.tally(label)) is not None:
                tallies.append(tally)
            for tally in tallies:
                tally.num_requests[...] += 1

    def take_trace(self, request_id: int) -> RoutingTrace | None:
        """See `RoutingObserver.take_trace`."""
        with self._lock:
            self._sum_up()
            return self._traces.take(request_id)

    def distinct_experts(self) -> Histogram:
        """See `RoutingObserver.distinct_experts`. Since the start: a reset leaves it as it is."""
        with self._lock:
            self._sum_up()
            return self._distinct.read()

    def activations(self) -> npt.NDArray[np.int64]:
        """How often each expert was activated since the start, [layers, experts]: a reset leaves it as it is."""
        with self._lock:
            self._sum_up()
            counts: npt.NDArray[np.int64] = self._total.counts.sum(axis=0, dtype=np.int64) + self._beside_total
        return counts

    def distinct_in_step(self) -> float | None:
        """See `RoutingObserver.distinct_in_step`."""
        if self._latest_ids is None:
            return None
        expert_ids = self._latest_ids.cpu().numpy()
        is_used = np.zeros((len(expert_ids), self.num_experts), bool)
        np.put_along_axis(is_used, expert_ids.reshape(len(expert_ids), -1), True, axis=1)
        return float(is_used.sum()) / len(expert_ids)

    def snapshot(self, minutes: float | None = None, label: str | None = None) -> ExpertSnapshot:
        """The statistics of the last `minutes`; None: since the start or the last reset.

        Args:
            label: of requests with this label only.

        Raises:
            RequestError: `minutes` is not a number above 0 and at most `statistics.history_minutes`, nothing is counted
                under `label`, or both are given.
        """
        if minutes is not None:
            self._check_minutes(minutes)
            if label is not None:
                raise RequestError(
                    "minutes and label are given together.", remedy="Give one of them: labels are not kept over time."
                )
        with self._lock:
            now = self._advance()
            self._sum_up()
            if minutes is None:
                tally = self._total.copy() if label is None else self._labels.get(label)
                start, buckets = self._cleared_at, []
            else:
                start = now - minutes * 60
                buckets = self._history.since(start)
                if buckets:
                    start = min(start, self._history.start_of(buckets[0]))
                start = max(start, self._cleared_at)
            last_activation = self._last_activation.copy()
            decaying_rate = self._decaying.read(now)
            labels = self._labels.num_tokens()
            records = self._recent.records()
            shift = self._clock.shift()
        if minutes is not None:  # closed buckets never change, so the step thread need not wait for their sum
            tally = total(buckets, *last_activation.shape)
        return ExpertSnapshot(
            layer_ids=self.layer_ids,
            num_experts=self.num_experts,
            expert_counts=self.expert_counts,
            num_active_experts=self._top_k,
            started_at=self._started_at + shift,
            minutes=minutes,
            window_start=start + shift,
            window_end=now + shift,
            tally=tally,
            last_activation=last_activation + shift,
            recent=self._recent.expand((record for record in records if record.timestamp >= start), shift),
            half_life_minutes=self.settings.half_life_minutes,
            decaying_rate=decaying_rate,
            labels=labels,
            label=label,
        )

    def layer_pairs(self, layer_id: int) -> LayerPairs:
        """Which experts of one layer work together, and which of the next follow them.

        Raises:
            RequestError: the layer has no experts.
        """
        if isinstance(layer_id, bool) or layer_id not in self.layer_ids:
            raise RequestError(
                f"layer_id is {describe(layer_id)}.", remedy=f"Layers with experts: {describe(list(self.layer_ids))}."
            )
        index = self.layer_ids.index(layer_id)
        with self._lock:
            self._sum_up()
            if self._pairs.sampling:
                num_tokens, together, onward = self._pairs.layer(index)
            else:
                num_tokens, together, onward = 0, np.zeros((self.num_experts, self.num_experts), np.int64), None
        is_last = index == len(self.layer_ids) - 1
        next_layer_id = None if is_last else self.layer_ids[index + 1]
        return LayerPairs(num_tokens, self._pairs.sampling, together, onward, next_layer_id)

    def label_tallies(self) -> dict[str, Tally]:
        """The counts of each label since the last reset."""
        with self._lock:
            self._sum_up()
            return self._labels.copy()

    def reset(self) -> ResetResult:
        """Forget everything counted so far, labels too. A step under way is counted afterwards."""
        with self._lock:
            now = self._advance()
            self._sum_up()
            result = ResetResult(
                num_activations=int(self._total.counts.sum()),
                num_tokens=int(self._total.num_tokens.sum()),
                num_requests=int(self._total.num_requests),
                seconds=now - self._cleared_at,
            )
            self._beside_total += self._total.counts.sum(axis=0, dtype=np.int64)
            self._clear(now)
            self.revision += 1
            return result

    def saved_set(self, *, with_history: bool = False) -> SavedSet:
        """Everything counted since the last reset, to be written to a file."""
        with self._lock:
            now, shift = self._advance(), self._clock.shift()
            ticks = round(shift / self.settings.bucket_seconds)
            self._sum_up()
            return SavedSet(
                model=self._model,
                layer_ids=self.layer_ids,
                num_experts=self.num_experts,
                num_active_experts=self._top_k,
                start=max(self._cleared_at + shift, 0.0),
                end=max(now + shift, 0.0),
                total=self._total.copy(),
                last_activation=np.maximum(self._last_activation + shift, 0.0),
                labels=self._labels.copy(),
                pairs=self._pairs.read() if self._pairs.sampling else None,
                buckets=tuple(moved(self._history.since(-np.inf), ticks)) if with_history else (),
                tick_seconds=self.settings.bucket_seconds if with_history else None,
                own_counts=self.expert_counts if min(self.expert_counts, default=0) < self.num_experts else (),
            )

    def restore(self, saved: SavedSet, where: str) -> None:
        """Go on from a saved set; nothing has been counted yet.

        Raises:
            ConfigError: it is of another model.
        """
        saved.check_fits(self.layer_ids, self.expert_counts, where, self._top_k)
        with self._lock:
            now = self._advance()
            if now < saved.end < now + _NOISE_SECONDS:
                self._latest = now = saved.end
            # The clock may have been set back since: then the file ends now, and all in it is as long ago as it was.
            shift = min(now - saved.end, 0.0)
            tick_seconds = saved.tick_seconds or _FORMER_TICK_SECONDS
            self._cleared_at = saved.start + shift
            self._total.add(saved.total)
            self._beside_total -= saved.total.counts.sum(axis=0, dtype=np.int64)
            self._last_activation[...] = np.fmin(saved.last_activation + shift, now)
            for label, tally in saved.labels.items():
                if (mine := self._labels.tally(label)) is not None:
                    mine.add(tally)
            if saved.pairs is not None:
                self._pairs.restore(saved.pairs)
            self._history.restore(moved(saved.buckets, math.floor(shift / tick_seconds)), tick_seconds, now)
        if num_dropped := max(len(saved.labels) - self.settings.max_labels, 0):
            logger.warning(
                "%s has %d labels, and statistics.max_labels is %d: the last %d of them are dropped.",
                where,
                len(saved.labels),
                self.settings.max_labels,
                num_dropped,
            )
        if saved.buckets and saved.tick_seconds is None:
            logger.warning(
                "%s does not say its statistics.bucket_seconds; its windows are read as if it had been %g.",
                where,
                _FORMER_TICK_SECONDS,
            )

    def restore_rates(self, rates: npt.NDArray[np.float64]) -> None:
        """Go on from experts' decaying rates, [layers, experts], which a saved set does not hold."""
        with self._lock:
            self._decaying.restore(rates, self._advance())

    def autosave_to(self, path: Path) -> None:
        """Go on from the statistics in a file, if there is one, and save them in it at intervals and at the end.

        Raises:
            CheckpointError: the file is damaged.
            ConfigError: it is of another model.
        """
        self._autosave = Autosave(self, path, self.settings.save_seconds)

    def close(self) -> None:
        """No step follows; the statistics are saved once more if they are to be."""
        if self._autosave is not None:
            self._autosave.close()

    @property
    def nbytes(self) -> int:
        """Memory that the counters, the history and the traces hold, or may come to hold."""
        with self._lock:
            counters = (self._total, self._last_activation, self._labels, self._pairs)
            return sum(part.nbytes for part in (*counters, self._history, self._recent, self._traces))

    def _clear(self, now: float) -> None:
        grid = (len(self.layer_ids), self.num_experts)
        self._cleared_at = now
        self._total = Tally.zeros(*grid)
        self._last_activation = np.full(grid, np.nan)
        self._decaying = DecayingRate(*grid, self.settings.half_life_minutes * 60, now)
        for part in (self._history, self._recent, self._labels, self._pairs):
            part.clear()

    def _layer_by_layer(self, spans: Sequence[TokenSpan]) -> tuple[Tensor, Tensor]:
        """The routing of the step under way as one, each [layers, rows, top_k]."""
        layers = [self._routing[layer_id] for layer_id in self.layer_ids]
        self._routing.clear()
        if not layers:
            num_rows = max((span.stop for span in spans), default=0)
            return torch.empty((0, num_rows, 0), dtype=torch.int64), torch.empty((0, num_rows, 0))
        return torch.stack([ids for ids, _ in layers]), torch.stack([weights for _, weights in layers])

    def _advance(self) -> float:
        """The time; what is pending is summed up when a tick of the history is over."""
        self._latest = max(self._latest, self._clock.now())
        if self._latest >= self._tick_end:
            self._sum_up()
            self._tick_end = self._history.end_of_tick(self._latest)
        return self._latest

    def _sum_up(self) -> None:
        """Count the pending steps, all of which lie in one tick of the history."""
        if not self._pending:
            return
        steps, self._pending, self._num_pending_rows = self._pending, [], 0
        rows = Rows.read(steps, self.num_experts)
        now, starts = steps[-1].timestamp, np.cumsum([0, *(step.num_rows for step in steps)])
        for step, first in zip(steps, starts.tolist(), strict=False):
            self._take_spans(step, rows, first)
        for num_experts in rows.distinct_experts(starts.tolist()).tolist():
            self._distinct.add(num_experts)
        counted = rows.counted
        tally = counted.tally()
        self._total.add(tally)
        self._history.at(now).add(tally)
        self._decaying.add(tally.counts.sum(axis=0), now)
        self._pairs.add(counted)
        times = np.repeat([step.timestamp for step in steps], np.diff(starts))[rows.is_counted]
        # Of several values for one cell the last is kept, and rows are in the order of their steps.
        values = np.broadcast_to(times[None, :, None], counted.cells.shape)
        self._last_activation.reshape(-1)[counted.cells.reshape(-1)] = values.reshape(-1)
        self._recent.add(steps, rows, starts.tolist())

    def _take_spans(self, step: Step, rows: Rows, first: int) -> None:
        """Labels and traces of one step, whose rows begin at `first`."""
        of_label: dict[str, list[slice]] = {}
        of_step: Rows | None = None
        for span in step.spans:
            if span.label is None and not span.wants_trace:
                continue
            of_step = rows[slice(first, first + step.num_rows)] if of_step is None else of_step
            if span.wants_trace:
                self._traces.add(span, of_step)
            if span.label is not None:
                of_label.setdefault(span.label, []).append(slice(max(span.start, span.record_from), span.stop))
        for label, slices in of_label.items():
            tally = self._labels.tally(label)
            if of_step is not None and tally is not None:
                index = np.concatenate([np.arange(part.start, part.stop) for part in slices])
                of_step[index].counted.add_to(tally)

    def _check_minutes(self, minutes: float) -> None:
        limit = self.settings.history_minutes
        is_number = isinstance(minutes, int | float) and not isinstance(minutes, bool)
        if not is_number or not 0 < minutes <= limit:
            raise RequestError(
                f"minutes is {describe(minutes)}.",
                remedy=f"Allowed: a number above 0 up to {limit:g} (statistics.history_minutes).",
            )
