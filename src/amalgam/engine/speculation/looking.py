"""Whether it pays to look for guesses at all: what looking takes, beside what it brings.

In: of each step what it gave, and what it took with all that guesses need. Out: whether the next step looks for any.
Must never know: how guesses are made, which of them are taken.

A model of steps and guesses does not see what surrounds them: looking, choosing, counting what came true. With steps of
a millisecond that is a tenth of the time, however few guesses there are. So the whole is measured. For some steps
guesses are looked for, and these are compared with what as many tokens take without. If it was less, nothing is looked
for until the loss is a hundredth of the time in all; where steps are long, that is never.
"""

from __future__ import annotations

_TRIAL_STEPS = 32
_WORTH = 0.01  # share of the time that looking in vain may take
_NEWEST = 0.2  # part of one step in what steps take without guesses
_MAX_REST = 4096  # steps


class Looking:
    """See above.

    Attributes:
        gain: tokens of the last trial in the time that as many would have taken without.
    """

    def __init__(self) -> None:
        self.gain = 1.0
        self._plain: dict[int, float] = {}  # streams → seconds of a step without guesses
        self._num_tried = 0
        self._needed = self._taken = 0.0  # seconds of this trial's tokens: without guesses, and as they came
        self._num_resting = 0  # steps that are still to come without

    def rests(self) -> bool:
        """Whether the step that begins goes without. To be asked once for each."""
        if not self._num_resting:
            return False
        self._num_resting -= 1
        return True

    def add_plain(self, num_streams: int, seconds: float) -> None:
        """A step without guesses has been computed; what looking for some took is left out."""
        before = self._plain.get(num_streams, seconds)
        self._plain[num_streams] = before + _NEWEST * (seconds - before)

    def add_trial(self, num_streams: int, num_given: int, seconds: float) -> None:
        """A step for which guesses were looked for gave so many tokens; `seconds` are of all that belonged to it."""
        plain = self._plain.get(num_streams)
        if plain is None:
            return
        self._needed += plain * num_given / num_streams
        self._taken += seconds
        self._num_tried += 1
        if self._num_tried == _TRIAL_STEPS:
            self.gain = self._needed / max(self._taken, 1e-9)
            rest_seconds = self._taken * ((1 - self.gain) / _WORTH - 1)
            self._num_resting = max(0, min(int(rest_seconds / max(plain, 1e-9)), _MAX_REST))
            self._num_tried, self._needed, self._taken = 0, 0.0, 0.0
