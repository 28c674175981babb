"""What others see: probes for health and readiness, metrics, alerts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from amalgam.base.counting import counted
from amalgam.errors import UnavailableError
from amalgam.tools.check import metrics as exposition
from amalgam.tools.check import rules as alerting
from amalgam.tools.check.asking import Response, fetch
from amalgam.tools.check.contract import EARLY, LOAD, Finding, check, failed, passed, skipped, warned
from amalgam.tools.check.failures import CannotTellError, PlainRefusalError
from amalgam.tools.check.load import load_requests, measured
from amalgam.tools.check.target import Target
from amalgam.tools.load.http import Address


async def _first(target: Target, paths: Iterable[str]) -> tuple[str, Response] | None:
    for path in paths:
        response = await target.get(path, key="")
        if response.status not in (0, 404, 405):
            return path, response
    return None


@check(
    "monitoring.health",
    "A probe for health",
    why="Whoever restarts a server that has failed must be able to see it.",
    remedy="Answer 200 at /health without a key, as long as the process can go on.",
    requests=lambda thresholds: len(thresholds.monitoring.health_paths),
    order=EARLY,
)
async def health(target: Target) -> Finding:
    wanted = target.thresholds.monitoring
    found = await _first(target, wanted.health_paths)
    if found is None:
        return failed(f"none of {', '.join(wanted.health_paths)} is there")
    path, response = found
    if response.status != 200:
        return failed(f"{path}: {response.said}", "200 without a key")
    target.kept["health_path"] = path
    value, threshold = f"{path} in {response.seconds * 1e3:.0f} ms", f"200, ≤ {wanted.health_ms:g} ms"
    return (passed if response.seconds * 1e3 <= wanted.health_ms else warned)(value, threshold)


@check(
    "monitoring.readiness",
    "A probe for readiness",
    why="Requests must not be sent to a server that is loading, draining or full.",
    remedy="Answer 200 at /ready only while requests are taken.",
    requests=lambda thresholds: len(thresholds.monitoring.ready_paths),
    order=EARLY,
)
async def readiness(target: Target) -> Finding:
    found = await _first(target, target.thresholds.monitoring.ready_paths)
    if found is None:
        return warned(f"none of {', '.join(target.thresholds.monitoring.ready_paths)} is there")
    path, response = found
    if response.status != 200:
        return failed(f"{path}: {response.said}, though requests are answered", "200 without a key")
    target.kept["ready_path"] = path
    return passed(f"{path} says that requests are taken")


@check(
    "monitoring.health_under_load",
    "Health is answered under load",
    why="A probe that waits behind requests gets a busy server restarted.",
    remedy="Answer probes in another thread than the model computes in.",
    requests=load_requests,
    shares="load",
    order=LOAD,
)
async def health_under_load(target: Target) -> Finding:
    if not target.kept.get("health_path"):
        return skipped("There is no probe for health.")
    try:
        probes = (await measured(target)).probe_seconds
    except PlainRefusalError as error:
        raise CannotTellError(f"There was no load: {error}") from None
    if not probes:
        return skipped("The load was over before a probe was answered.")
    limit, worst = target.thresholds.monitoring.health_ms, max(probes) * 1e3
    if math.isinf(worst):
        bad = sum(map(math.isinf, probes))
        return failed(f"{bad} of {len(probes)} probes were not answered with 200", f"≤ {limit:g} ms")
    value = f"{counted(len(probes), 'probe')}, the slowest in {worst:.0f} ms"
    return (passed if worst <= limit else failed)(value, f"≤ {limit:g} ms", figures={"slowest_ms": worst})


@check(
    "monitoring.metrics",
    "Metrics",
    why="What is not measured is noticed by users first.",
    remedy="Publish the missing families at /metrics, or name in monitoring.families what this server calls them.",
    requests=2,
)
async def metrics(target: Target) -> Finding:
    try:
        families = exposition.parse(await target.metrics())
    except CannotTellError as error:
        return failed(str(error))
    except ValueError as error:
        return failed(f"Prometheus cannot read them: {error}")
    names, wanted = exposition.names(families), target.thresholds.monitoring
    missing = [what for what, pattern in wanted.families.items() if not any(re.search(pattern, name) for name in names)]
    present = len(wanted.families) - len(missing)
    value = f"{present} of {len(wanted.families)} kinds in {len(families)} families"
    if not missing:
        return passed(value, figures={"families": len(families)})
    value += f"; missing: {', '.join(missing)}"
    return (warned if present >= wanted.family_share * len(wanted.families) else failed)(
        value, figures={"missing": missing}
    )


@check(
    "monitoring.counting",
    "Metrics count",
    why="A board that stands still looks like a quiet day.",
    remedy="Count tokens where they are generated.",
    requests=5,
)
async def counting(target: Target) -> Finding:
    before = exposition.tokens_generated(_parsed(await target.metrics()))
    if before is None:
        return skipped("No metric counts generated tokens.")
    asked = (await target.ask("Tell me of clocks.", 16)).num_new_tokens or 1

    async def has_risen() -> bool:
        after = exposition.tokens_generated(_parsed(await target.metrics()))
        return after is not None and after - before >= asked

    limit = target.thresholds.monitoring.fresh_seconds
    if await target.until(has_risen, limit, min(1.0, limit / 3)):
        return passed(f"generated tokens rose by at least the {asked} of an answer", f"≤ {limit:g} s")
    return failed(f"generated tokens did not rise by the {asked} of an answer", f"≤ {limit:g} s")


def _parsed(response: Response) -> list[Any]:
    try:
        return exposition.parse(response)
    except ValueError:
        raise CannotTellError("Prometheus cannot read the metrics.") from None


@check(
    "monitoring.alerts",
    "Alerts",
    why="Nobody looks at a board at night.",
    remedy="Add rules for what is missing; `promtool check rules` checks their form.",
    requests=3,
)
async def alerts(target: Target) -> Finding:
    evidence = target.evidence
    found: list[alerting.Rule] = [rule for path in evidence.rules for rule in alerting.read(path)]
    problems: list[str] = []
    if evidence.prometheus:
        address = Address.parse(evidence.prometheus)
        loaded = await _ask_prometheus(target, address, "rules")
        found += alerting.loaded(loaded)
        problems += alerting.unhealthy(loaded)
        problems += alerting.unscraped(await _ask_prometheus(target, address, "targets"), target.address)
    elif not evidence.rules:
        return skipped("Neither rules nor a Prometheus are named.", remedy="--rules FILE, or --prometheus URL.")
    problems += await _unknown_names(target, found)
    return _judge_alerts(target, [rule for rule in found if rule.is_alert], problems)


def _judge_alerts(target: Target, found: Sequence[alerting.Rule], problems: Sequence[str]) -> Finding:
    wanted = target.thresholds.monitoring
    missing = [
        what
        for what, pattern in wanted.alerts.items()
        if not any(re.search(pattern, f"{rule.name} {rule.expression}", re.IGNORECASE) for rule in found)
    ]
    present = len(wanted.alerts) - len(missing)
    value = f"{len(found)} alerts, for {present} of {len(wanted.alerts)} kinds"
    value += f"; missing: {', '.join(missing)}" if missing else ""
    if problems:
        return failed("; ".join([value, *problems]), figures={"missing": missing})
    if not missing:
        return passed(value)
    return (warned if present >= wanted.min_alerts else failed)(value, figures={"missing": missing})


async def _ask_prometheus(target: Target, address: Address, what: str) -> Mapping[str, Any]:
    response = await fetch(address, "GET", f"/api/v1/{what}", timeout_seconds=target.thresholds.timeout_seconds)
    try:
        data = orjson.loads(response.content)["data"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        data = None
    if not isinstance(data, dict):
        raise UnavailableError(f"{address} is no Prometheus ({response.said}).", remedy="Check --prometheus.")
    return data


async def _unknown_names(target: Target, found: Sequence[alerting.Rule]) -> list[str]:
    """Metrics that rules ask for by one of the server's prefixes, and that it does not have."""
    try:
        known = exposition.names(exposition.parse(await target.metrics()))
    except (CannotTellError, ValueError):
        return []
    recorded = {rule.name for rule in found if not rule.is_alert}
    prefixes = {re.split("[_:]", name)[0] for name in known} - {"python", "process", "http", "go"}
    wrong = {
        f"{rule.name} asks for {name}, which the server does not have"
        for rule in found
        for name in alerting.names_in(rule.expression)
        if re.split("[_:]", name)[0] in prefixes and name not in known and name not in recorded
    }
    return sorted(wrong)
