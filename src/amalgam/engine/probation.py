"""Weight versions that have yet to show that they answer, and the one to go back to if the newest of them does not.

In: versions as they come, answers as they end. Out: which version's errors are its own fault, what is used instead.
Must never know: requests, steps, threads. Not thread-safe.

A version is on probation until it has given so many answers; an exception before that is taken for the version's fault,
a later one for the request's. A NaN may come from a prompt that no version bears: the request is computed again on the
version that would be gone back to, and only if that answers the one on probation is at fault.

So long the weights of the version before stay in memory, whoever uses them. That is the last one that has given an
answer: of versions that came one after the other and answered nothing, none is gone back to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from amalgam.errors import AmalgamError, describe

if TYPE_CHECKING:
    from amalgam.models.weights import WeightVersion


class WeightsFailedError(AmalgamError):
    """A request had begun to answer when its weight version failed."""

    http_status = 503
    exit_code = 6
    code = "weights_failed"
    retry_after_seconds = 1


@dataclass(frozen=True)
class FailedVersion:
    """A version that has failed on probation, and is left.

    Attributes:
        instead: what requests run on from now on.
        reason: what went wrong.
        num_restarted: its requests that had sent nothing: they run again.
        num_ended: the others, which have ended with an error.
    """

    version: WeightVersion
    instead: WeightVersion
    reason: str
    num_restarted: int
    num_ended: int


def weights_failed(version_id: int, instead_id: int, error: Exception) -> WeightsFailedError:
    """What a request ends with that had begun to answer."""
    return WeightsFailedError(
        f"Weight version {version_id} failed with {type(error).__name__}: {describe(str(error), 400)} "
        f"Requests run on version {instead_id} again.",
        remedy="This one had begun to answer: send it again.",
    )


class Probation:
    """
    Args:
        num_answers: that end it; 0: no version is ever on probation.
        first: is trusted: there is nothing before it.

    Attributes:
        fallback: what is gone back to if the current version fails; None: nothing.
    """

    def __init__(self, num_answers: int, first: WeightVersion) -> None:
        self._num_answers = num_answers
        self._answers: WeakKeyDictionary[WeightVersion, int] = WeakKeyDictionary([(first, num_answers)])
        self._candidates: WeakSet[WeightVersion] = WeakSet()
        self._failed: WeakSet[WeightVersion] = WeakSet()
        self.fallback: WeightVersion | None = None

    def replace(self, before: WeightVersion, after: WeightVersion) -> None:
        """New requests get `after` from now on, in place of `before`."""
        if after is before or not self._num_answers:
            return
        self._candidates.discard(after)
        self._failed.discard(after)
        if self._answers.get(before):
            self.fallback = before
        if self._answers.setdefault(after, 0) >= self._num_answers or after is self.fallback:
            self.fallback = None

    def watch(self, candidate: WeightVersion) -> None:
        """Requests try a version beside the current one: as long as they do, it is on probation."""
        self._answers.setdefault(candidate, 0)
        self._candidates.add(candidate)
        self._failed.discard(candidate)

    def forget(self, candidate: WeightVersion) -> None:
        """A version is tried no more: whoever still asks for it has errors of their own."""
        self._candidates.discard(candidate)
        self._answers.pop(candidate, None)

    def is_on_probation(self, version: WeightVersion, current: WeightVersion) -> bool:
        """Whether an error is the version's fault, and there is another one to use."""
        if not self._num_answers or (version is current and self.fallback is None):
            return False
        return version in self._candidates or self._answers.get(version, self._num_answers) < self._num_answers

    def instead_of(self, version: WeightVersion, current: WeightVersion) -> WeightVersion | None:
        """What is used in place of a version on probation if it fails: of a candidate, the current one.

        None: it is not on probation.
        """
        if not self.is_on_probation(version, current):
            return None
        return self.fallback if version is current else current

    def has_failed(self, version: WeightVersion) -> bool:
        """Whether it has been left, and nobody has wanted it since."""
        return version in self._failed

    def succeed(self, version: WeightVersion, current: WeightVersion) -> None:
        """A version has given an answer."""
        if (given := self._answers.get(version)) is None:
            return
        self._answers[version] = given + 1
        if given + 1 == self._num_answers and version is current:
            self.fallback = None

    def fail(self, version: WeightVersion, current: WeightVersion) -> WeightVersion:
        """A version on probation has failed; returns what to use in its place."""
        instead = self.instead_of(version, current)
        assert instead is not None, "the version is not on probation"
        self._candidates.discard(version)
        self._answers.pop(version, None)
        self._failed.add(version)
        if version is current:
            self.fallback = None
        return instead
