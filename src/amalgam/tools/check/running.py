"""Checks, one after the other, within a time.

In: a target, checks. Out: a report, filled as they end; and beforehand, what will be sent. Must never know how it is
shown.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from amalgam.base.counting import counted
from amalgam.errors import AmalgamError
from amalgam.tools.check.contract import Check, Finding, Result, Status
from amalgam.tools.check.contract import failed as as_failure
from amalgam.tools.check.contract import skipped as as_skipped
from amalgam.tools.check.failures import CannotTellError, PlainRefusalError
from amalgam.tools.check.target import Target
from amalgam.tools.check.thresholds import Thresholds
from amalgam.version import __version__

Progress = Callable[[str, int, int], None]
_NO_TIME = "The time was up: --max-seconds gives more."
_DRAIN_NEEDS = "--drain PID asks for it: it ends the process."


@dataclass
class Report:
    """What came of the checks.

    Attributes:
        results: in the order of the checks that were asked for, as far as they have ended.
        seconds: that all of them took.
        out_of_time: checks that could not run, or not to their end, for lack of time.
    """

    target: Target
    checks: Sequence[Check]
    results: list[Result] = field(default_factory=list)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    out_of_time: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[Status, int]:
        found = Counter(result.status for result in self.results)
        return {status: found[status] for status in Status}

    def is_ready(self, *, is_strict: bool = False) -> bool:
        """All checks had their time, and none failed; if it is strict, none warned either."""
        return not (self.out_of_time or self.num_failed(is_strict=is_strict))

    def num_failed(self, *, is_strict: bool = False) -> int:
        """Checks that failed; if it is strict, warnings count too."""
        return self.counts[Status.FAIL] + is_strict * self.counts[Status.WARN]

    def as_json(self) -> dict[str, Any]:
        target = self.target
        return {
            "version": __version__,
            "url": str(target.address),
            "model": target.model,
            "server": target.kind,
            "endpoint": target.path,
            "profile": target.thresholds.profile,
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 2),
            "requests_sent": target.num_requests,
            "ready": self.is_ready(),
            "summary": {status.value: count for status, count in self.counts.items()},
            "out_of_time": self.out_of_time,
            "notes": target.notes,
            "checks": [result.as_json() for result in self.results],
        }


def most_requests(checks: Sequence[Check], thresholds: Thresholds) -> int:
    """What checks send, at the most."""
    apart = {check.shares or check.id: check.num_requests(thresholds) for check in checks}
    return sum(apart.values())


def announcement(target: Target, checks: Sequence[Check], max_seconds: float) -> str:
    """What will be sent."""
    wanted, ids = target.thresholds, {check.id for check in checks}
    lines = [
        f"{counted(len(checks), 'check')} of {target.address}: at most "
        f"{counted(most_requests(checks, wanted), 'request')}, {max(8, wanted.performance.clients)} at a time, "
        f"in {max_seconds:g} s."
    ]
    if "limits.body" in ids:
        lines.append(f"One body of {wanted.limits.body_bytes / 2**20:.0f} MiB is among them, which should be refused.")
    if "limits.prompt" in ids:
        lines.append("One prompt is longer than the model takes.")
    if "limits.rate" in ids:
        lines.append(f"Up to {wanted.limits.rate_requests} short requests look for a rate limit.")
    if "operation.drain" in ids and target.evidence.drain is not None:
        lines.append(f"In the end process {target.evidence.drain} gets SIGTERM.")
    else:
        lines.append("Nothing changes the server.")
    return " ".join(lines)


async def run(target: Target, report: Report, max_seconds: float, progress: Progress) -> None:
    """Fill a report; it holds what there is if this is interrupted.

    Raises:
        AmalgamError: nothing can be checked at all.
    """
    started = time.monotonic()
    await target.prepare()
    found: dict[str, Result] = {}
    checks = sorted(report.checks, key=lambda check: check.order)
    try:
        for number, check in enumerate(checks):
            progress("checks", number, len(checks))
            begun = time.monotonic()
            left = max_seconds - (begun - started)
            try:
                finding = await _finding(check, target, left)
            except TimeoutError:
                report.out_of_time.append(check.id)
                finding = as_skipped(_NO_TIME)
            if severity := target.thresholds.severity.get(check.id):
                finding = finding.at_most(Status(severity))
            found[check.id] = Result(check, finding, time.monotonic() - begun)
            report.results = [found[one.id] for one in report.checks if one.id in found]
            report.seconds = time.monotonic() - started
        progress("checks", len(checks), len(checks))
    finally:
        report.seconds = time.monotonic() - started


async def _finding(check: Check, target: Target, seconds: float) -> Finding:
    """
    Raises:
        TimeoutError: the time was up.
    """
    if check.is_opt_in and target.evidence.drain is None:
        return as_skipped(_DRAIN_NEEDS)
    if seconds <= 0:
        raise TimeoutError
    try:
        async with asyncio.timeout(seconds):
            return await check.run(target)
    except CannotTellError as error:
        return as_skipped(str(error))
    except (PlainRefusalError, AmalgamError) as error:
        return as_failure(str(error))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        # Whatever a server answers must not end the other checks.
        return as_failure(f"An answer has another form than OpenAI's ({type(error).__name__}: {error}).")
