"""Random steps and their count by brute force, for the tests of the expert statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from amalgam.base import clock as base
from amalgam.config.statistics import StatisticsSettings
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.routing import TokenSpan

LAYER_IDS = (1, 2, 4)  # layers 0 and 3 are dense
NUM_EXPERTS = 8
TOP_K = 2
START = 1_000_000.0


class Clock:
    """A clock that tests move.

    Attributes:
        ahead: by how much the wall clock has been set forward since the start.
    """

    def __init__(self, now: float = START) -> None:
        self.now = now
        self.ahead = 0.0

    def wall(self) -> float:
        return self.now + self.ahead

    def steady(self) -> float:
        return self.now - START  # has another origin

    @property
    def system(self) -> base.Clock:
        return base.Clock(self.wall, self.steady)


def make_tracker(clock: Clock, **settings: float) -> ExpertTracker:
    return ExpertTracker(LAYER_IDS, NUM_EXPERTS, TOP_K, StatisticsSettings.model_validate(settings), clock.system)


def span(
    num_rows: int, start: int = 0, *, record_from: int | None = None, generated_from: int | None = None, **others: Any
) -> TokenSpan:
    """Rows `[start, start + num_rows)`; all new prompt tokens unless told otherwise."""
    stop = start + num_rows
    return TokenSpan(
        start=start,
        stop=stop,
        record_from=start if record_from is None else record_from,
        generated_from=stop if generated_from is None else generated_from,
        **{"request_id": 0, **others},
    )


def route(rng: np.random.Generator, num_rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Expert ids and gate weights `[rows, k]` for each layer."""
    return [
        (np.argsort(rng.random((num_rows, NUM_EXPERTS)))[:, :TOP_K], rng.random((num_rows, TOP_K)).astype(np.float32))
        for _ in LAYER_IDS
    ]


def run_step(
    tracker: ExpertTracker,
    spans: Sequence[TokenSpan],
    routing: list[tuple[np.ndarray, np.ndarray]],
    *,
    fails: bool = False,
    rejected: Mapping[int, int] | None = None,
) -> None:
    """One step; one that fails stops after the first layer."""
    tracker.begin_step(spans)
    for layer_id, (expert_ids, gate_weights) in zip(LAYER_IDS, routing, strict=True):
        tracker.observe(layer_id, torch.from_numpy(expert_ids), torch.from_numpy(gate_weights))
        if fails:
            return
    tracker.end_step(rejected)


def run_tokens(tracker: ExpertTracker, num_tokens: int, seed: int = 0) -> None:
    """One step of one request's `num_tokens` prompt tokens."""
    run_step(tracker, [span(num_tokens)], route(np.random.default_rng(seed), num_tokens))


def busy_tracker(seed: int, clock: Clock | None = None, **settings: Any) -> ExpertTracker:
    tracker, rng = make_tracker(clock or Clock(), pair_sampling=1, **settings), np.random.default_rng(seed)
    for label in ("en", "zh"):
        tracker.admit(0, label, 0)
        tracker.count_request(label)
    run_step(tracker, [span(5, label="en", generated_from=3), span(4, 5, label="zh"), span(1, 9)], route(rng, 10))
    return tracker
