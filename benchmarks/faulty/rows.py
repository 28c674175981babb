"""What came of faults: figures beside their limits, and answers that are not what they must be.

In: answers with their seconds. Out: rows. Must never know how a fault is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
from faulty.server import Timed


@dataclass(frozen=True)
class Row:
    """What came of a fault.

    Attributes:
        limit: what `measured` should stay below, in the same unit.
        count: of what was measured; the figure is the greatest, or the percentile that the name says.
        wrong: answers that were lost, or are not what they must be.
    """

    what: str
    measured: float
    limit: float
    unit: str
    count: int
    wrong: int = 0

    @property
    def verdict(self) -> str:
        return "wrong" if self.wrong else "kept" if self.measured < self.limit else "over"


def slowest(what: str, limit: float, answers: Sequence[Timed], is_right: Callable[[httpx.Response], bool]) -> Row:
    wrong = sum(not is_right(response) for _, response in answers)
    return Row(what, max(seconds for seconds, _ in answers) * 1e3, limit, "ms", len(answers), wrong)


def is_refused(response: httpx.Response) -> bool:
    return 400 <= response.status_code < 500


def is_whole(response: httpx.Response) -> bool:
    return response.status_code == 200 and '"error":' not in response.text


def ends_well(response: httpx.Response) -> bool:
    """A stream with its end mark, or an answer in one piece; it may tell of an error."""
    is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
    return response.text.endswith("data: [DONE]\n\n") if is_stream else response.status_code in (200, 503)
