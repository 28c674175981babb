"""How a caller wants an answer sampled and where it is to end: `SamplingParams`, checked.

In: values, from any interface. Out: the same, or what is wrong with them. Must never know: requests, torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from amalgam.errors import RequestError, describe

MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
# Beyond these every logit is as good as equal, and far beyond them products overflow.
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100.0
MAX_TEMPERATURE = 100.0
MAX_LOGPROBS = 20
MAX_PENALTY = 2.0  # presence and frequency, as OpenAI has them
MAX_LOGIT_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_PRIORITY = 2**31 - 1
_HOW_TO_SAMPLE = {"temperature", "top_p", "top_k", "min_p"}


@dataclass(frozen=True)
class ThinkingLimit:
    """How long an answer's reasoning may be: then the token that ends it is the only one that may follow.

    Attributes:
        num_tokens: of the reasoning.
        end_id: the token that ends it.
        start_ids: the tokens that open it, at the answer's beginning; none: the prompt has opened it.
    """

    num_tokens: int
    end_id: int
    start_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_int("thinking.num_tokens", self.num_tokens, 0, 2**31 - 1)
        if not isinstance(self.start_ids, list | tuple):
            raise RequestError(f"thinking.start_ids is {describe(self.start_ids)}.", remedy="Give a list of token ids.")
        object.__setattr__(self, "start_ids", tuple(self.start_ids))
        for token_id in (self.end_id, *self.start_ids):
            _check_int("a token id of thinking", token_id, 0, 2**31 - 1)


@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens, and tokens into text. `temperature` 0 or `do_sample` false is greedy.

    `stop` may be given as one string or a list too. Without a `seed` each request draws its own. An answer's text
    follows on the prompt's, spaces included, unless `continues_prompt` is false: a chat's message stands by itself.

    Attributes:
        min_tokens: before so many, end-of-sequence tokens and `stop_token_ids` are never chosen, and text that is
            there by then holds no stop string.
        stop_token_ids: tokens that end the answer like an end of sequence; they have no text, and `ignore_eos` does
            not concern them.
        presence_penalty, frequency_penalty: taken from the logit of each token that the answer has, once, and once
            for each time; as OpenAI has them.
        logit_bias: token id → what is added to its logit. Given as a mapping, kept as pairs in the order of ids.
        logprobs: each new token's log-probability, and those of so many likeliest tokens.
        prompt_logprobs: the same of the prompt's tokens, all but the first. Then `max_new_tokens` may be 0: the
            request ends without an answer.
        keeps_special_tokens: the text has them, as some formats of tool calls need it; not the one that ends it.
        priority: of waiting requests the lowest is taken first, and of equal ones the first.
        speculate: whether tokens may be guessed ahead where the engine does that; changes no answer.
        thinking: how long reasoning may be; None: as long as the answer.
        given: the fields that the caller gave, so that `over` knows which to leave to a model.

    Raises:
        RequestError: a value is out of range; the message names the field, the value and the range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50  # 0: no limit
    min_p: float = 0.0
    do_sample: bool = True
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    continues_prompt: bool = True
    logprobs: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    prompt_logprobs: int | None = None
    priority: int = 0
    keeps_special_tokens: bool = False
    thinking: ThinkingLimit | None = None
    speculate: bool = True

    if TYPE_CHECKING:
        given: ClassVar[frozenset[str]]

    def __new__(cls, *values: Any, **named: Any) -> Self:
        params = super().__new__(cls)
        in_order = [item.name for item in fields(cls)][: len(values)]
        object.__setattr__(params, "given", frozenset([*in_order, *named]))
        return params

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1 if self.prompt_logprobs is None else 0, 2**31 - 1)
        _check_float("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.given >= {"min_tokens", "max_new_tokens"} and self.min_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, and at most {self.max_new_tokens} tokens are generated.",
                remedy="Raise that limit, or lower min_tokens.",
                param="min_tokens",
            )
        _check_float("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_float("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        _check_bool("do_sample", self.do_sample)
        _check_bool("ignore_eos", self.ignore_eos)
        _check_bool("continues_prompt", self.continues_prompt)
        _check_bool("keeps_special_tokens", self.keeps_special_tokens)
        _check_bool("speculate", self.speculate)
        if self.thinking is not None and not isinstance(self.thinking, ThinkingLimit):
            raise RequestError(f"thinking is {describe(self.thinking)}.", remedy="Give a ThinkingLimit.")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """These parameters, with `defaults` in place of those that nobody gave.

        Who says how to sample wants to: `do_sample` is then true unless it is given too.
        """
        chosen = {item.name: getattr(self if item.name in self.given else defaults, item.name) for item in fields(self)}
        if "do_sample" not in self.given and self.given & _HOW_TO_SAMPLE:
            chosen["do_sample"] = True
        return SamplingParams(**chosen)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is kept."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0.0

    def end_token_ids(self, eos_token_ids: AbstractSet[int]) -> AbstractSet[int]:
        """Tokens that end an answer of a model with these ends of sequence."""
        if not self.stop_token_ids and not self.ignore_eos:
            return eos_token_ids
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else eos_token_ids)

    @cached_property
    def draw(self) -> tuple[int, float, float, float]:
        """What kernels want to know to draw a token: `top_k`, `temperature` (0: greedy), `top_p`, `min_p`."""
        return self.top_k, 0.0 if self.is_greedy else self.temperature, self.top_p, self.min_p


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {describe(value)}.", remedy=f"Allowed: an integer from {low} to {high}.")


def _check_float(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (low_open and value == low):
        bound = "above" if low_open else "from"
        raise RequestError(f"{name} is {describe(value)}.", remedy=f"Allowed: a number {bound} {low} to {high}.")


def _check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {describe(value)}.", remedy="Allowed: true or false.")


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    is_short_list = isinstance(strings, list | tuple) and len(strings) <= MAX_STOP_STRINGS
    if not is_short_list or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in strings):
        raise RequestError(
            f"stop is {describe(value)}.",
            remedy=f"Give at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} characters.",
        )
    return tuple(strings)


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    is_short_list = isinstance(value, list | tuple) and len(value) <= MAX_STOP_TOKEN_IDS
    if not is_short_list or not all(_is_token_id(item) for item in value):
        raise RequestError(
            f"stop_token_ids is {describe(value)}.", remedy=f"Give at most {MAX_STOP_TOKEN_IDS} token ids from 0 on."
        )
    return tuple(value)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    is_short = isinstance(pairs, tuple) and len(pairs) <= MAX_BIASED_TOKENS
    if not is_short or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise RequestError(
            f"logit_bias is {describe(value)}.",
            remedy=f"Give a mapping from at most {MAX_BIASED_TOKENS} token ids to numbers.",
        )
    for token_id, bias in pairs:
        if not _is_token_id(token_id):
            raise RequestError(f"logit_bias has the key {describe(token_id)}.", remedy="Allowed: token ids from 0 on.")
        _check_float(f"logit_bias[{token_id}]", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    return tuple(sorted(pairs))


def _is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def check_param_ids(params: SamplingParams, vocab_size: int) -> None:
    """
    Raises:
        RequestError: `logit_bias`, `stop_token_ids` or `thinking` names a token that the model does not have.
    """
    named: dict[str, Sequence[int]] = {
        "logit_bias": [token_id for token_id, _ in params.biases],
        "stop_token_ids": params.stop_token_ids,
        "thinking": () if params.thinking is None else (params.thinking.end_id, *params.thinking.start_ids),
    }
    for name, token_ids in named.items():
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise RequestError(
                    f"{name} names token {token_id}.",
                    remedy=f"Allowed: an integer from 0 to {vocab_size - 1}.",
                    param=name,
                )
