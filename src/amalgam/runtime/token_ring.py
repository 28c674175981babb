"""What some of the latest requests were, as token ids: plans are compared on these.

In: the tokens of requests as they end. Out: those of the last so many seconds. They are kept in memory, in a ring of
bounded size; nothing of them is written anywhere.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Sequence

WINDOW_TOKENS = 128  # of a request's beginning, at most


class TokenRing:
    """The beginnings of some of the latest requests, as token ids. Any thread."""

    def __init__(self, share: float, max_tokens: int, seed: int | None = None) -> None:
        self._share = share
        self._max_tokens = max_tokens
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._kept: deque[tuple[float, tuple[int, ...]]] = deque()
        self.num_tokens = 0

    def add(self, token_ids: Sequence[int]) -> None:
        """A request has ended; whether it is kept is chance. In the step thread, so it must be quick."""
        if len(token_ids) < 2 or self._random.random() >= self._share:
            return
        kept = tuple(token_ids[:WINDOW_TOKENS])
        with self._lock:
            self._kept.append((time.monotonic(), kept))
            self.num_tokens += len(kept)
            while self.num_tokens > self._max_tokens and len(self._kept) > 1:
                self.num_tokens -= len(self._kept.popleft()[1])

    def read(self, seconds: float) -> list[tuple[int, ...]]:
        """Those of the last so many seconds, oldest first."""
        since = time.monotonic() - seconds
        with self._lock:
            return [token_ids for at, token_ids in self._kept if at >= since]
