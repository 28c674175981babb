"""What a check is, and what comes of it.

In: a function that asks a target. Out: a `Check` with an id, reasons and a remedy, and its `Finding`. Must never know
which checks there are, nor how findings are shown.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amalgam.tools.check.target import Target
    from amalgam.tools.check.thresholds import Thresholds

# In the order of a report.
CATEGORIES: Mapping[str, str] = {
    "performance": "Performance under load",
    "answers": "Answers are right",
    "access": "Keys, pages of others, encryption",
    "limits": "What is refused",
    "filters": "Filters of content",
    "privacy": "What logs and metrics keep",
    "monitoring": "Health, metrics, alerts",
    "resources": "Memory, disk, descriptors",
    "operation": "Configuration, end of the process",
}

# When a check runs: those that disturb others, or take long, after them.
EARLY, USUAL, LOAD, AFTER_LOAD, LATE, LAST = 0, 50, 70, 80, 90, 100


class Status(StrEnum):
    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        value: what was seen, in words; of a check that was skipped, why.
        threshold: what it is judged by.
        remedy: in place of the check's own.
        measured: figures for programs, JSON; times in ms.
    """

    status: Status
    value: str
    threshold: str = ""
    remedy: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)

    def at_most(self, worst: Status) -> Finding:
        """The same, but a fault counts as `worst`."""
        return replace(self, status=worst) if self.status in (Status.WARN, Status.FAIL) else self


def passed(value: str, threshold: str = "", *, figures: Mapping[str, Any] | None = None) -> Finding:
    return Finding(Status.PASS, value, threshold, measured=figures or {})


def warned(value: str, threshold: str = "", *, remedy: str = "", figures: Mapping[str, Any] | None = None) -> Finding:
    return Finding(Status.WARN, value, threshold, remedy, figures or {})


def failed(value: str, threshold: str = "", *, remedy: str = "", figures: Mapping[str, Any] | None = None) -> Finding:
    return Finding(Status.FAIL, value, threshold, remedy, figures or {})


def skipped(reason: str, *, remedy: str = "") -> Finding:
    return Finding(Status.SKIP, reason, remedy=remedy)


@dataclass(frozen=True)
class Check:
    """
    Attributes:
        id: `category.name`.
        why: why it matters, a sentence.
        remedy: what helps, a sentence.
        num_requests: the most that it sends, with these thresholds.
        shares: checks of the same name send their requests together, once.
        order: when it runs, `EARLY` to `LAST`.
        is_opt_in: it runs only if it was asked for by an option that says what to do it to.
    """

    id: str
    title: str
    why: str
    remedy: str
    run: Callable[[Target], Awaitable[Finding]]
    num_requests: Callable[[Thresholds], int]
    shares: str = ""
    order: int = USUAL
    is_opt_in: bool = False

    @property
    def category(self) -> str:
        return self.id.partition(".")[0]


Run = Callable[["Target"], Awaitable[Finding]]


def check(
    id: str,
    title: str,
    *,
    why: str,
    remedy: str,
    requests: int | Callable[[Thresholds], int] = 0,
    shares: str = "",
    order: int = USUAL,
    is_opt_in: bool = False,
) -> Callable[[Run], Check]:
    """Make a check of the function below it."""
    category = id.partition(".")[0]
    assert category in CATEGORIES, id

    def num_requests(thresholds: Thresholds) -> int:
        return requests if isinstance(requests, int) else requests(thresholds)

    def make(function: Run) -> Check:
        return Check(id, title, why, remedy, function, num_requests, shares, order, is_opt_in)

    return make


@dataclass(frozen=True)
class Result:
    """A check, what it found, and how long that took."""

    check: Check
    finding: Finding
    seconds: float

    @property
    def status(self) -> Status:
        return self.finding.status

    @property
    def remedy(self) -> str:
        return self.finding.remedy or self.check.remedy

    def as_json(self) -> dict[str, Any]:
        check, finding = self.check, self.finding
        has_fault = finding.status in (Status.WARN, Status.FAIL)
        return {
            "id": check.id,
            "category": check.category,
            "title": check.title,
            "status": finding.status.value,
            "value": finding.value,
            "threshold": finding.threshold,
            "why": check.why,
            "remedy": self.remedy if has_fault or finding.remedy else "",
            "seconds": round(self.seconds, 3),
            "measured": dict(finding.measured),
        }
