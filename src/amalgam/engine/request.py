"""The nouns that cross the engine's borders, no torch: dataclasses, and named tuples where every step makes many.

In: what a caller wants (`SamplingParams`). Inside: a `Request` and the record of one step (`StepPlan`, `StepResult`).
Out: what the caller sees as tokens arrive (`RequestOutput`) or at the end (`Generation`), and `EngineStatus`.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, Self

from amalgam.errors import RequestError, describe

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from amalgam.models.routing import RoutingTrace
    from amalgam.models.weights import WeightVersion
    from amalgam.text.grammar import GrammarState
    from amalgam.text.stream import TextStream

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
        _check_float("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_float("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        _check_bool("do_sample", self.do_sample)
        _check_bool("ignore_eos", self.ignore_eos)
        _check_bool("continues_prompt", self.continues_prompt)
        _check_bool("keeps_special_tokens", self.keeps_special_tokens)
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

    @cached_property
    def draw(self) -> tuple[int, float, float, float]:
        """What the extension wants to know to draw a token: `top_k`, `temperature` (0: greedy), `top_p`, `min_p`."""
        return self.top_k, 0.0 if self.is_greedy else self.temperature, self.top_p, self.min_p


@dataclass(frozen=True)
class Observation:
    """What the expert statistics make of a request.

    Attributes:
        label: counted under this name too.
        wants_trace: the last output carries the experts of each token.
        is_counted: False keeps the request out of all statistics.
    """

    label: str | None = None
    wants_trace: bool = False
    is_counted: bool = True


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
        RequestError: `logit_bias` or `stop_token_ids` names a token that the model does not have.
    """
    biased_ids = [token_id for token_id, _ in params.biases]
    for name, token_ids in (("logit_bias", biased_ids), ("stop_token_ids", params.stop_token_ids)):
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise RequestError(
                    f"{name} names token {token_id}.", remedy=f"Allowed: an integer from 0 to {vocab_size - 1}."
                )


def check_token_ids(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """
    Raises:
        RequestError: the prompt is empty, or something in it is not a token id of the model.
    """
    if not prompt_ids:
        raise RequestError("The prompt has no tokens.", remedy="Give at least one.")
    for index, token_id in enumerate(prompt_ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"Token {index} of the prompt is {describe(token_id)}.",
                remedy=f"Allowed: an integer from 0 to {vocab_size - 1}.",
            )


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence token, stop string or stop token
    LENGTH = "length"  # max_new_tokens reached
    CANCELLED = "cancelled"
    ERROR = "error"


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the probabilities that the model gave at one place of an answer.

    They are those of the model's own logits: before penalties, temperature, and what else changes or limits the choice.
    """

    chosen: float  # of the token that was taken
    top: tuple[tuple[int, float], ...]  # (token id, log-probability) of the likeliest, the best first


class RequestOutput(NamedTuple):
    """What one step added to one request. The last one carries `finish_reason`."""

    request_id: int
    text: str  # new text since the last output
    token_ids: tuple[int, ...]  # new tokens since the last output
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    usage: Usage | None = None  # on the last output
    trace: RoutingTrace | None = None  # on the last output, if wanted
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each new token, if wanted
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  # on the first output, if wanted; None for the first token
    stopped_by: str | int | None = None  # on the last output: the stop string or stop token; None at an end of sequence
    embedding: npt.NDArray[np.float32] | None = None  # on the last output of a request for one, `[hidden]`

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class Usage:
    """Figures of one finished request; times in seconds."""

    num_prompt_tokens: int
    num_new_tokens: int  # an end-of-sequence token included
    queue_seconds: float
    first_token_seconds: float  # from arrival; total_seconds if there was none
    total_seconds: float
    version: int  # the weight version that answered; 0 if the request never ran
    num_cached_tokens: int = 0  # of the prompt, whose keys and values were there already: nothing was computed for them


@dataclass(frozen=True)
class Generation:
    """A whole answer: every `RequestOutput` of one request put together."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    error: Exception | None = None  # set when finish_reason is ERROR
    trace: RoutingTrace | None = None  # if wanted
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each token, if wanted
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  # of each token of the prompt, if wanted; None for the first
    stopped_by: str | int | None = None  # the stop string or stop token; None at an end of sequence


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing at one moment."""

    is_alive: bool  # the step loop runs
    is_draining: bool
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    versions: Mapping[int, int]  # weight version id → requests bound to it; the newest is always there


OutputCallback = Callable[[RequestOutput], None]
Pooling = Literal["mean", "last"]  # how a prompt's hidden states become one vector


class PromptReader(Protocol):
    """Reads the hidden states of all of a prompt's tokens: none of them may be left out because it is cached.

    Tensors are `Any`, as nothing here knows torch.
    """

    @property
    def error(self) -> Exception | None:
        """Why the request fails."""

    def read(self, hidden: Any, first: int, head: Callable[[Any], Any]) -> None:
        """Take a chunk, and leave what has been read before a preemption.

        Args:
            hidden: what the model's head reads, `[tokens, hidden]`, of the tokens from `first` on; good for the call.
            head: gives float32 logits of such rows.
        """

    def added_to(self, output: RequestOutput) -> RequestOutput:
        """The request's first output, with what was read of the whole prompt."""


class LogitsProcessor(Protocol):
    """A change of one request's logits before its tokens are chosen. Made for it at its submission; may keep state."""

    def apply(self, logits: npt.NDArray[np.float32], request: Request, proposed_ids: Sequence[int]) -> None:
        """Change `[vocabulary]` in place: the logits of the token after the request's own and `proposed_ids`.

        The result depends on nothing else. A request's tokens only become more from call to call; proposals may differ.
        """


@dataclass(eq=False, slots=True)
class Request:
    """One sequence and how far it has been computed.

    `token_ids` is prompt + generated; `num_computed` of them have their keys and values in `block_ids`. Each step
    lets `num_computed` catch up with `len(token_ids)`: there is no prefill phase and no decode phase.
    `num_recorded` is how many tokens the expert statistics have seen; it does not fall when a request is preempted
    and computed again, which keeps the counts exact.
    `block_keys` are those of its first full blocks, of which `num_published` may be found by others.

    Only the step thread touches a request after `Scheduler.add`, but for `is_cancelled`.
    """

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    on_output: OutputCallback
    seed: int = 0
    text: TextStream | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    constraint: GrammarState | None = None  # has taken all of the request's new tokens
    reader: PromptReader | None = None  # until the first output
    observation: Observation = Observation()
    version: WeightVersion | None = None  # bound at first admission, dropped at the end
    max_new_tokens: int = -1  # as in params until the scheduler lowers it to what fits; 0: only the prompt is computed
    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_computed: int = 0
    num_recorded: int = 0
    is_cancelled: bool = False
    arrived_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    num_cached_tokens: int = 0  # as in Usage

    def __post_init__(self) -> None:
        self.token_ids = self.token_ids or list(self.prompt_ids)
        if self.max_new_tokens < 0:
            self.max_new_tokens = self.params.max_new_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def num_behind(self) -> int:
        """Tokens to catch up with."""
        return len(self.token_ids) - self.num_computed

    @property
    def rank(self) -> tuple[int, int]:
        """The lowest is the first in the queue."""
        return self.params.priority, self.request_id

    @property
    def priority(self) -> int:
        return self.params.priority

    @property
    def may_skip_shared(self) -> bool:
        """Whether nobody misses what is not computed for tokens whose keys and values are there already."""
        return not self.observation.wants_trace and self.reader is None


class ScheduledRequest(NamedTuple):
    """One request's share of a step: its tokens `[start, start + num_tokens)`, whose KV lies in `block_ids`.

    The last of them may be proposals: tokens that the request does not have, guessed to be the next ones. Their logits
    tell how many of the guesses come true, and the step then gives as many tokens more.
    """

    request: Request
    start: int
    num_tokens: int
    block_ids: tuple[int, ...]
    num_unrecorded: int  # how many of these tokens, from the end, the expert statistics have not seen
    needs_sample: bool  # these tokens catch up with all known ones: the last one's logits give the next token
    proposed_ids: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_stream(self) -> bool:
        """Whether only the newest token is computed, and guesses behind it."""
        return self.num_tokens == 1 + len(self.proposed_ids)

    @property
    def token_ids(self) -> list[int]:
        known = self.request.token_ids[self.start : self.end]
        return [*known, *self.proposed_ids] if self.proposed_ids else known

    @property
    def num_logits(self) -> int:
        """Of how many of the last tokens the logits are wanted."""
        return len(self.proposed_ids) + 1 if self.needs_sample and self.request.max_new_tokens else 0


@dataclass(frozen=True)
class StepPlan:
    """One step: which requests, how many tokens each, which blocks, and the one weight version that runs them."""

    version: WeightVersion
    scheduled: tuple[ScheduledRequest, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)


class NewTokens(NamedTuple):
    """What a step gave one request: one token, and one more for each proposal that came true."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each token, if wanted


class StepResult(NamedTuple):
    """What a step gave, by request id: new tokens of each request that needed some, or why there are none."""

    tokens: Mapping[int, NewTokens]
    errors: Mapping[int, Exception]
