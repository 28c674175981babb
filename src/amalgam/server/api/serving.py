"""How the serving goes: throughput, latencies, queue, KV cache, changes of the weights.

In: nothing. Out: figures for people; `server.metrics` has them for Prometheus.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from amalgam.engine import meter
from amalgam.engine.meter import POINT_SECONDS, Point, Reading
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import StrictRoute
from amalgam.server.service import Service

router = APIRouter(route_class=StrictRoute, tags=["operation"])

THROUGHPUT_SECONDS = 10.0  # what "now" means


class Throughput(BaseModel):
    prompt_tokens_per_second: float
    generated_tokens_per_second: float


class Percentiles(BaseModel):
    p50: float | None
    p90: float | None
    p99: float | None


class Latencies(BaseModel):
    first_token: Percentiles
    """From arrival to the first token, in seconds."""
    per_token: Percentiles
    """Between later tokens."""
    num_requests: int
    """That these figures look at: finished in the last ten minutes, at most 2048."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class KVBlocks(BaseModel):
    used_blocks: int
    total_blocks: int


class Level(BaseModel):
    mean: float
    """Weighted by time."""
    peak: int

    model_config = ConfigDict(use_attribute_docstrings=True)


class Load(BaseModel):
    running: Level
    """Requests."""
    waiting: Level
    kv_blocks: Level
    """In use."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class SeriesPoint(BaseModel):
    t: float
    """Unix seconds at which these two seconds begin."""
    prompt_tps: float
    generated_tps: float
    running: float
    """Mean over the two seconds, weighted by time, as all here that has a peak."""
    running_peak: int
    waiting: float
    waiting_peak: int
    kv_used: float
    kv_used_peak: int

    model_config = ConfigDict(use_attribute_docstrings=True)


class ServingAnswer(BaseModel):
    now: float
    uptime: float
    throughput: Throughput
    """Over the last ten seconds."""
    load: Load
    """Over the same ten seconds."""
    latency: Latencies
    queue: int
    """Requests waiting at this moment."""
    running: int
    """At this moment, which may lie between two requests: `load` has the mean and the peak."""
    kv: KVBlocks
    prompt_tokens: int
    """Since the start."""
    generated_tokens: int
    finished: dict[str, int]
    """Requests by how they ended."""
    weight_version: int
    requests_by_version: dict[int, int]
    series: list[SeriesPoint]
    """The last ten minutes, a point per two seconds, oldest first."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class RemapEntry(BaseModel):
    at: float
    """When it ended, Unix seconds."""
    version: int
    """In use afterwards."""
    previous_version: int
    num_changed: int
    loaded_bytes: int
    seconds: float
    ok: bool
    error: str | None = None
    """Why nothing has changed."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class RemapsAnswer(BaseModel):
    remaps: list[RemapEntry]
    """The latest 256, oldest first."""

    model_config = ConfigDict(use_attribute_docstrings=True)


@router.get("/serving")
async def get_serving(service: ServiceArgument) -> ServingAnswer:
    """Throughput, latencies, queue and KV cache, now and over the last ten minutes."""
    return await asyncio.to_thread(describe_serving, service)


@router.get("/remaps", response_model_exclude_none=True)
async def get_remaps(service: ServiceArgument) -> RemapsAnswer:
    """The changes of the weights so far, refused ones too."""
    return RemapsAnswer(
        remaps=[
            RemapEntry(
                at=record.at,
                version=record.version,
                previous_version=record.previous_version,
                num_changed=record.num_changed,
                loaded_bytes=record.loaded_bytes,
                seconds=record.seconds,
                ok=record.error is None,
                error=record.error,
            )
            for record in service.deployment.remaps
        ]
    )


def describe_serving(service: Service) -> ServingAnswer:
    """What `GET /serving` answers. Any thread."""
    deployment = service.deployment
    status, reading = deployment.engine.status(), deployment.engine.meter.read()
    series = [
        SeriesPoint(
            t=point.time,
            prompt_tps=point.num_prompt_tokens / POINT_SECONDS,
            generated_tps=point.num_new_tokens / POINT_SECONDS,
            running=point.running.mean,
            running_peak=point.running.peak,
            waiting=point.waiting.mean,
            waiting_peak=point.waiting.peak,
            kv_used=point.used_blocks.mean,
            kv_used_peak=point.used_blocks.peak,
        )
        for point in reading.points
    ]
    return ServingAnswer(
        now=reading.now,
        uptime=service.uptime_seconds,
        throughput=_throughput(reading, service.uptime_seconds),
        load=_load(reading),
        latency=Latencies(
            first_token=_percentiles([latency.first_token for latency in reading.latencies]),
            per_token=_percentiles(
                [latency.per_token for latency in reading.latencies if latency.per_token is not None]
            ),
            num_requests=len(reading.latencies),
        ),
        queue=status.num_waiting,
        running=status.num_running,
        kv=KVBlocks(used_blocks=status.num_blocks - status.num_free_blocks, total_blocks=status.num_blocks),
        prompt_tokens=reading.num_prompt_tokens,
        generated_tokens=reading.num_new_tokens,
        finished={reason.value: count for reason, count in reading.finished.items()},
        weight_version=deployment.version_id,
        requests_by_version=dict(status.versions),
        series=series,
    )


def _throughput(reading: Reading, uptime_seconds: float) -> Throughput:
    recent = _recent(reading)
    # The first point begins up to two seconds after `start`, and the last one is still going on.
    seconds = min(reading.now - recent[0].time, uptime_seconds)
    seconds = max(seconds, POINT_SECONDS / 2)
    return Throughput(
        prompt_tokens_per_second=sum(point.num_prompt_tokens for point in recent) / seconds,
        generated_tokens_per_second=sum(point.num_new_tokens for point in recent) / seconds,
    )


def _load(reading: Reading) -> Load:
    recent = _recent(reading)
    seconds = [min(POINT_SECONDS, reading.now - point.time) for point in recent]

    def level(levels: Sequence[meter.Level]) -> Level:
        mean = sum(item.mean * part for item, part in zip(levels, seconds, strict=True)) / (sum(seconds) or 1)
        return Level(mean=mean, peak=max(item.peak for item in levels))

    return Load(
        running=level([point.running for point in recent]),
        waiting=level([point.waiting for point in recent]),
        kv_blocks=level([point.used_blocks for point in recent]),
    )


def _recent(reading: Reading) -> list[Point]:
    """The points of the last `THROUGHPUT_SECONDS`; the one that is going on is always among them."""
    return [point for point in reading.points if point.time >= reading.now - THROUGHPUT_SECONDS]


def _percentiles(values: Sequence[float]) -> Percentiles:
    """Nearest-rank percentiles; None of nothing."""
    ordered = sorted(values)

    def percentile(percent: int) -> float | None:
        return ordered[-(-percent * len(ordered) // 100) - 1] if ordered else None

    return Percentiles(p50=percentile(50), p90=percentile(90), p99=percentile(99))
