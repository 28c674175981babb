"""The engine: requests are admitted, scheduled, computed and delivered, step after step in a thread of its own.

In: prompts as token ids, from any thread. Out: `RequestOutput`s, to each request's callback. Must never know: HTTP,
checkpoints, plans.

This puts it together, and is what others know of it: `admission.py` makes requests, `in_flight.py` has what callers
and the step loop share, `step_loop.py` computes, `delivery.py` calls back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import torch

from amalgam.base.threads import StoppableThread
from amalgam.config.settings import Settings
from amalgam.engine.admission import Admission
from amalgam.engine.asking import UNLABELLED, Asking
from amalgam.engine.blocks import BlockPool
from amalgam.engine.delivery import Delivery
from amalgam.engine.in_flight import InFlight
from amalgam.engine.meter import Meter
from amalgam.engine.pace import Pace
from amalgam.engine.params import SamplingParams
from amalgam.engine.probation import FailedVersion, Probation
from amalgam.engine.request import (
    EngineStatus,
    FinishReason,
    Observation,
    OutputCallback,
    Pooling,
    Request,
    RequestOutput,
)
from amalgam.engine.runner import Runner
from amalgam.engine.scheduler import Scheduler
from amalgam.engine.speculation.speculator import Speculator
from amalgam.engine.states import StatePool
from amalgam.engine.step_loop import StepLoop
from amalgam.kernels.backends.split.traffic import Traffic
from amalgam.models.decoder import Decoder
from amalgam.models.routing import RoutingObserver
from amalgam.models.weights import WeightVersion
from amalgam.text.grammar import CompiledGrammar
from amalgam.text.tokenizer import Tokenizer

_MIN_PROMPT_TOKENS = 32  # in a step with streams: with fewer, reading experts costs more than computing with them
_GUESSING_STREAMS = 4  # that have slots for their states before guesses, where there are recurrent states


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
        super().__init__(max_in_flight=settings.engine.max_queue)
        max_sequence_tokens = min(settings.inference.max_seq_length, decoder.spec.max_positions)
        max_step_tokens = settings.engine.max_step_tokens
        self._is_on_cpu = device.type == "cpu"
        self._runner = Runner(decoder, settings, max_sequence_tokens, device, dtype, observer)
        self._runner.prepare(version)
        self.on_ended: Callable[[Request, RequestOutput], None] | None = None
        self.on_left: Callable[[int], None] | None = None
        self.on_version_failed: Callable[[FailedVersion], None] | None = None
        self.meter = Meter(
            distinct_experts=lambda: None if observer is None else observer.distinct_experts(),
            speculation=lambda: None if self.speculator is None else self.speculator.counts,
        )
        pace = Pace(settings.engine.max_slowdown, min(_MIN_PROMPT_TOKENS, max_step_tokens), max_step_tokens)
        self._scheduler = Scheduler(
            version,
            BlockPool(self._runner.num_blocks),
            block_size=settings.engine.block_size,
            max_batch_size=settings.inference.max_batch_size,
            max_step_tokens=max_step_tokens,
            max_sequence_tokens=max_sequence_tokens,
            max_queue=settings.engine.max_queue,
            shares_blocks=settings.engine.prefix_cache,
            states=_new_states(self._runner.num_states, 0 if speculator is None else speculator.num_tokens),
        )
        self._scheduler.prompt_tokens_beside = pace.prompt_tokens_beside
        self._admission = Admission(tokenizer, decoder.spec.vocab_size, self._scheduler, observer)
        probation = Probation(settings.engine.rollback_answers, version)
        self._in_flight = InFlight(self._scheduler, probation, self.meter, self._admission.observe, speculator)
        self._delivery = Delivery(self._in_flight, self.meter, observer, observers=self)
        loop = StepLoop(self._in_flight, self._delivery, self._runner, self.meter, pace)
        self._thread = StoppableThread(loop.run, "amalgam-engine", self._in_flight.stop)

    @property
    def speculator(self) -> Speculator | None:
        """Guesses the next tokens of requests; None: nothing is guessed. To be set while there are none."""
        return self._in_flight.speculator

    @speculator.setter
    def speculator(self, speculator: Speculator | None) -> None:
        self._in_flight.speculator = speculator

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
        request = self._admission.answer(prompt_ids, params, on_output, observation, constraint, version)
        return self._in_flight.add(request)

    def submit_embedding(
        self,
        prompt_ids: Sequence[int],
        pooling: Pooling,
        on_output: OutputCallback,
        observation: Observation = UNLABELLED,
        version: WeightVersion | None = None,
    ) -> int:
        """Queue a request for one vector, which its only output carries; see `embed`. Otherwise as `submit`."""
        return self._in_flight.add(self._admission.embedding(prompt_ids, pooling, on_output, observation, version))

    def check_prompt_length(self, num_tokens: int, num_new_tokens: int = 1) -> None:
        """
        Raises:
            PromptTooLongError: a prompt of so many tokens leaves no room for so many new ones.
        """
        self._scheduler.check_prompt_length(num_tokens, num_new_tokens)

    def checked_prompt(self, prompt_ids: Sequence[int], num_new_tokens: int = 1) -> Sequence[int]:
        """A prompt of which several requests are submitted: they do not check it again, which takes time in its length.

        Raises:
            RequestError: see `submit`.
            PromptTooLongError: the prompt leaves no room for so many new tokens.
        """
        return self._admission.checked_prompt(prompt_ids, num_new_tokens)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Requests that are submitted inside enter the queue together: no step begins before the last of them.

        Nor does one end: what takes time is to be done before, as `checked_prompt`.
        """
        with self._in_flight.condition:
            yield

    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request; its slot and blocks are free before the next step. A finished one stays as it is."""
        self._in_flight.cancel(request_id, reason)

    def set_version(self, version: WeightVersion) -> None:
        """Give requests that are admitted from now on another weight version; the others keep theirs to the end.

        It is on probation: if it fails on its first requests, it is left for the one before.
        """
        self._runner.prepare(version)  # here, and not in its first step
        with self._in_flight.condition:
            self._in_flight.rollback.replace(version)

    def prepare(self, version: WeightVersion) -> None:
        """Make a version ready to run, so that its first step takes no longer than others. In any thread."""
        self._runner.prepare(version)

    def keep(self, version_ids: AbstractSet[int]) -> None:
        """Requests may still ask for these versions: what they have computed of beginnings stays to be shared."""
        with self._in_flight.condition:
            self._scheduler.kept_ids = frozenset(version_ids)

    def watch(self, candidate: WeightVersion) -> None:
        """Requests try a version beside the current one: as long as they do, it is left if it fails."""
        with self._in_flight.condition:
            self._in_flight.rollback.watch(candidate)

    def unwatch(self, candidate: WeightVersion) -> None:
        """A version is tried no more. One that is the current one now stays on probation as any new one."""
        with self._in_flight.condition:
            self._in_flight.rollback.unwatch(candidate)

    @property
    def fallback(self) -> WeightVersion | None:
        """What is gone back to if the current version fails; None: it has shown that it answers."""
        return self._in_flight.rollback.fallback

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
        return self._in_flight.status(is_running=self._thread.is_alive())

    def drain(self, timeout_seconds: float) -> bool:
        """Refuse new requests and wait for those in flight; False if some are left when the time is over."""
        return self._in_flight.drain(timeout_seconds)

    def stop(self) -> None:
        """End every request with an error and wait for the step loop to end. Harmless when repeated."""
        self._in_flight.stop()
        if self._thread is threading.current_thread():
            return
        if self._thread.ident is not None:
            self._thread.join()
        self._delivery.abandon()


def _new_states(num_states: int, num_guesses: int) -> StatePool | None:
    """
    Args:
        num_states: slots that there is room for; 0: the model has no recurrent states.
        num_guesses: most guesses for a request in a step.
    """
    return StatePool(num_states, min(_GUESSING_STREAMS * num_guesses, num_states // 4)) if num_states else None
