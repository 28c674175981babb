"""The step loop: plan, compute, commit, deliver, until nothing is to be computed any more.

In: requests in flight. Out: outputs, to their delivery. Must never know: who asks, how a step is chosen, what it takes
to compute one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from amalgam.engine.delivery import Delivery
from amalgam.engine.in_flight import InFlight
from amalgam.engine.meter import Meter
from amalgam.engine.outputs import Deliveries, end, take_tokens
from amalgam.engine.pace import Pace
from amalgam.engine.probation import FailedVersion
from amalgam.engine.request import FinishReason, StepPlan, StepResult
from amalgam.engine.runner import Runner
from amalgam.errors import LostWeightsError

logger = logging.getLogger("amalgam.engine")

_MAX_FAILURES = 3  # steps in a row
_FATAL = (MemoryError, torch.OutOfMemoryError, LostWeightsError)


@dataclass(slots=True)
class _Step:
    """A step, and what has come of it so far.

    Attributes:
        deliveries: its tokens, as their callers see them.
        gaps: seconds since each request's tokens before these.
        doubtful: see `Rollback.doubtful`; these requests get nothing.
        rejected: request id → how many of its proposals it did not take: they were wrong, or it has ended before them.
        seconds: that it took to compute.
    """

    plan: StepPlan
    deliveries: Deliveries = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    doubtful: Mapping[int, Exception | None] = field(default_factory=dict)
    rejected: Mapping[int, int] = field(default_factory=dict)
    seconds: float = 0.0


class StepLoop:
    """What one thread does as long as its engine lives."""

    def __init__(self, in_flight: InFlight, delivery: Delivery, runner: Runner, meter: Meter, pace: Pace) -> None:
        self._in_flight = in_flight
        self._delivery = delivery
        self._runner = runner
        self._meter = meter
        self._pace = pace
        self._num_failures = 0  # steps in a row

    def run(self) -> None:
        """Compute steps while there are requests, and wait for some; returns when the engine has stopped or failed."""
        try:
            with torch.inference_mode():  # once and not in each step, where it is one of the dearer calls
                while self._in_flight.wait_for_work():
                    self._delivery.deliver(self._step())
        except BaseException as error:
            self._in_flight.fail(error)
        self._delivery.abandon()

    def _step(self) -> Deliveries:
        """One step. When it returns, nothing here refers to the plan any more, nor to its weight version."""
        plan = self._plan()
        if plan is None:
            return []
        step = _Step(plan)
        try:
            self._compute(step)
        except Exception as error:
            return self._give_up(step, error)
        return self._commit(step)

    def _plan(self) -> StepPlan | None:
        scheduler, speculator = self._in_flight.scheduler, self._in_flight.speculator
        with self._in_flight.condition:
            cancelled = self._in_flight.finish_cancelled()
            plan = scheduler.schedule()
            rooms = {} if plan is None or speculator is None else scheduler.room_for_proposals(plan)
            self._in_flight.note_load()
        self._delivery.deliver(cancelled)
        if plan is None or speculator is None or not rooms:
            return plan
        proposals = speculator.propose(plan, rooms)  # without the condition: a guess may take its time
        with self._in_flight.condition:
            return scheduler.add_proposals(plan, proposals)

    def _compute(self, step: _Step) -> None:
        """If it raises, some requests may have got their tokens already."""
        started = time.monotonic()
        result = self._runner.execute(step.plan)
        step.doubtful = self._in_flight.rollback.doubtful(step.plan, result)
        _take(step, result)
        if self._in_flight.speculator is not None:
            step.rejected = _num_rejected(step)
        self._runner.commit(step.plan, step.rejected)
        step.seconds = time.monotonic() - started

    def _commit(self, step: _Step) -> Deliveries:
        self._num_failures = 0
        plan, in_flight, rollback = step.plan, self._in_flight, self._in_flight.rollback
        ended = [(request, output) for request, output in step.deliveries if output.is_finished]
        if in_flight.speculator is not None:
            observer = self._runner.observer
            count_experts = (lambda: None) if observer is None else observer.distinct_in_step
            ended_ids = {request.request_id for request, _ in ended}
            in_flight.speculator.commit(plan, step.rejected, ended_ids, step.seconds, count_experts)
        with in_flight.condition:
            in_flight.scheduler.commit(plan, step.rejected)
            self._measure(step)
            left, more = rollback.judge(plan, step.doubtful)
            for request, output in ended:
                in_flight.leave(request, is_sound=output.error is None)
                if output.error is None:
                    rollback.succeed(plan.version)
            if ended or step.doubtful:  # otherwise the load is as it was before the step
                in_flight.note_load()
        for failed in left:
            self._delivery.report_failed(failed)
        return step.deliveries + more

    def _give_up(self, step: _Step, error: Exception) -> Deliveries:
        """End the requests of a step that failed; the third in a row, or a lack of memory or weights, ends the engine.

        A version on probation is left instead. What requests had got of the step before it failed, they still get.
        """
        scheduled, version = step.plan.scheduled, step.plan.version
        logger.error("A step of %d requests failed.", len(scheduled), exc_info=error)
        # The error lives on with the caller; its frames hold the step's tensors and weights.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        got = {request.request_id: output for request, output in step.deliveries}
        with self._in_flight.condition:
            self._meter.add_step(0, sum(len(output.token_ids) for output in got.values()))
            left: FailedVersion | None = None
            if self._in_flight.rollback.is_on_probation(version):
                left, ended = self._in_flight.rollback.leave(version, error, got)
            else:
                ended = self._in_flight.finish([item.request for item in scheduled], FinishReason.ERROR, error)
        if left is None:
            self._num_failures += 1
            if self._num_failures >= _MAX_FAILURES or isinstance(error, _FATAL):
                self._in_flight.fail(error)
        else:
            self._delivery.report_failed(left)
        return [
            (request, output._replace(text=one.text, token_ids=one.token_ids, logprobs=one.logprobs))
            if (one := got.get(request.request_id))
            else (request, output)
            for request, output in ended
        ]

    def _measure(self, step: _Step) -> None:
        num_tokens = num_beside = num_streams = num_prompt = 0
        for item in step.plan.scheduled:
            num_tokens += item.num_tokens
            if item.is_stream:
                num_streams += 1
            else:
                num_beside += item.num_tokens
            if item.start < item.request.num_prompt_tokens:  # what a preemption made it compute again does not count
                num_prompt += max(0, min(item.end, item.request.num_prompt_tokens) - (item.end - item.num_unrecorded))
        num_new = sum([len(output.token_ids) for _, output in step.deliveries])
        self._pace.add(num_streams, num_beside, step.seconds)
        self._meter.add_step(num_prompt, num_new, num_tokens=num_tokens, seconds=step.seconds, gaps=step.gaps)


def _take(step: _Step, result: StepResult) -> None:
    """Add a step's tokens to their requests, and note what their callers see of it."""
    now = time.monotonic()
    for item in step.plan.scheduled:
        request = item.request
        if request.is_cancelled or not item.needs_sample or request.request_id in step.doubtful:
            continue
        reader = request.reader
        new = result.tokens.get(request.request_id)
        if reader is not None and reader.error is not None:
            output = end(request, FinishReason.ERROR, now, reader.error)
        elif new is not None:
            if (last := request.last_token_at) is None:
                request.first_token_at = now
            else:
                step.gaps.append(now - last)
            request.last_token_at = now
            output = take_tokens(request, new, now)
        elif item.num_logits:
            output = end(request, FinishReason.ERROR, now, result.errors[request.request_id])
        else:
            output = end(request, FinishReason.LENGTH, now)
        if reader is not None:
            request.reader = None
            output = output if output.error is not None else reader.added_to(output)
        step.deliveries.append((request, output))


def _num_rejected(step: _Step) -> Mapping[int, int]:
    scheduled = step.plan.scheduled
    num_proposed = {item.request.request_id: len(item.proposed_ids) for item in scheduled if item.proposed_ids}
    if not num_proposed:
        return num_proposed
    num_taken = {request.request_id: len(output.token_ids) for request, output in step.deliveries}
    return {request_id: count - max(0, num_taken.get(request_id, 0) - 1) for request_id, count in num_proposed.items()}
