"""The engine: schedule, run, sample, commit, step after step in a thread of its own, and the ways to ask it.

In: prompts as token ids, from any thread. Out: `RequestOutput`s, to each request's callback. Must never know: HTTP,
checkpoints, plans.

Whatever callers and the step loop share is guarded by one condition, which the loop never holds while a step computes
or a callback runs.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

import torch

from amalgam.base.threads import StoppableThread
from amalgam.config.settings import Settings
from amalgam.engine.asking import UNLABELLED, Asking
from amalgam.engine.blocks import BlockPool
from amalgam.engine.logits import processors_for
from amalgam.engine.meter import Load, Meter
from amalgam.engine.outputs import end, take_tokens
from amalgam.engine.pace import Pace
from amalgam.engine.params import MAX_SEED, SamplingParams, check_param_ids
from amalgam.engine.probation import FailedVersion, Probation
from amalgam.engine.prompts import PromptEmbedding, PromptLogprobs
from amalgam.engine.request import (
    EngineStatus,
    FinishReason,
    Observation,
    OutputCallback,
    Pooling,
    Request,
    RequestOutput,
    RequestStatus,
    StepPlan,
    StepResult,
    checked_prompt,
)
from amalgam.engine.rollback import Deliveries, Rollback
from amalgam.engine.runner import Runner
from amalgam.engine.scheduler import Scheduler
from amalgam.engine.speculation.speculator import Speculator
from amalgam.engine.states import StatePool
from amalgam.errors import LostWeightsError, UnavailableError, UnsupportedError, describe
from amalgam.kernels.backends.split.traffic import Traffic
from amalgam.models.decoder import Decoder
from amalgam.models.routing import RoutingObserver
from amalgam.models.weights import WeightVersion
from amalgam.text.grammar import CompiledGrammar
from amalgam.text.stream import TextStream
from amalgam.text.tokenizer import Tokenizer

T = TypeVar("T")
Told = TypeVarTuple("Told")

logger = logging.getLogger("amalgam.engine")

_MAX_FAILURES = 3  # steps in a row
_MIN_PROMPT_TOKENS = 32  # in a step with streams: with fewer, reading experts costs more than computing with them
_GUESSING_STREAMS = 4  # that have slots for their states before guesses, where there are recurrent states
_FATAL = (MemoryError, torch.OutOfMemoryError, LostWeightsError)


class Engine(Asking):
    """Serves one decoder, and at any moment one or more of its weight versions.

    Args:
        version: weight version of new requests until `set_version` gives another.
        device, dtype: of the KV cache.
        observer: sees which experts each token was routed to.
        speculator: guesses the next tokens of requests; the step verifies them. Changes no answer.

    Attributes:
        on_left: is told the weight version id of each request that has ended, in the step thread, where nothing refers
            to that version any more but other requests.
        on_ended: is shown each request that has ended, and its last output, in the step thread.
        on_version_failed: hears of a version that has failed on its first requests, in the step thread.
        speculator: as given; None: nothing is guessed.

    Raises:
        ConfigError: the KV cache would not hold one sequence of the longest length.
    """

    def __init__(
        self,
        decoder: Decoder,
        version: WeightVersion,
        tokenizer: Tokenizer,
        settings: Settings,
        device: torch.device,
        dtype: torch.dtype,
        observer: RoutingObserver | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        max_sequence_tokens = min(settings.inference.max_seq_length, decoder.spec.max_positions)
        self._runner = Runner(decoder, settings, max_sequence_tokens, device, dtype, observer)
        self._runner.prepare(version)
        self._tokenizer = tokenizer
        self._vocab_size = decoder.spec.vocab_size
        self._is_on_cpu = device.type == "cpu"
        super().__init__(max_in_flight=settings.engine.max_queue)
        self._thread = StoppableThread(self._loop, "amalgam-engine", self._ask_to_stop)
        self._num_failures = 0  # steps in a row; of the step thread
        self.speculator = speculator
        self.on_ended: Callable[[Request, RequestOutput], None] | None = None
        self.on_left: Callable[[int], None] | None = None
        self.on_version_failed: Callable[[FailedVersion], None] | None = None
        self.meter = Meter(
            distinct_experts=lambda: None if observer is None else observer.distinct_experts(),
            speculation=lambda: None if self.speculator is None else self.speculator.counts,
        )

        max_step_tokens = settings.engine.max_step_tokens
        self._pace = Pace(settings.engine.max_slowdown, min(_MIN_PROMPT_TOKENS, max_step_tokens), max_step_tokens)

        self._condition = threading.Condition()  # guards everything below
        self._scheduler = Scheduler(
            version,
            BlockPool(self._runner.num_blocks),
            block_size=settings.engine.block_size,
            max_batch_size=settings.inference.max_batch_size,
            max_step_tokens=max_step_tokens,
            max_sequence_tokens=max_sequence_tokens,
            max_queue=settings.engine.max_queue,
            shares_blocks=settings.engine.prefix_cache,
            states=self._new_states(),
        )
        self._scheduler.prompt_tokens_beside = self._pace.prompt_tokens_beside
        self._rollback = Rollback(
            Probation(settings.engine.rollback_answers, version),
            self._scheduler,
            end=lambda requests, error: self._finish(requests, FinishReason.ERROR, error),
            forget_guesses=lambda request_id: None if self.speculator is None else self.speculator.forget(request_id),
        )
        self._requests: dict[int, Request] = {}  # until their last output has been delivered
        self._cancelled: list[Request] = []
        self._next_id = 1
        self._is_draining = False
        self._end_reason: str | None = None  # why nothing is computed any more
        self._has_abandoned = False  # then those who were left have been answered

    def _new_states(self) -> StatePool | None:
        num_states = self._runner.num_states
        if not num_states:
            return None
        num_guesses = 0 if self.speculator is None else self.speculator.num_tokens
        return StatePool(num_states, min(_GUESSING_STREAMS * num_guesses, num_states // 4))

    def start(self) -> None:
        """Start the step loop; requests submitted before wait for it."""
        self._thread.start()

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: OutputCallback,
        observation: Observation = UNLABELLED,
        constraint: CompiledGrammar | None = None,
        version: WeightVersion | None = None,
    ) -> int:
        """Queue a request and return its id. Any thread.

        Args:
            on_output: takes the request's outputs in the step thread, so it must be quick; the last one `is_finished`.
            constraint: what the answer must follow, `amalgam.text.grammar.compile_grammar` of this engine's tokenizer.
            version: of the model's weights, which the request runs on to its end; None: the one of new requests when it
                is admitted to a step.

        Raises:
            RequestError: the prompt is empty or holds something that is not a token id of the model, parameters name
                such a thing, or the expert statistics cannot take the label.
            UnsupportedError: a label or a trace without expert statistics.
            PromptTooLongError: the prompt leaves no room for a new token.
            OverloadedError: the queue is full.
            UnavailableError: the engine is draining, has stopped or has failed.
        """
        prompt_ids = self.checked_prompt(prompt_ids)
        check_param_ids(params, self._vocab_size)
        seed = secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed
        text = TextStream(
            self._tokenizer,
            params.stop,
            prompt_ids if params.continues_prompt else (),
            params.min_tokens,
            keeps_special_tokens=params.keeps_special_tokens,
        )
        state = None if constraint is None else constraint.start()
        num_top = params.prompt_logprobs
        reader = None if num_top is None else PromptLogprobs(prompt_ids, num_top, self._vocab_size)
        request = Request(
            0,
            list(prompt_ids),
            params,
            on_output,
            seed,
            text,
            processors_for(params, self._tokenizer.eos_token_ids, state),
            state,
            reader,
            observation,
            version,
            keeps_version=version is not None and not observation.may_move,
            end_token_ids=params.end_token_ids(self._tokenizer.eos_token_ids),
        )
        return self._queue(request)

    def submit_embedding(
        self,
        prompt_ids: Sequence[int],
        pooling: Pooling,
        on_output: OutputCallback,
        observation: Observation = UNLABELLED,
        version: WeightVersion | None = None,
    ) -> int:
        """Queue a request for one vector, which its only output carries; see `embed`. Otherwise as `submit`."""
        prompt_ids = self.checked_prompt(prompt_ids)
        return self._queue(
            Request(
                0,
                list(prompt_ids),
                SamplingParams(),
                on_output,
                reader=PromptEmbedding(len(prompt_ids), pooling),
                observation=observation,
                version=version,
                keeps_version=version is not None and not observation.may_move,
                max_new_tokens=0,
            )
        )

    def _queue(self, request: Request) -> int:
        with self._condition:
            if self._end_reason is not None:
                raise self._unavailable()
            if self._is_draining:
                raise UnavailableError("The engine is draining.", remedy="Send the request to another server.")
            version = request.version
            if version is not None and not request.keeps_version and self._rollback.has_failed(version):
                request.version = None  # it was chosen before that
            request.request_id = self._next_id
            self._scheduler.check_room()
            self._admit_observation(request)
            self._scheduler.add(request)
            self._note_load()
            self._next_id += 1
            self._requests[request.request_id] = request
            self._condition.notify_all()
            return request.request_id

    def check_prompt_length(self, num_tokens: int) -> None:
        """
        Raises:
            PromptTooLongError: a prompt of so many tokens leaves no room for a new one.
        """
        self._scheduler.check_prompt_length(num_tokens)

    def checked_prompt(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        """A prompt of which several requests are submitted: they do not check it again, which takes time in its length.

        Raises:
            RequestError: see `submit`.
            PromptTooLongError: the prompt leaves no room for a new token.
        """
        self._scheduler.check_prompt_length(len(prompt_ids))  # before anything that takes time in its length
        return checked_prompt(prompt_ids, self._vocab_size)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Requests that are submitted inside enter the queue together: no step begins before the last of them.

        Nor does one end: what takes time is to be done before, as `checked_prompt`.
        """
        with self._condition:
            yield

    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request; its slot and blocks are free before the next step. A finished one stays as it is."""
        with self._condition:
            request = self._requests.get(request_id)
            if request is None or request.is_cancelled or request.status is RequestStatus.FINISHED:
                return
            request.is_cancelled, request.cancelled_as = True, reason
            self._cancelled.append(request)

    def set_version(self, version: WeightVersion) -> None:
        """Give requests that are admitted from now on another weight version; the others keep theirs to the end.

        It is on probation: if it fails on its first requests, it is left for the one before.
        """
        self._runner.prepare(version)  # here, and not in its first step
        with self._condition:
            self._rollback.replace(version)

    def prepare(self, version: WeightVersion) -> None:
        """Make a version ready to run, so that its first step takes no longer than others. In any thread."""
        self._runner.prepare(version)

    def keep(self, version_ids: AbstractSet[int]) -> None:
        """Requests may still ask for these versions: what they have computed of beginnings stays to be shared."""
        with self._condition:
            self._scheduler.kept_ids = frozenset(version_ids)

    def watch(self, candidate: WeightVersion) -> None:
        """Requests try a version beside the current one: as long as they do, it is left if it fails."""
        with self._condition:
            self._rollback.watch(candidate)

    def unwatch(self, candidate: WeightVersion) -> None:
        """A version is tried no more. One that is the current one now stays on probation as any new one."""
        with self._condition:
            self._rollback.unwatch(candidate)

    @property
    def fallback(self) -> WeightVersion | None:
        """What is gone back to if the current version fails; None: it has shown that it answers."""
        return self._rollback.fallback

    @property
    def version(self) -> WeightVersion:
        """The weight version of new requests."""
        return self._scheduler.version

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room for a new token."""
        return self._scheduler.max_sequence_tokens - 1

    @property
    def kernels(self) -> dict[str, str]:
        """Instruction of a step → what runs it, with the newest version."""
        return self._runner.kernels(self.version)

    @property
    def traffic(self) -> Mapping[str, Traffic]:
        """What went to each other device that experts lie on, and came back; by name."""
        return self._runner.traffic

    @property
    def kv_cache_bytes(self) -> int:
        """Size of the KV cache."""
        return self._runner.kv_cache_bytes

    @property
    def untouched_bytes(self) -> int:
        """Of the KV cache, what has never been written: on the CPU it takes no memory before that."""
        pool = self._scheduler.pool
        return self.kv_cache_bytes * pool.num_untouched // pool.num_blocks if self._is_on_cpu else 0

    @property
    def state_cache_bytes(self) -> int:
        """Size of the recurrent states' slots; 0: the model has none."""
        return self._runner.state_cache_bytes

    def status(self) -> EngineStatus:
        """A consistent view of the moment."""
        with self._condition:
            return EngineStatus(
                is_alive=self._end_reason is None and self._thread.is_alive(),
                is_draining=self._is_draining,
                num_running=len(self._scheduler.running),
                num_waiting=len(self._scheduler.waiting),
                num_free_blocks=self._scheduler.pool.num_free,
                num_blocks=self._scheduler.pool.num_blocks,
                versions=self._scheduler.count_by_version(),
            )

    def drain(self, timeout_seconds: float) -> bool:
        """Refuse new requests and wait for those in flight; False if some are left when the time is over."""
        with self._condition:
            self._is_draining = True
            return self._condition.wait_for(lambda: not self._requests, timeout_seconds)

    def stop(self) -> None:
        """End every request with an error and wait for the step loop to end. Harmless when repeated."""
        self._ask_to_stop()
        if self._thread is threading.current_thread():
            return
        if self._thread.ident is not None:
            self._thread.join()
        self._abandon()

    def _ask_to_stop(self) -> None:
        with self._condition:
            self._end_reason = self._end_reason or "has been stopped"
            self._condition.notify_all()

    def _loop(self) -> None:
        try:
            with torch.inference_mode():  # once and not in each step, where it is one of the dearer calls
                while self._wait_for_work():
                    self._deliver(self._step())
        except BaseException as error:
            self._fail(error)
        self._abandon()

    def _wait_for_work(self) -> bool:
        with self._condition:
            self._condition.wait_for(lambda: self._end_reason is not None or self._scheduler.has_requests)
            return self._end_reason is None

    def _step(self) -> Deliveries:
        """One step. When it returns, nothing here refers to the plan any more, nor to its weight version."""
        with self._condition:
            cancelled = self._finish_cancelled() if self._cancelled else []
            plan = self._scheduler.schedule()
            rooms = {} if plan is None or self.speculator is None else self._scheduler.room_for_proposals(plan)
            self._note_load()
        self._deliver(cancelled)
        if plan is None:
            return []
        if self.speculator is not None and rooms:
            proposals = self.speculator.propose(plan, rooms)  # without the condition: a guess may take its time
            with self._condition:
                plan = self._scheduler.add_proposals(plan, proposals)
        deliveries: Deliveries = []
        started = time.monotonic()
        try:
            result = self._runner.execute(plan)
            doubtful = self._rollback.doubtful(plan, result)
            gaps = self._take(plan, result, deliveries, doubtful)
            rejected = {} if self.speculator is None else _num_rejected(plan, deliveries)
            self._runner.commit(plan, rejected)
        except Exception as error:
            return self._give_up(plan, error, deliveries)
        self._num_failures = 0
        seconds = time.monotonic() - started
        ended = [(request, output) for request, output in deliveries if output.is_finished]
        if self.speculator is not None:
            observer = self._runner.observer
            count_experts = (lambda: None) if observer is None else observer.distinct_in_step
            self.speculator.commit(plan, rejected, {request.request_id for request, _ in ended}, seconds, count_experts)
        with self._condition:
            self._scheduler.commit(plan, rejected)
            self._measure(plan, deliveries, seconds, gaps)
            left, more = self._rollback.judge(plan, doubtful)
            for request, output in ended:
                self._leave(request, is_sound=output.error is None)
                if output.error is None:
                    self._rollback.succeed(plan.version)
            if ended or doubtful:  # otherwise the load is as it was before the step
                self._note_load()
        for failed in left:
            _tell(self.on_version_failed, failed)
        return deliveries + more

    def _finish_cancelled(self) -> Deliveries:
        requests = [request for request in self._cancelled if request.status is not RequestStatus.FINISHED]
        self._cancelled.clear()
        return [ended for request in requests for ended in self._finish([request], request.cancelled_as)]

    def _take(
        self, plan: StepPlan, result: StepResult, deliveries: Deliveries, doubtful: Container[int]
    ) -> list[float]:
        """Add the step's tokens to their requests, and to `deliveries` what their callers see of it.

        Args:
            doubtful: ids of requests that get nothing.

        Returns:
            Seconds since each request's tokens before these.
        """
        now = time.monotonic()
        gaps: list[float] = []
        for item in plan.scheduled:
            request = item.request
            if request.is_cancelled or not item.needs_sample or request.request_id in doubtful:
                continue
            reader = request.reader
            new = result.tokens.get(request.request_id)
            if reader is not None and reader.error is not None:
                output = end(request, FinishReason.ERROR, now, reader.error)
            elif new is not None:
                if (last := request.last_token_at) is None:
                    request.first_token_at = now
                else:
                    gaps.append(now - last)
                request.last_token_at = now
                output = take_tokens(request, new, now)
            elif item.num_logits:
                output = end(request, FinishReason.ERROR, now, result.errors[request.request_id])
            else:
                output = end(request, FinishReason.LENGTH, now)
            if reader is not None:
                request.reader = None
                output = output if output.error is not None else reader.added_to(output)
            deliveries.append((request, output))
        return gaps

    def _give_up(self, plan: StepPlan, error: Exception, taken: Deliveries) -> Deliveries:
        """End the requests of a step that failed; the third in a row, or a lack of memory or weights, ends the engine.

        A version on probation is left instead.

        Args:
            taken: what requests had got of the step before it failed; they still get it.
        """
        logger.error("A step of %d requests failed.", len(plan.scheduled), exc_info=error)
        # The error lives on with the caller; its frames hold the step's tensors and weights.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        got = {request.request_id: output for request, output in taken}
        with self._condition:
            self.meter.add_step(0, sum(len(output.token_ids) for output in got.values()))
            left: FailedVersion | None = None
            if self._rollback.is_on_probation(plan.version):
                left, ended = self._rollback.leave(plan.version, error, got)
            else:
                ended = self._finish([item.request for item in plan.scheduled], FinishReason.ERROR, error)
        if left is None:
            self._num_failures += 1
            if self._num_failures >= _MAX_FAILURES or isinstance(error, _FATAL):
                self._fail(error)
        else:
            _tell(self.on_version_failed, left)
        return [
            (request, output._replace(text=one.text, token_ids=one.token_ids, logprobs=one.logprobs))
            if (one := got.get(request.request_id))
            else (request, output)
            for request, output in ended
        ]

    def _finish(self, requests: Sequence[Request], reason: FinishReason, error: Exception | None = None) -> Deliveries:
        now = time.monotonic()
        deliveries = [(request, end(request, reason, now, error=error)) for request in requests]
        for request in requests:
            self._leave(request, is_sound=error is None)
        self._note_load()
        return deliveries

    def _leave(self, request: Request, *, is_sound: bool) -> None:
        self._scheduler.finish(request, is_sound=is_sound)
        if self.speculator is not None:
            self.speculator.forget(request.request_id)

    def _admit_observation(self, request: Request) -> None:
        observation, observer = request.observation, self._runner.observer
        if observation.label is None and not observation.wants_trace:
            return
        if observer is None:
            raise UnsupportedError(
                "Labels and traces of routed experts need expert statistics.",
                remedy="Set statistics.enabled, and serve a model with experts.",
            )
        num_tokens = request.num_prompt_tokens + request.max_new_tokens
        num_traced = min(num_tokens, self._scheduler.max_sequence_tokens) if observation.wants_trace else 0
        observer.admit(request.request_id, observation.label if observation.is_counted else None, num_traced)

    def _measure(self, plan: StepPlan, deliveries: Deliveries, seconds: float, gaps: Sequence[float]) -> None:
        num_tokens = num_beside = num_streams = num_prompt = 0
        for item in plan.scheduled:
            num_tokens += item.num_tokens
            if item.is_stream:
                num_streams += 1
            else:
                num_beside += item.num_tokens
            if item.start < item.request.num_prompt_tokens:  # what a preemption made it compute again does not count
                num_prompt += max(0, min(item.end, item.request.num_prompt_tokens) - (item.end - item.num_unrecorded))
        num_new = sum([len(output.token_ids) for _, output in deliveries])
        self._pace.add(num_streams, num_beside, seconds)
        self.meter.add_step(num_prompt, num_new, num_tokens=num_tokens, seconds=seconds, gaps=gaps)

    def _note_load(self) -> None:
        """Tell the meter how much is under way now; called while that is guarded."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        load = Load(len(scheduler.running), len(scheduler.waiting), pool.num_blocks - pool.num_free)
        self.meter.set_load(load, scheduler.counts)

    def _deliver(self, deliveries: Deliveries) -> None:
        ended: list[int] = []
        try:
            for request, output in deliveries:
                if output.is_finished:
                    output = self._show(request, output)
                    ended.append(request.request_id)
                try:
                    request.on_output(output)
                except BaseException as error:  # one that ends a thread must not end this one: others wait for outputs
                    what = "Nobody takes the outputs of request %d: it ends."
                    logger.warning(what, request.request_id, exc_info=error)
                    self.cancel(request.request_id)
        finally:  # whatever has gone wrong, who has got a last output gets no second one
            if ended:
                with self._condition:
                    for request_id in ended:
                        del self._requests[request_id]
                    self._condition.notify_all()
        if ended:
            for version_id in {output.usage.version for _, output in deliveries if output.usage is not None}:
                _tell(self.on_left, version_id)

    def _show(self, request: Request, output: RequestOutput) -> RequestOutput:
        """Count a last output and show it to those who observe requests; returns it with its trace."""
        self.meter.add_finished(output)
        observer = self._runner.observer
        if observer is not None and request.observation.wants_trace:
            output = output._replace(trace=_tell(observer.take_trace, request.request_id))
        _tell(self.on_ended, request, output)
        return output

    def _fail(self, error: BaseException) -> None:
        logger.critical("The engine has failed and ends.", exc_info=error)
        with self._condition:
            self._end_reason = f"has failed with {type(error).__name__}: {describe(str(error), 400)}"

    def _abandon(self) -> None:
        """Answer everyone who is left, once. Runs after the last step, and after whatever may have gone wrong in it."""
        with self._condition:
            if self._has_abandoned:
                return
            self._has_abandoned = True
            now = time.monotonic()
            requests = list(self._requests.values())
            deliveries = [(r, end(r, FinishReason.ERROR, now, error=self._unavailable())) for r in requests]
            self._scheduler.clear()
            self._note_load()
            self._cancelled.clear()
        self._deliver(deliveries)

    def _unavailable(self) -> UnavailableError:
        return UnavailableError(f"The engine {self._end_reason}.", remedy="Restart it; the log has the cause.")


def _tell(observer: Callable[[*Told], T] | None, *told: *Told) -> T | None:
    """What an observer answers; None if there is none, or if it fails, which is its own matter: requests go on."""
    if observer is None:
        return None
    try:
        return observer(*told)
    except BaseException as error:  # one that ends a thread must not end this one
        logger.error("An observer of the engine has failed.", exc_info=error)
        return None


def _num_rejected(plan: StepPlan, deliveries: Deliveries) -> Mapping[int, int]:
    """Request id → how many of its proposals it did not take: they were wrong, or it has ended before them."""
    num_proposed = {item.request.request_id: len(item.proposed_ids) for item in plan.scheduled if item.proposed_ids}
    if not num_proposed:
        return num_proposed
    num_taken = {request.request_id: len(output.token_ids) for request, output in deliveries}
    return {request_id: count - max(0, num_taken.get(request_id, 0) - 1) for request_id, count in num_proposed.items()}
