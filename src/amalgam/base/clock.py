"""The time that counts, and the time that is shown.

In: the system's clocks. Out: seconds. The wall clock may be set at any moment, back or forward; whoever measures how
long ago something was must not ask it. Whoever tells people when it was has to.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_NOISE_SECONDS = 0.1  # between two readings of two clocks; a smaller step of the wall clock is not worth telling


def steady_seconds() -> float:
    """Seconds that nobody sets, and that go on while the machine is suspended, where the system counts them so."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Clock:
    """Steady time that agrees with the wall clock as it was set when this was made.

    Args:
        wall: Unix seconds; may jump.
        steady: seconds since whenever; never jump.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = steady_seconds) -> None:
        self._wall = wall
        self._steady = steady
        self._offset = wall() - steady()

    def now(self) -> float:
        """Steady time: differences are true, whatever happens to the wall clock."""
        return self._steady() + self._offset

    def shift(self) -> float:
        """What to add to a time of `now` to get Unix seconds by the wall clock as it is set at this moment."""
        difference = self._wall() - self.now()
        return difference if abs(difference) >= _NOISE_SECONDS else 0.0
