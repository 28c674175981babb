"""The nouns that cross the engine's borders, no torch: dataclasses, and named tuples where every step makes many.

In: what a caller wants (`params.SamplingParams`, `Observation`). Inside: a `Request` and the record of one step
(`StepPlan`, `StepResult`). Out: what the caller sees as tokens arrive (`RequestOutput`) or at the end (`Generation`),
and `EngineStatus`.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from amalgam.engine.params import SamplingParams
from amalgam.engine.states import RequestState, StateShare
from amalgam.errors import RequestError, describe

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from amalgam.models.routing import RoutingTrace
    from amalgam.models.weights import WeightVersion
    from amalgam.text.grammar import GrammarState
    from amalgam.text.stream import TextStream


@dataclass(slots=True)
class PromptProgress:
    """How much of a prompt has been computed. The step thread writes it; anyone may read it, at any time.

    Attributes:
        num_tokens: from the prompt's beginning on, those of the step under way and those found in the prefix cache
            included. It does not fall when the request is preempted.
    """

    num_tokens: int = 0


@dataclass(frozen=True)
class Observation:
    """What is observed of a request beside its answer: its experts, its times.

    Attributes:
        label: counted under this name too.
        wants_trace: the last output carries the experts of each token.
        is_counted: False keeps the request out of all expert statistics.
        arrived_at: by `time.monotonic`, when its text was there, which has become tokens since; None: with them.
        may_move: the weight version that it names was chosen for it: if that fails, another may answer.
        progress: is kept up to date, so that it can be told of a request that ends early, too.
    """

    label: str | None = None
    wants_trace: bool = False
    is_counted: bool = True
    arrived_at: float | None = field(default=None, compare=False)
    may_move: bool = field(default=False, compare=False)
    progress: PromptProgress | None = field(default=None, compare=False)


class CheckedPrompt(tuple[int, ...]):
    """Token ids of a prompt that are ids of a model with a vocabulary of `vocab_size`, as `checked_prompt` has seen."""

    vocab_size: int


def checked_prompt(prompt_ids: Sequence[int], vocab_size: int) -> CheckedPrompt:
    """A prompt that needs no second look: one that has been checked is returned as it is.

    Raises:
        RequestError: the prompt is empty, or something in it is not a token id of the model.
    """
    if isinstance(prompt_ids, CheckedPrompt) and prompt_ids.vocab_size <= vocab_size:
        return prompt_ids
    if not prompt_ids:
        raise RequestError("The prompt has no tokens.", remedy="Give at least one.")
    has_integers = set(map(type, prompt_ids)) == {int}  # and no booleans
    if not (has_integers and min(prompt_ids) >= 0 and max(prompt_ids) < vocab_size):
        _refuse(prompt_ids, vocab_size)
    checked = CheckedPrompt(prompt_ids)
    checked.vocab_size = vocab_size
    return checked


def _refuse(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """Name the first of them that is not a token id."""
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
    CONTENT_FILTER = "content_filter"  # a filter lets nothing more pass

    @property
    def is_cut(self) -> bool:
        """Whether somebody has ended the request before the model, its limit or an error did."""
        return self in (FinishReason.CANCELLED, FinishReason.CONTENT_FILTER)


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
    num_hidden: int = 0  # tokens that were computed and are not told of, since a filter lets their text not pass

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """New tokens since the last output, those that are not told of included."""
        return len(self.token_ids) + self.num_hidden


@dataclass(frozen=True)
class Usage:
    """Figures of one finished request; times in seconds."""

    num_prompt_tokens: int
    num_new_tokens: int  # an end-of-sequence token included
    queue_seconds: float  # from submission to the first step
    first_token_seconds: float  # from arrival; total_seconds if there was none
    total_seconds: float
    version: int  # the weight version that answered; 0 if the request never ran
    num_cached_tokens: int = 0  # of the prompt, whose keys and values were there already: nothing was computed for them
    encoding_seconds: float = 0.0  # from arrival to submission: its text became tokens


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
    versions: Mapping[int, int]  # weight version id → requests bound to it; the newest and kept ones are always there


OutputCallback = Callable[[RequestOutput], None]
Pooling = Literal["mean", "last"]  # how a prompt's hidden states become one vector


@dataclass(frozen=True)
class Doubt:
    """A version on probation has computed NaN for a request. Another one computes it again and tells whose fault it is.

    Attributes:
        error: what the request ends with if the fault is its own.
        may_go_on: on the other version, as it has sent nothing.
        tried_ids: of all versions that have computed NaN for it.
    """

    version: WeightVersion
    error: Exception
    may_go_on: bool
    tried_ids: frozenset[int]


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

    def restart(self) -> None:
        """Forget what has been read: another weight version computes the prompt."""

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

    Only the step thread touches a request after `Scheduler.add`, but for `is_cancelled` and
    `cancelled_as`.
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
    version: WeightVersion | None = None  # as asked for, or bound at first admission; dropped at the end
    keeps_version: bool = False  # no other one may answer it
    doubt: Doubt | None = None  # `version` is another one than it began with, which has computed NaN
    end_token_ids: AbstractSet[int] = frozenset()  # any of them ends the answer
    max_new_tokens: int = -1  # as in params until the scheduler lowers it to what fits; 0: only the prompt is computed
    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    state: RequestState | None = None  # while it runs, if the model has recurrent states
    num_published: int = 0
    num_computed: int = 0
    num_recorded: int = 0
    is_cancelled: bool = False
    cancelled_as: FinishReason = FinishReason.CANCELLED  # what it then ends with
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    num_cached_tokens: int = 0  # as in Usage

    def __post_init__(self) -> None:
        self.token_ids = self.token_ids or list(self.prompt_ids)
        if self.max_new_tokens < 0:
            self.max_new_tokens = self.params.max_new_tokens

    @property
    def arrived_at(self) -> float:
        """By `time.monotonic`, no later than submitted."""
        arrived_at = self.observation.arrived_at
        return self.submitted_at if arrived_at is None else min(arrived_at, self.submitted_at)

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
    def may_start_again(self) -> bool:
        """Whether another weight version may compute it from its beginning, and nobody would notice."""
        is_traced = self.observation.wants_trace and self.num_recorded > 0
        return not (self.num_new_tokens or self.keeps_version or is_traced)

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
    state: StateShare | None = None  # of its recurrent state, if the model has one

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
