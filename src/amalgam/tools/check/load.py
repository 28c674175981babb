"""The load that the performance checks share: one client, then many, measured once.

In: a target. Out: the figures of two loads, and how fast probes were answered meanwhile. Must never know thresholds'
verdicts.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from amalgam.errors import AmalgamError, RequestError
from amalgam.tools.check.failures import CannotTellError, PlainRefusalError
from amalgam.tools.check.target import Target
from amalgam.tools.check.thresholds import Thresholds
from amalgam.tools.load.benchmark import Benchmark, Extent, Work
from amalgam.tools.load.benchmark import Target as LoadTarget
from amalgam.tools.load.datasets import Lengths
from amalgam.tools.load.metrics import Point
from amalgam.tools.load.running import Load

_WARMUP = 2
_CALIBRATION = 2
_PROBE_PAUSE_SECONDS = 0.25
_RATE_LIMIT = "HTTP 429"


@dataclass
class Measured:
    """
    Attributes:
        single: figures of one client; `crowd`: of all clients together.
        probe_seconds: how long each probe for health took while the crowd asked; one that failed took for ever.
    """

    single: Point
    crowd: Point
    probe_seconds: list[float] = field(default_factory=list)


def load_requests(thresholds: Thresholds) -> int:
    """The most that `measured` sends, probes left out."""
    wanted = thresholds.performance
    return wanted.requests + wanted.concurrent_requests + 2 * (_WARMUP + _CALIBRATION)


async def measured(target: Target) -> Measured:
    """The figures; the first call measures.

    Raises:
        PlainRefusalError: the server did not answer what the load begins with.
        CannotTellError: the server's own limit refused some requests.
    """
    if "load" not in target.kept:
        try:
            target.kept["load"] = await _measure(target)
        except AmalgamError as error:
            is_limit = _RATE_LIMIT in str(error)
            target.kept["load"] = CannotTellError(str(error)) if is_limit else PlainRefusalError(str(error))
        except CannotTellError as error:
            target.kept["load"] = error
    found: Measured | Exception = target.kept["load"]
    if isinstance(found, Exception):
        raise found
    return found


async def _measure(target: Target) -> Measured:
    wanted = target.thresholds.performance
    alone, probes = Load(concurrency=1), list[float]()
    single = await _run(target, alone, Extent(wanted.requests, wanted.seconds, _WARMUP))
    async with _probing(target, probes):
        crowd = await _run(
            target,
            Load(concurrency=wanted.clients),
            Extent(wanted.concurrent_requests, wanted.seconds, _WARMUP),
        )
    for point in single, crowd:
        if _RATE_LIMIT in point.errors:
            count = point.errors[_RATE_LIMIT].count
            raise CannotTellError(
                f"The server's limit of the rate refused {count} of {point.num_sent} requests: "
                "give a key without limits, or ask for less in `performance`."
            )
    return Measured(single, crowd, probes)


async def _run(target: Target, load: Load, extent: Extent) -> Point:
    """With answers of the full length where the server can be asked for that."""
    for fields in {"temperature": 0, "ignore_eos": True}, {"temperature": 0}:
        benchmark = _benchmark(target, fields, extent)
        try:
            await benchmark.run([load], lambda *_: None)
        except RequestError:
            if "ignore_eos" in fields:
                continue
            raise
        [point] = benchmark.points
        target.num_requests += point.num_sent + extent.warmup + _CALIBRATION
        return point
    raise AssertionError


def _benchmark(target: Target, fields: Mapping[str, Any], extent: Extent) -> Benchmark:
    wanted = target.thresholds.performance
    return Benchmark(
        LoadTarget(
            target.address,
            "chat" if target.is_chat else "completions",
            target.model,
            target.key,
            fields,
            target.kept.get("stream_options", True),
            target.thresholds.timeout_seconds,
        ),
        Work(Lengths(wanted.prompt_tokens, wanted.prompt_tokens), Lengths(wanted.output_tokens, wanted.output_tokens)),
        extent,
    )


@contextlib.asynccontextmanager
async def _probing(target: Target, seconds: list[float]) -> AsyncIterator[None]:
    """While it lasts, the path for health is asked again and again."""
    path = target.kept.get("health_path")

    async def probe() -> None:
        while path:
            started = time.perf_counter()
            response = await target.get(path, key="")
            seconds.append(time.perf_counter() - started if response.status == 200 else float("inf"))
            await asyncio.sleep(_PROBE_PAUSE_SECONDS)

    task = asyncio.create_task(probe())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
