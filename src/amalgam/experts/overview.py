"""The statistics together with what they mean for the weights in use: what `/expert_stats` and the reports show.

In: a tracker, and a weight version. Out: an `Overview`. Must never know: HTTP.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from amalgam.config.statistics import StatisticsSettings
from amalgam.errors import AmalgamError, RequestError, describe
from amalgam.experts.comparison import compare, jensen_shannon, mean_or_none
from amalgam.experts.hints import Hint, find_hints
from amalgam.experts.history import Tally
from amalgam.experts.precision_map import PrecisionMap, precision_map
from amalgam.experts.saved.files import load
from amalgam.experts.saved.folder import load_named
from amalgam.experts.saved.sets import SavedSet
from amalgam.experts.snapshot import ExpertSnapshot
from amalgam.experts.statistics import describe_experts, measured
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.weights import WeightVersion

DRIFT_MINUTES = 5.0
SINCE_RESET = "since the last reset"
TRAFFIC = ("all", "label:NAME", "rest:NAME", "minutes:N", "before:N", "reference", "saved:NAME")
"""What can be compared: everything since the last reset; the requests with a label, and all others; the last minutes,
and what came before them; `statistics.reference`; a saved set.
"""


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


def build_overview(tracker: ExpertTracker, version: WeightVersion | None, minutes: float | None = None) -> Overview:
    """The statistics as they are now.

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
    minutes = drift_minutes(tracker.settings)
    recent = tracker.snapshot(minutes).tally
    if tracker.settings.reference:
        saved_set = _reference(tracker)
        reference, name = saved_set.total, f"statistics.reference, {saved_set.model}"
    else:
        reference, name = _before(tracker, minutes), SINCE_RESET
    divergence = jensen_shannon(recent.counts.sum(axis=0), reference.counts.sum(axis=0))
    return {
        "minutes": minutes,
        "tokens": int(recent.num_tokens.sum()),
        "reference": name,
        "reference_tokens": int(reference.num_tokens.sum()),
        "compare": drift_sides(tracker.settings),
        "jensen_shannon": {
            "by_layer": [None if np.isnan(value) else value for value in divergence.tolist()],
            "mean": mean_or_none(divergence),
        },
    }


def drift_minutes(settings: StatisticsSettings) -> float:
    """How long the recent past is."""
    return min(DRIFT_MINUTES, settings.history_minutes)


def drift_sides(settings: StatisticsSettings) -> dict[str, str]:
    """The two sides of the drift, as `compare_traffic` takes them."""
    minutes = repr(drift_minutes(settings)).removesuffix(".0")
    return {"a": f"minutes:{minutes}", "b": "reference" if settings.reference else f"before:{minutes}"}


def drift_or_reason(tracker: ExpertTracker) -> dict[str, Any]:
    """`drift`, or `{"error": why}`: without their reference the counts are as good as ever."""
    try:
        return drift(tracker)
    except AmalgamError as error:
        return {"error": str(error)}


def compare_traffic(
    tracker: ExpertTracker, first: str, second: str, folder: str, phase: str = "all", measure: str = "count"
) -> dict[str, Any]:
    """Compare two kinds of traffic, each one of `TRAFFIC`.

    Args:
        folder: where saved sets are.
        phase, measure: as in `statistics.grid`.

    Raises:
        AmalgamError: one of them is nothing of the kind, or unknown.
    """
    tallies = [_tally_of(tracker, text, folder) for text in (first, second)]
    return {
        "a": first,
        "b": second,
        "phase": phase,
        "measure": measure,
        "layer_ids": list(tracker.layer_ids),
        "num_experts": tracker.num_experts,
        **compare(*(measured(tally, phase, measure) for tally in tallies)),
    }


def _tally_of(tracker: ExpertTracker, text: str, folder: str) -> Tally:
    if text == "all":
        return tracker.snapshot().tally
    if text == "reference":
        return _reference(tracker).total
    kind, _, name = text.partition(":")
    if name:
        if kind == "label":
            return tracker.snapshot(label=name).tally
        if kind == "rest":
            part = tracker.snapshot(label=name).tally
            return _without(tracker.snapshot().tally, part)
        if kind == "minutes":
            return tracker.snapshot(_minutes_in(text)).tally
        if kind == "before":
            return _before(tracker, _minutes_in(text))
        if kind == "saved":
            saved = load_named(folder, name)
            saved.check_fits(tracker.layer_ids, tracker.expert_counts, f"The saved set {name!r}")
            return saved.total
    raise RequestError(f"{describe(text)} names no traffic.", remedy=f"Allowed: {', '.join(TRAFFIC)}.")


def _minutes_in(text: str) -> float:
    try:
        return float(text.partition(":")[2])
    except ValueError:
        raise RequestError(f"{describe(text)} has no number of minutes.", remedy="Write minutes:5.") from None


def _before(tracker: ExpertTracker, minutes: float) -> Tally:
    """What was counted since the last reset, but for the last `minutes`."""
    recent = tracker.snapshot(minutes).tally
    return _without(tracker.snapshot().tally, recent)


def _without(whole: Tally, part: Tally) -> Tally:
    """`whole` less `part`, where a reset may have come between the two, and gate mass is rounded."""
    counts = np.maximum(whole.counts - part.counts, 0)
    return Tally(
        counts=counts,
        gate_mass=np.where(counts > 0, np.maximum(whole.gate_mass - part.gate_mass, 0), 0),
        num_tokens=np.maximum(whole.num_tokens - part.num_tokens, 0),
        num_requests=np.maximum(whole.num_requests - part.num_requests, 0),
    )


def _reference(tracker: ExpertTracker) -> SavedSet:
    path = tracker.settings.reference
    if not path:
        raise RequestError("There is no reference.", remedy="Set statistics.reference to a saved set.")
    reference = _load_reference(path)
    reference.check_fits(tracker.layer_ids, tracker.expert_counts, f"statistics.reference {path!r}")
    return reference


@functools.lru_cache(maxsize=1)
def _load_reference(path: str) -> SavedSet:
    return load(path)
