"""Going back to the weight version before: when, and what becomes of the requests.

In: steps that were computed or have failed. Out: versions that are left, requests that start again or end. Must never
know: how a step is computed, who takes outputs. Guarded by `InFlight.condition`, but for `doubtful`.

`probation.py` says which versions may be at fault, and what is used in their place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence

from amalgam.engine.outputs import Deliveries
from amalgam.engine.probation import FailedVersion, Probation, weights_failed
from amalgam.engine.request import Doubt, Request, RequestStatus, StepPlan, StepResult
from amalgam.engine.sampler import NonFiniteLogitsError
from amalgam.engine.scheduler import Scheduler
from amalgam.models.weights import WeightVersion

logger = logging.getLogger("amalgam.engine")


class Rollback:
    """
    Args:
        end: ends requests with an error and returns their last outputs.
        forget_guesses: is told the id of each request that starts again: what was guessed of it is void.
    """

    def __init__(
        self,
        probation: Probation,
        scheduler: Scheduler,
        end: Callable[[Sequence[Request], Exception], Deliveries],
        forget_guesses: Callable[[int], None],
    ) -> None:
        self._probation = probation
        self._scheduler = scheduler
        self._end = end
        self._forget_guesses = forget_guesses

    @property
    def fallback(self) -> WeightVersion | None:
        """What is gone back to if the current version fails; None: it has shown that it answers."""
        return self._probation.fallback

    def replace(self, version: WeightVersion) -> None:
        """New requests get `version` from now on, which is on probation."""
        self._probation.replace(self._scheduler.version, version)
        self._scheduler.version = version

    def watch(self, candidate: WeightVersion) -> None:
        """Requests try a version beside the current one: as long as they do, it is left if it fails."""
        self._probation.watch(candidate)

    def unwatch(self, candidate: WeightVersion) -> None:
        """A version is tried no more. One that is the current one now stays on probation as any new one."""
        if candidate is not self._scheduler.version:
            self._probation.forget(candidate)

    def is_on_probation(self, version: WeightVersion) -> bool:
        """Whether an error is the version's fault, and there is another one to use."""
        return self._probation.is_on_probation(version, self._scheduler.version)

    def has_failed(self, version: WeightVersion) -> bool:
        """Whether it has been left, and nobody has wanted it since."""
        return self._probation.has_failed(version)

    def succeed(self, version: WeightVersion) -> None:
        """A version has given an answer."""
        self._probation.succeed(version, self._scheduler.version)

    def doubtful(self, plan: StepPlan, result: StepResult) -> dict[int, Exception | None]:
        """Request id → its NaN, of those requests of a step that get nothing of it before it is known who is at fault.

        None: there was none on this version, which only was to tell that.
        """
        is_on_probation = self.is_on_probation(plan.version)
        doubtful: dict[int, Exception | None] = {}
        for item in plan.scheduled:
            request = item.request
            if not is_on_probation and request.doubt is None:
                continue
            error = None if request.reader is None else request.reader.error
            error = error or result.errors.get(request.request_id)
            if isinstance(error, NonFiniteLogitsError):
                doubtful[request.request_id] = error
            elif error is None and request.doubt is not None and item.needs_sample and not request.doubt.may_go_on:
                doubtful[request.request_id] = None
        return doubtful

    def judge(self, plan: StepPlan, doubtful: Mapping[int, Exception | None]) -> tuple[list[FailedVersion], Deliveries]:
        """Whose fault a NaN is: that of a version on probation if another one computes none for the same request.

        Returns:
            The versions that are left, and the last outputs of requests that end.
        """
        left: list[FailedVersion] = []
        ended: Deliveries = []
        for item in plan.scheduled:
            request = item.request
            if request.is_cancelled or request.status is RequestStatus.FINISHED:
                continue
            error = doubtful.get(request.request_id)
            if error is not None:
                ended += self._ask_another(request, plan.version, error)
            elif request.doubt is not None and item.needs_sample:
                failed, more = self._resolve(request, request.doubt)
                left += failed
                ended += more
        return left, ended

    def leave(
        self, version: WeightVersion, error: Exception, got: Container[int] = ()
    ) -> tuple[FailedVersion, Deliveries]:
        """Go back to the version before; requests that have got nothing yet start again on it, the others end.

        Args:
            got: ids of requests that got something of the step that failed.
        """
        instead = self._probation.fail(version, self._scheduler.version)
        if self._scheduler.version is version:
            self._scheduler.version = instead
        ending: list[Request] = []
        bound, doubting = self._scheduler.bound_to(version), self._scheduler.doubting(version)
        for request in bound:
            if request.request_id in got or not request.may_start_again:
                ending.append(request)
                continue
            self._start_again(request)
        for request in doubting:
            if request.doubt is not None and not request.doubt.may_go_on:
                self._start_again(request, version)  # it ends with the version that it began with
                ending.append(request)
            request.doubt = None
        bound += doubting
        failure = weights_failed(version.version_id, instead.version_id, error)
        left = FailedVersion(version, instead, str(failure.what), len(bound) - len(ending), len(ending))
        logger.error("%s %d requests start again, %d end.", failure.what, left.num_restarted, left.num_ended)
        return left, self._end(ending, failure)

    def _ask_another(self, request: Request, version: WeightVersion, error: Exception) -> Deliveries:
        """A version has computed NaN for a request: see what the one before computes, unless it was asked already."""
        tried_ids = frozenset({version.version_id}) | (
            frozenset() if request.doubt is None else request.doubt.tried_ids
        )
        instead = self._probation.instead_of(version, self._scheduler.version)
        if instead is None or instead.version_id in tried_ids:
            # On all of them, or the version has shown meanwhile that it answers.
            return self._end_as_begun(request, error)
        request.doubt = Doubt(version, error, request.may_start_again, tried_ids)
        self._start_again(request, instead)
        return []

    def _resolve(self, request: Request, doubt: Doubt) -> tuple[list[FailedVersion], Deliveries]:
        """Another version has computed no NaN for a request: the first one is at fault, if it still is on probation."""
        if self.is_on_probation(doubt.version):
            failed, ended = self.leave(doubt.version, doubt.error)
            return [failed], ended
        if doubt.may_go_on:
            request.doubt = None
            return [], []
        return [], self._end_as_begun(request, doubt.error)

    def _end_as_begun(self, request: Request, error: Exception) -> Deliveries:
        """End a request with an error, and with the version that it began with."""
        if request.doubt is not None:
            self._start_again(request, request.doubt.version)
        return self._end([request], error)

    def _start_again(self, request: Request, version: WeightVersion | None = None) -> None:
        self._scheduler.start_again(request, version)
        self._forget_guesses(request.request_id)
