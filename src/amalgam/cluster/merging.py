"""What several replicas have measured, as if it had been one.

In: readings of their meters, states of their engines, saved sets of their expert statistics. Out: one of each. Must
never know: where they come from.

Counters and histograms are added up. What is true of a moment (running, waiting, blocks) is added up too; peaks are
the sum of peaks, which need not have come at the same time. Percentiles are of all requests together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from amalgam.base.histogram import Histogram
from amalgam.engine.meter import NUM_POINTS, POINT_SECONDS, Counts, Level, Point, Reading, SpeculationCounts
from amalgam.engine.request import EngineStatus
from amalgam.experts.history import Bucket, Tally
from amalgam.experts.saved.sets import SavedSet, merge

T = TypeVar("T")


def merge_histograms(histograms: Sequence[Histogram]) -> Histogram:
    """The values of all of them; all have the same bounds."""
    first = histograms[0]
    if any(other.bounds != first.bounds for other in histograms):
        raise ValueError("histograms with different bounds")
    counts = tuple(map(sum, zip(*(histogram.counts for histogram in histograms), strict=True)))
    return Histogram(first.bounds, counts, sum(histogram.sum for histogram in histograms))


def merge_readings(readings: Sequence[Reading]) -> Reading:
    """What the meters of all replicas have counted."""
    merged: dict[str, Any] = {}
    for field in fields(Reading):
        values = [value for reading in readings if (value := getattr(reading, field.name)) is not None]
        merged[field.name] = merge_histograms(values) if values and isinstance(values[0], Histogram) else None
    now = max(reading.now for reading in readings)
    speculations = [reading.speculation for reading in readings if reading.speculation is not None]
    return Reading(
        **{
            **merged,
            "now": now,
            "num_prompt_tokens": sum(reading.num_prompt_tokens for reading in readings),
            "num_new_tokens": sum(reading.num_new_tokens for reading in readings),
            "finished": added(reading.finished for reading in readings),
            "points": _merge_points([reading.points for reading in readings]),
            "latencies": [latency for reading in readings for latency in reading.latencies],
            "counts": Counts(*map(sum, zip(*(reading.counts for reading in readings), strict=True))),
            "speculation": _merge_speculations(speculations) if speculations else None,
        }
    )


def retired(reading: Reading) -> Reading:
    """What stays of a replica that has gone: its counts, and the past. Nothing runs there any more."""
    return replace(reading, now=0.0)


def merge_statuses(statuses: Collection[EngineStatus]) -> EngineStatus:
    """What the engines of all replicas do at this moment. A cluster lives even while it has no replica."""
    return EngineStatus(
        is_alive=True,
        is_draining=bool(statuses) and all(status.is_draining for status in statuses),
        num_running=sum(status.num_running for status in statuses),
        num_waiting=sum(status.num_waiting for status in statuses),
        num_free_blocks=sum(status.num_free_blocks for status in statuses),
        num_blocks=sum(status.num_blocks for status in statuses),
        versions=added(status.versions for status in statuses),
    )


def merge_saved_sets(sets: Sequence[SavedSet]) -> SavedSet:
    """The traffic of all replicas of one model, with its history.

    Raises:
        ConfigError: they are not of the same model.
    """
    merged = merge(sets)
    ticks = {item.tick_seconds for item in sets if item.buckets}
    if len(ticks) != 1:  # nothing in any, or replicas of different configurations, whose windows do not fit together
        return merged
    together: dict[tuple[int, int], Tally] = {}
    for item in sets:
        for bucket in item.buckets:
            place = bucket.first, bucket.stop
            together[place] = together[place] + bucket.tally if place in together else bucket.tally
    buckets = tuple(Bucket(*place, tally) for place, tally in sorted(together.items(), key=lambda item: item[0]))
    return replace(merged, buckets=buckets, tick_seconds=ticks.pop())


class Ledger:
    """The last reading of each replica, those that have gone too: what a counter has counted it never takes back.

    Prometheus takes a counter that falls for one that began anew, and would add its whole value again.
    """

    def __init__(self) -> None:
        self._readings: dict[str, Reading] = {}
        self._gone: Reading | None = None

    def note(self, replica_id: str, reading: Reading) -> None:
        """What a replica says of itself now."""
        self._readings[replica_id] = reading

    def retire(self, replica_id: str) -> None:
        """A replica has gone. What it has counted since it was last asked is not known."""
        reading = self._readings.pop(replica_id, None)
        if reading is not None:
            self._gone = retired(reading) if self._gone is None else retired(merge_readings([self._gone, reading]))

    def total(self) -> Reading | None:
        """All of them together; None: nothing is known of any."""
        known = [*self._readings.values(), *([] if self._gone is None else [self._gone])]
        return merge_readings(known) if known else None


def added(counts: Iterable[Mapping[T, int]]) -> dict[T, int]:
    """Each name with the sum of its counts."""
    found: Counter[T] = Counter()
    for each in counts:
        found.update(each)
    return dict(found)


def highest(one: Mapping[T, int], other: Mapping[T, int]) -> dict[T, int]:
    """Each name with the larger of its counts, which only grow: what was told later."""
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in {**one, **other}}


def _merge_points(series: Sequence[Sequence[Point]]) -> list[Point]:
    """Each replica's intervals begin when its own do; the merged ones begin at even multiples."""
    places: defaultdict[int, list[Point]] = defaultdict(list)
    for points in series:
        for point in points:
            places[round(point.time / POINT_SECONDS)].append(point)
    last = max(places)
    first = max(min(places), last - NUM_POINTS + 1)
    return [_merge_point(place * POINT_SECONDS, places.get(place, [])) for place in range(first, last + 1)]


def _merge_point(time: float, points: Sequence[Point]) -> Point:
    def level(levels: Iterable[Level]) -> Level:
        found = list(levels)
        return Level(sum(one.mean for one in found), sum(one.peak for one in found))

    return Point(
        time,
        sum(point.num_prompt_tokens for point in points),
        sum(point.num_new_tokens for point in points),
        level(point.running for point in points),
        level(point.waiting for point in points),
        level(point.used_blocks for point in points),
    )


def _merge_speculations(counts: Sequence[SpeculationCounts]) -> SpeculationCounts:
    length = max(len(count.accepted_at) for count in counts)
    places = [[*count.accepted_at, *[0] * (length - len(count.accepted_at))] for count in counts]
    return SpeculationCounts(
        num_drafts=sum(count.num_drafts for count in counts),
        num_proposed=sum(count.num_proposed for count in counts),
        num_accepted=sum(count.num_accepted for count in counts),
        accepted_at=tuple(map(sum, zip(*places, strict=True))),
        num_declined=sum(count.num_declined for count in counts),
        proposing_seconds=sum(count.proposing_seconds for count in counts),
    )
