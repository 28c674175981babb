"""The statistics together with what they mean for the weights in use: what `/expert_stats` and the reports show.

In: a tracker, and a weight version. Out: an `Overview`. Must never know: HTTP.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amalgam.errors import AmalgamError, RequestError, describe
from amalgam.experts import saved
from amalgam.experts.comparison import compare, jensen_shannon, mean_or_none
from amalgam.experts.hints import Hint, find_hints
from amalgam.experts.precision_map import PrecisionMap, precision_map
from amalgam.experts.statistics import describe_experts
from amalgam.experts.tracker import ExpertSnapshot, ExpertTracker
from amalgam.models.weights import WeightVersion

DRIFT_MINUTES = 5.0
SINCE_RESET = "since the last reset"


@dataclass(frozen=True)
class Overview:
    """A snapshot and what was made of it."""

    snapshot: ExpertSnapshot
    precisions: PrecisionMap | None
    drift: dict[str, Any]  # as `drift_or_reason` gives it
    hints: list[Hint]

    def as_json(self, top_k: int | None = None) -> dict[str, Any]:
        """The answer of `/expert_stats`.

        Raises:
            RequestError: `top_k` is out of range.
        """
        answer = describe_experts(self.snapshot, top_k)
        return answer | {"drift": self.drift, "hints": [hint.as_json() for hint in self.hints]}


def survey(tracker: ExpertTracker, version: WeightVersion | None, minutes: float | None = None) -> Overview:
    """Take stock.

    Args:
        version: whose precisions to look at; None: of none.

    Raises:
        RequestError: `minutes` is out of range.
    """
    snapshot = tracker.snapshot(minutes)
    precisions = None if version is None else precision_map(version, tracker.layer_ids, tracker.num_experts)
    drifted = drift_or_reason(tracker)
    return Overview(snapshot, precisions, drifted, find_hints(snapshot, precisions, tracker.label_tallies(), drifted))


def drift(tracker: ExpertTracker) -> dict[str, Any]:
    """How the last minutes differ from the reference: `statistics.reference`, or what was counted before them.

    Raises:
        AmalgamError: the reference is missing, damaged or of another model.
    """
    settings = tracker.settings
    minutes = min(DRIFT_MINUTES, settings.history_minutes)
    recent = tracker.snapshot(minutes).tally
    if settings.reference:
        reference = _load_reference(settings.reference)
        where = f"statistics.reference {settings.reference!r}"
        reference.check_fits(tracker.layer_ids, tracker.num_experts, where)
        counts, num_tokens, name = reference.total.counts.sum(axis=0), reference.total.num_tokens.sum(), reference.model
        name = f"statistics.reference, {name}"
    else:
        everything = tracker.snapshot().tally
        counts = np.maximum(everything.counts.sum(axis=0) - recent.counts.sum(axis=0), 0)
        num_tokens, name = max(everything.num_tokens.sum() - recent.num_tokens.sum(), 0), SINCE_RESET
    divergence = jensen_shannon(recent.counts.sum(axis=0), counts)
    return {
        "minutes": minutes,
        "tokens": int(recent.num_tokens.sum()),
        "reference": name,
        "reference_tokens": int(num_tokens),
        "jensen_shannon": {
            "by_layer": [None if np.isnan(value) else value for value in divergence.tolist()],
            "mean": mean_or_none(divergence),
        },
    }


def drift_or_reason(tracker: ExpertTracker) -> dict[str, Any]:
    """`drift`, or `{"error": why}`: without their reference the counts are as good as ever."""
    try:
        return drift(tracker)
    except AmalgamError as error:
        return {"error": str(error)}


def compare_traffic(tracker: ExpertTracker, first: str, second: str, folder: str) -> dict[str, Any]:
    """Compare two of: `all`, `label:NAME`, `minutes:N`, `saved:NAME` (a saved set in `folder`).

    Raises:
        AmalgamError: one of them is nothing of the kind, or unknown.
    """
    return {
        "a": first,
        "b": second,
        "layer_ids": list(tracker.layer_ids),
        "num_experts": tracker.num_experts,
        **compare(_counts_of(tracker, first, folder), _counts_of(tracker, second, folder)),
    }


def _counts_of(tracker: ExpertTracker, text: str, folder: str) -> npt.NDArray[np.integer]:
    kind, _, name = text.partition(":")
    if text == "all":
        return np.asarray(tracker.snapshot().tally.counts.sum(axis=0))
    if kind == "label" and name:
        return np.asarray(tracker.snapshot(label=name).tally.counts.sum(axis=0))
    if kind == "minutes" and name:
        try:
            minutes = float(name)
        except ValueError:
            raise RequestError(f"{describe(text)} has no number of minutes.", remedy="Write minutes:5.") from None
        return np.asarray(tracker.snapshot(minutes).tally.counts.sum(axis=0))
    if kind == "saved" and name:
        loaded = saved.load_named(folder, name)
        loaded.check_fits(tracker.layer_ids, tracker.num_experts, f"The saved set {name!r}")
        return np.asarray(loaded.total.counts.sum(axis=0))
    raise RequestError(
        f"{describe(text)} names no traffic.", remedy="Allowed: all, label:NAME, minutes:N or saved:NAME."
    )


@functools.lru_cache(maxsize=1)
def _load_reference(path: str) -> saved.SavedSet:
    return saved.load(path)
