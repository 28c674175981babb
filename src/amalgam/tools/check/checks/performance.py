"""Latencies, rates and errors: one client, then many."""

from __future__ import annotations

from amalgam.tools.check.contract import LOAD, Finding, Status, check, failed, passed, skipped, warned
from amalgam.tools.check.load import load_requests, measured
from amalgam.tools.check.target import Target
from amalgam.tools.load.metrics import Point

_NOT_JUDGED = "The threshold is 0: not judged."


def _latency(target: Target, point: Point, name: str, rank: str, limit_ms: float) -> Finding:
    """A percentile against its threshold."""
    found = point.latencies.get(name)
    if found is None:
        return failed(f"no request of {point.num_sent} was answered whole")
    milliseconds = getattr(found, rank) * 1e3
    value = (
        f"{milliseconds:,.0f} ms (P50 {found.p50 * 1e3:,.0f}, P95 {found.p95 * 1e3:,.0f}, P99 {found.p99 * 1e3:,.0f}; "
        f"{point.num_completed} answers, {point.load})"
    )
    if not limit_ms:
        return Finding(Status.PASS, value, "not judged", measured=found.as_json())
    factor = target.thresholds.performance.latency_fail_factor
    threshold = f"{rank.upper()} ≤ {limit_ms:g} ms"
    status = Status.PASS if milliseconds <= limit_ms else Status.WARN
    if milliseconds > factor * limit_ms:
        status = Status.FAIL
    return Finding(status, value, threshold, measured=found.as_json())


def _rate(target: Target, point: Point, rate: float, least: float, unit: str) -> Finding:
    value = f"{rate:,.1f} {unit} ({point.load})"
    if not least:
        return skipped(f"{value}. {_NOT_JUDGED}")
    status = Status.PASS if rate >= least else Status.WARN
    if rate < target.thresholds.performance.rate_fail_share * least:
        status = Status.FAIL
    return Finding(status, value, f"≥ {least:g} {unit}", measured={"rate": rate})


@check(
    "performance.ttft",
    "Time to first token",
    why="It is how long a user looks at nothing.",
    remedy="Shorter prompts, a prefix cache, fewer prompt tokens beside streams, more machines.",
    requests=load_requests,
    shares="load",
    order=LOAD,
)
async def ttft(target: Target) -> Finding:
    point = (await measured(target)).single
    return _latency(target, point, "ttft", "p95", target.thresholds.performance.ttft_p95_ms)


@check(
    "performance.tpot",
    "Time per token after the first",
    why="Above 50 ms text comes slower than people read.",
    remedy="Fewer bits in the weights, a faster machine, speculation, a smaller batch.",
    requests=load_requests,
    shares="load",
    order=LOAD,
)
async def tpot(target: Target) -> Finding:
    point = (await measured(target)).single
    if point.num_completed and point.latencies.get("tpot") is None:
        return skipped("Answers had one token each.")
    return _latency(target, point, "tpot", "p95", target.thresholds.performance.tpot_p95_ms)


@check(
    "performance.stream_rate",
    "Tokens a second of one client",
    why="It is the speed that one user sees, the wait for the first token included.",
    remedy="As for the time per token.",
    requests=load_requests,
    shares="load",
    order=LOAD,
)
async def stream_rate(target: Target) -> Finding:
    point = (await measured(target)).single
    least = target.thresholds.performance.stream_tokens_per_second
    return _rate(target, point, point.output_tokens_per_second, least, "tokens/s")


@check(
    "performance.total_rate",
    "Tokens a second of all clients",
    why="It is what a machine earns.",
    remedy="Larger batches, fewer bits in the weights, more machines.",
    requests=load_requests,
    shares="load",
    order=LOAD,
)
async def total_rate(target: Target) -> Finding:
    point = (await measured(target)).crowd
    least = target.thresholds.performance.total_tokens_per_second
    return _rate(target, point, point.output_tokens_per_second, least, "tokens/s")


@check(
    "performance.request_rate",
    "Answers a second",
    why="It says how many users one machine bears; `amalgam bench serve --find-saturation` finds the limit.",
    remedy="Shorter answers, larger batches, more machines.",
    requests=load_requests,
    shares="load",
    order=LOAD,
)
async def request_rate(target: Target) -> Finding:
    point = (await measured(target)).crowd
    return _rate(
        target, point, point.requests_per_second, target.thresholds.performance.requests_per_second, "answers/s"
    )


@check(
    "performance.latency",
    "Whole answers under load",
    why="The slowest answers are those that users remember, and that time out.",
    remedy="Limit what is under way at once, refuse what does not fit (503), add machines.",
    requests=load_requests,
    shares="load",
    order=LOAD,
)
async def latency(target: Target) -> Finding:
    point = (await measured(target)).crowd
    return _latency(target, point, "e2e", "p99", target.thresholds.performance.latency_p99_ms)


@check(
    "performance.errors",
    "Errors under load",
    why="99.9% of requests answered is what users take for a service that works.",
    remedy="The server's log has the causes; an overload is refused with 503 and Retry-After.",
    requests=load_requests,
    shares="load",
    order=LOAD,
)
async def errors(target: Target) -> Finding:
    both = await measured(target)
    points = (both.single, both.crowd)
    count, bad = sum(point.num_sent for point in points), sum(point.num_failed for point in points)
    wanted = target.thresholds.performance
    threshold = f"≤ {wanted.error_share:.2%} of requests, failure above {wanted.error_share_fail:.2%}"
    share = bad / max(1, count)
    kinds = {kind: error.count for point in points for kind, error in point.errors.items()}
    value = f"{bad} of {count} requests" + (f": {', '.join(kinds)}" if kinds else "")
    figures = {"failed": bad, "sent": count, "kinds": kinds}
    if share > wanted.error_share_fail:
        return failed(value, threshold, figures=figures)
    return (
        warned(value, threshold, figures=figures)
        if share > wanted.error_share
        else passed(value, threshold, figures=figures)
    )
