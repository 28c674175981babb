"""The highest rate of requests that a server bears.

In: a function that measures a load. Out: the rate, and what was measured on the way. Must never know how.

First clients that ask one question after another, twice as many each time, until doubling them twice gets no more
answered: that is the server's capacity. Then rates around it, each time halving the interval between the highest that
was borne and the lowest that was not, until it is narrow enough. What is found is measured once more, with other
arrivals: a rate somewhat too high is borne by luck now and then, but hardly twice.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from amalgam.tools.load.metrics import SLOPE_SHARE, Point
from amalgam.tools.load.running import Arrivals, Load

GAIN = 1.05  # clients doubled that answer less than this more are enough
MAX_ERROR_SHARE = 0.01
MAX_GROWTH = 0.05  # of the rate, by which requests under way may become more
NOISE = 3.0  # standard deviations by which those under way vary by chance, if they arrive independently
PRECISION = 1.05  # of the highest borne to the lowest not borne
_FIRST_STEP = 1.25  # from the capacity, until there is one of each
_MAX_PROBES = 16
_MAX_FACTOR = 4  # of the capacity: a server that seems to bear more was asked for too short a time

Measure = Callable[[Load], Awaitable[Point]]


@dataclass(frozen=True)
class Probe:
    rate: float
    is_borne: bool
    reason: str


@dataclass
class Saturation:
    """What the search has found.

    Attributes:
        requests_per_second: the highest rate that was borne; 0: none was.
        not_borne: the lowest rate above it that was not; None: none was found.
        capacity: answers a second with as many clients as were of use, `clients`.
    """

    requests_per_second: float = 0.0
    not_borne: float | None = None
    capacity: float = 0.0
    clients: int = 0
    probes: list[Probe] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def refusal(point: Point, attainment: float) -> str:
    """Why a rate is not borne; empty if it is.

    With objectives: fewer than `attainment` of the requests meet them. Without: requests under way become more and
    more, by more than chance does, or some fail.
    """
    ended = point.num_completed + point.num_failed
    if point.num_failed > MAX_ERROR_SHARE * ended:
        return f"{point.num_failed} of {ended} requests failed"
    if point.goodput is not None:
        share = point.goodput.share
        return f"{share:.1%} met the objectives" if share < attainment else ""
    assert point.load.rate is not None
    growth = point.slope / point.load.rate
    # Their number is a Poisson variable where they arrive independently: its variance is its mean.
    by_chance = NOISE * math.sqrt(max(1.0, point.mean_concurrency))
    is_growing = growth > MAX_GROWTH and point.slope * SLOPE_SHARE * point.sending_seconds > by_chance
    return f"requests under way grew by {growth:.0%} of the rate" if is_growing else ""


async def find(
    measure: Measure, found: Saturation, *, arrivals: Arrivals, burst: int, max_clients: int, attainment: float
) -> None:
    """Fill `found`; it holds what there is when `measure` raises."""
    clients, num_useless = 1, 0
    while clients <= max_clients and num_useless < 2:
        point = await measure(Load(concurrency=clients))
        if point.is_gone:
            return
        better = point.requests_per_second > GAIN * found.capacity
        if point.requests_per_second > found.capacity:
            found.capacity, found.clients = point.requests_per_second, clients
        num_useless = 0 if better else num_useless + 1
        if point.num_failed > MAX_ERROR_SHARE * point.num_sent:
            break
        clients *= 2
    rate = found.capacity
    while 0 < rate < _MAX_FACTOR * found.capacity and len(found.probes) < _MAX_PROBES and not _is_confirmed(found):
        point = await measure(Load(rate=rate, arrivals=arrivals, burst=burst))
        if point.is_gone:
            return
        reason = refusal(point, attainment)
        found.probes.append(Probe(rate, not reason, reason))
        _narrow(found)
        rate = _next_rate(found)


def _next_rate(found: Saturation) -> float:
    low, high = found.requests_per_second, found.not_borne
    if _is_narrow(found):
        return low
    if high is None:
        return low * _FIRST_STEP
    return math.sqrt(low * high) if low else high / _FIRST_STEP**2


def _narrow(found: Saturation) -> None:
    """The interval, after another probe. What was borne above what was not was luck, or the other was bad luck: the
    lower one holds, which is the safer side.
    """
    refused = [probe.rate for probe in found.probes if not probe.is_borne]
    found.not_borne = min(refused, default=None)
    borne = [probe.rate for probe in found.probes if probe.is_borne]
    found.requests_per_second = max((rate for rate in borne if not refused or rate < min(refused)), default=0.0)


def _is_narrow(found: Saturation) -> bool:
    low, high = found.requests_per_second, found.not_borne
    return bool(low and high and high <= PRECISION * low)


def _is_confirmed(found: Saturation) -> bool:
    """Whether it is narrow, and the highest rate was borne twice."""
    num_borne = sum(probe.is_borne for probe in found.probes if probe.rate == found.requests_per_second)
    return _is_narrow(found) and num_borne > 1
