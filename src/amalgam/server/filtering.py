"""Answers that leave filtered: text that has passed, and the tokens of that text only.

In: the engine's outputs. Out: outputs. Must never know: HTTP, the shape of any interface.

Every interface gets its outputs from the deployment's engine, so that none can pass the filters by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import FinishReason, Observation, RequestOutput, TokenLogprobs, Usage
from amalgam.server.filters import Filters, RefusedPrompt
from amalgam.server.http.record import current_record
from amalgam.server.interface import Deployment, Engine, OutputStream, Tokenizer
from amalgam.server.wrapping import WrappedDeployment, WrappedEngine
from amalgam.text.filters.passing import Found, Passed
from amalgam.text.stream import TextStream

if TYPE_CHECKING:
    from amalgam.models.weights import WeightVersion
    from amalgam.text.grammar import CompiledGrammar


def filtering(deployment: Deployment, filters: Filters) -> Deployment:
    """`deployment`, with its engine's answers filtered."""
    return _FilteredDeployment(deployment, filters)


class _FilteredDeployment(WrappedDeployment):
    def __init__(self, deployment: Deployment, filters: Filters) -> None:
        super().__init__(deployment)
        self._filters = filters

    @property
    def engine(self) -> Engine:
        return _FilteredEngine(self.wrapped, self._filters)


class _FilteredEngine(WrappedEngine):
    def __init__(self, deployment: Deployment, filters: Filters) -> None:
        super().__init__(deployment.engine)
        self._deployment = deployment
        self._filters = filters

    def checked_prompt(self, prompt_ids: Sequence[int], num_new_tokens: int = 1) -> Sequence[int]:
        """See `Engine.checked_prompt`. One that is refused has no tokens, and is not computed."""
        if isinstance(prompt_ids, RefusedPrompt):
            return prompt_ids
        return self.wrapped.checked_prompt(prompt_ids, num_new_tokens)

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        observation: Observation,
        constraint: CompiledGrammar | None = None,
        version: WeightVersion | None = None,
    ) -> OutputStream:
        """See `Engine.stream`."""
        if isinstance(prompt_ids, RefusedPrompt):
            if (record := current_record.get()) is not None:
                record.finish_reasons.append(FinishReason.CONTENT_FILTER.value)
            return _Refusal(prompt_ids.answer, self._deployment.version_id)
        outputs = self.wrapped.stream(prompt_ids, params, observation, constraint, version)
        if not self._filters.looks_at("answers"):
            return outputs
        return _FilteredStream(outputs, self._filters, self._deployment.tokenizer, prompt_ids, params)


class _Refusal:
    """The only output of a prompt that was not computed."""

    def __init__(self, answer: str, version: int) -> None:
        usage = Usage(0, 0, 0.0, 0.0, 0.0, version)
        self._outputs = [RequestOutput(0, answer, (), FinishReason.CONTENT_FILTER, usage=usage)]

    def __aiter__(self) -> _Refusal:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._outputs:
            raise StopAsyncIteration
        return self._outputs.pop()

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        pass

    async def aclose(self) -> None:
        self._outputs.clear()


@dataclass
class _Tokens:
    """Tokens of an answer, and which stretch of its text they gave together."""

    start: int
    end: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class _FilteredStream:
    """The outputs of one request with text that has passed, and with the tokens of that text only.

    One output for each that the engine gives. A token is told of when all of the text that it gave has passed, and
    never if a part of that was replaced: it is then counted as hidden. If the answer is blocked, the request is
    cancelled, and the last output has the engine's own figures.
    """

    def __init__(
        self,
        outputs: OutputStream,
        filters: Filters,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
    ) -> None:
        before = prompt_ids if params.continues_prompt else ()
        self._outputs = outputs
        self._filters = filters
        self._tokenizer = tokenizer
        self._num_kept = max((rule.max_chars for rule in filters.rules if "answers" in rule.where), default=1)
        self._tail = _end_of(tokenizer, before, self._num_kept)  # of the text that is out, the prompt's before it
        self._passing = filters.passing("answers", self._tail)
        # Its own, as the engine's holds text back and does not say whose.
        self._texts = TextStream(tokenizer, (), before, keeps_special_tokens=params.keeps_special_tokens)  # type: ignore[arg-type] # a protocol
        self._waiting: list[_Tokens] = []
        self._replaced: list[Found] = []
        self._num_chars = 0  # that the tokens so far have given
        self._has_replaced = False
        self._is_finished = False

    def __aiter__(self) -> _FilteredStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_finished:
            raise StopAsyncIteration
        output = await self._outputs.__anext__()
        self._take_tokens(output)
        passing = self._passing
        passing.push(output.text)
        if output.is_finished:
            passing.end()
        await self._filters.look(passing, "answers")
        passed = self._filters.released(passing, "answers")
        self._replaced += passed.found
        self._has_replaced = self._has_replaced or bool(passed.found)
        self._tail = (self._tail + passed.text)[-self._num_kept :]
        self._is_finished = output.is_finished or passed.blocked_by is not None
        if passed.blocked_by is not None:
            return await self._blocked(output, passed)
        return self._with_passed(output, passed)

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self._outputs.cancel(reason)

    async def aclose(self) -> None:
        self._is_finished = True
        await self._outputs.aclose()

    def _take_tokens(self, output: RequestOutput) -> None:
        """Characters may take several tokens, which then belong together."""
        logprobs = output.logprobs or (None,) * len(output.token_ids)
        for token_id, logprob in zip(output.token_ids, logprobs, strict=True):
            text = self._texts.push(token_id)
            if not self._waiting or self._waiting[-1].end > self._waiting[-1].start:
                self._waiting.append(_Tokens(self._num_chars, self._num_chars))
            tokens = self._waiting[-1]
            tokens.token_ids.append(token_id)
            if logprob is not None:
                tokens.logprobs.append(self._shown(logprob))
            self._num_chars += len(text)
            tokens.end = self._num_chars

    def _shown(self, logprob: TokenLogprobs) -> TokenLogprobs:
        if not logprob.top:
            return logprob
        filters, tokenizer = self._filters, self._tokenizer
        top = tuple(entry for entry in logprob.top if filters.shows(tokenizer, entry[0]))
        return TokenLogprobs(logprob.chosen, top)

    def _with_passed(self, output: RequestOutput, passed: Passed) -> RequestOutput:
        stopped_by = output.stopped_by
        if output.is_finished and stopped_by is not None and self._completes_something(stopped_by):
            stopped_by = None  # which an interface would add to the text
        token_ids, logprobs, num_hidden = self._released(passed.end, is_end=output.is_finished)
        return output._replace(
            text=passed.text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=tuple(entry and self._shown(entry) for entry in output.prompt_logprobs),
            stopped_by=stopped_by,
            trace=None if self._has_replaced else output.trace,
            num_hidden=num_hidden,
        )

    def _completes_something(self, stopped_by: str | int) -> bool:
        """Whether something would be found that ends in what has stopped the answer, which is not in its text."""
        stop = stopped_by if isinstance(stopped_by, str) else self._tokenizer.token_text(stopped_by)
        passing = self._filters.passing("answers")
        passing.push(self._tail + stop)
        passing.end()
        passed = passing.release()
        return passed.blocked_by is not None or any(found.end > len(self._tail) for found in passed.found)

    async def _blocked(self, output: RequestOutput, passed: Passed) -> RequestOutput:
        """The last output: what has passed, and the figures of the request, which goes on no more."""
        num_hidden = 0
        last = output
        if not output.is_finished:
            self._outputs.cancel(FinishReason.CONTENT_FILTER)
            async for last in self._outputs:
                num_hidden += len(last.token_ids)
        if last.error is not None and last.usage is None:
            return last
        token_ids, logprobs, num_more = self._released(passed.end, is_end=False)
        num_hidden += num_more + sum(len(tokens.token_ids) for tokens in self._waiting)
        if (record := current_record.get()) is not None and record.finish_reasons:
            record.finish_reasons[-1] = FinishReason.CONTENT_FILTER.value
        return RequestOutput(
            output.request_id,
            passed.text,
            token_ids,
            FinishReason.CONTENT_FILTER,
            usage=last.usage,
            logprobs=logprobs,
            prompt_logprobs=tuple(entry and self._shown(entry) for entry in output.prompt_logprobs),
            num_hidden=num_hidden,
        )

    def _released(self, end: int, *, is_end: bool) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...], int]:
        """The tokens whose text is decided now: those that may be told of, and how many may not."""
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        num_hidden = num_taken = 0
        for tokens in self._waiting:
            is_empty = tokens.start == tokens.end  # may become a part of what follows
            if not is_end and (tokens.end > end or is_empty):
                break
            num_taken += 1
            # Behind a stop string a token may have text that no rule has seen.
            is_beyond = tokens.end > end
            if is_beyond or any(found.start < tokens.end and tokens.start < found.end for found in self._replaced):
                num_hidden += len(tokens.token_ids)
            else:
                token_ids += tokens.token_ids
                logprobs += tokens.logprobs
        del self._waiting[:num_taken]
        first = self._waiting[0].start if self._waiting else self._num_chars
        self._replaced = [found for found in self._replaced if found.end > first]
        return tuple(token_ids), tuple(logprobs), num_hidden


def _end_of(tokenizer: Tokenizer, prompt_ids: Sequence[int], num_chars: int) -> str:
    """The end of a prompt that the answer continues: what begins there and ends in the answer is found, too."""
    return tokenizer.decode(list(prompt_ids[-num_chars:]))[-num_chars:] if prompt_ids else ""
