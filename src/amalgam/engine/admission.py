"""What a caller asks for → a `Request`, checked, with all that its answer needs.

In: token ids, parameters, constraints. Out: requests without an id. Must never know: queues, steps, who else asks.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from amalgam.engine.logits import processors_for
from amalgam.engine.params import MAX_SEED, SamplingParams, check_param_ids
from amalgam.engine.prompts import PromptEmbedding, PromptLogprobs
from amalgam.engine.request import CheckedPrompt, Observation, OutputCallback, Pooling, Request, checked_prompt
from amalgam.engine.scheduler import Scheduler
from amalgam.errors import UnsupportedError
from amalgam.models.routing import RoutingObserver
from amalgam.models.weights import WeightVersion
from amalgam.text.grammar import CompiledGrammar
from amalgam.text.stream import TextStream
from amalgam.text.tokenizer import Tokenizer


class Admission:
    """Makes the requests of one engine. Any thread.

    Args:
        scheduler: says how long a sequence may be, which never changes.
        observer: of the experts that requests are routed to; None: nobody sees them.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, scheduler: Scheduler, observer: RoutingObserver | None
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._scheduler = scheduler
        self._observer = observer

    def checked_prompt(self, prompt_ids: Sequence[int], num_new_tokens: int) -> CheckedPrompt:
        """
        Raises:
            RequestError: the prompt is empty or holds something that is not a token id of the model.
            PromptTooLongError: the prompt leaves no room for so many new tokens.
        """
        # Before anything that takes time in its length.
        self._scheduler.check_prompt_length(len(prompt_ids), num_new_tokens)
        return checked_prompt(prompt_ids, self._vocab_size)

    def answer(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: OutputCallback,
        observation: Observation,
        constraint: CompiledGrammar | None,
        version: WeightVersion | None,
    ) -> Request:
        """A request for an answer; see `Engine.submit`."""
        prompt_ids = self.checked_prompt(prompt_ids, min(1, params.max_new_tokens))
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
        return Request(
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

    def embedding(
        self,
        prompt_ids: Sequence[int],
        pooling: Pooling,
        on_output: OutputCallback,
        observation: Observation,
        version: WeightVersion | None,
    ) -> Request:
        """A request for one vector; see `Engine.submit_embedding`."""
        prompt_ids = self.checked_prompt(prompt_ids, num_new_tokens=0)
        return Request(
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

    def observe(self, request: Request) -> None:
        """The observer hears of a request that has its id, and is about to enter the queue.

        Raises:
            UnsupportedError: it has a label or wants a trace, and nobody sees its experts.
            RequestError: the expert statistics cannot take the label.
        """
        observation = request.observation
        if observation.label is None and not observation.wants_trace:
            return
        if self._observer is None:
            raise UnsupportedError(
                "Labels and traces of routed experts need expert statistics.",
                remedy="Set statistics.enabled, and serve a model with experts.",
            )
        num_tokens = request.num_prompt_tokens + request.max_new_tokens
        num_traced = min(num_tokens, self._scheduler.max_sequence_tokens) if observation.wants_trace else 0
        self._observer.admit(request.request_id, observation.label if observation.is_counted else None, num_traced)
