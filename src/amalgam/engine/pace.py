"""How many prompt tokens may share a step with streams, learned from how long steps take.

In: each step's token counts and seconds. Out: a number of tokens. Must never know: requests, tensors. What it says
changes when a token comes, never which.

Model: with `s` streams a step takes `alone[s]` seconds, and `cost` seconds more for each prompt token. Both are running
means; `alone` has one for each power of two of streams. A step of streams alone is asked for now and then, so that what
prompts cost is not taken for what streams cost.
"""

from __future__ import annotations

FIRST_TOKENS = 32  # as long as nothing is known
_NEWEST = 0.3  # the newest value's part in a mean
_MAX_CHANGE = 2.0  # between two values of `cost`: one that a busy machine has spoilt is not believed
_MIXED_STEPS = 16  # so many with prompts come before one without


class Pace:
    """Not thread-safe.

    Args:
        slowdown: how many times as long as without prompts a step may take; above 1.
        min_tokens, max_tokens: what is said is between, or 0.
    """

    def __init__(self, slowdown: float, min_tokens: int, max_tokens: int) -> None:
        assert slowdown > 1 and 1 <= min_tokens <= max_tokens
        self._slowdown = slowdown
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._alone: dict[int, float] = {}  # bit length of the number of streams → seconds
        self._cost: float | None = None
        self._num_mixed = 0  # steps since the last of streams alone

    def prompt_tokens_beside(self, num_streams: int) -> int:
        """How many prompt tokens the next step may have; 0: it shall have none."""
        if not self._alone or self._num_mixed >= _MIXED_STEPS:
            return 0
        size = num_streams.bit_length()
        alone = self._alone[min(self._alone, key=lambda known: abs(known - size))]
        limit = FIRST_TOKENS if self._cost is None else int((self._slowdown - 1) * alone / self._cost)
        return min(max(limit, self._min_tokens), self._max_tokens)

    def add(self, num_streams: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step has been computed."""
        size = num_streams.bit_length()
        if not num_streams:
            return
        if not num_prompt_tokens:
            self._num_mixed = 0
            self._alone[size] = _mean(self._alone.get(size), seconds)
            return
        self._num_mixed += 1
        if (alone := self._alone.get(size)) is None:
            return
        cost = max(seconds - alone, 0.01 * alone) / num_prompt_tokens
        if self._cost is not None:
            cost = min(max(cost, self._cost / _MAX_CHANGE), self._cost * _MAX_CHANGE)
        self._cost = _mean(self._cost, cost)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _NEWEST * (value - before)
