"""Answers that many viewers ask for at the same time, made once.

In: a key, a version, and how to make the answer. Out: bytes. Must never know: what is in them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

MAX_ANSWERS = 32
MAX_AGE_SECONDS = 2.0  # windows of time move on even while nothing is counted


@dataclass(frozen=True)
class _Answer:
    version: int  # it may hold more, not less
    content: asyncio.Task[bytes]
    begun_at: float = field(default_factory=time.monotonic)

    def is_good_for(self, version: int) -> bool:
        is_fresh = not self.content.done() or time.monotonic() - self.begun_at <= MAX_AGE_SECONDS
        return self.version >= version and is_fresh


class SharedAnswers:
    """The latest answers. Belongs to the event loop.

    Every open page asks when the same event has told it of new statistics, and names their version. While traffic runs
    each step makes a newer one, so that an answer must do for all versions up to its own.
    """

    def __init__(self) -> None:
        self._answers: dict[Hashable, _Answer] = {}  # oldest first

    async def get(self, key: Hashable, wanted: int | None, current: int, make: Callable[[], bytes]) -> bytes:
        """An answer at version `wanted` or later, perhaps made for somebody else; None: one made now.

        Args:
            current: the version at this moment.
            make: blocking; called in a thread.
        """
        if wanted is None:
            return await asyncio.to_thread(make)
        answer = self._answers.get(key)
        if answer is None or not answer.is_good_for(wanted):
            self._answers.pop(key, None)
            answer = self._answers[key] = _Answer(current, asyncio.create_task(asyncio.to_thread(make)))
            if len(self._answers) > MAX_ANSWERS:
                del self._answers[next(iter(self._answers))]
        return await asyncio.shield(answer.content)  # others wait for it too

    def forget(self) -> None:
        """Something else has changed than the version tells."""
        self._answers.clear()
