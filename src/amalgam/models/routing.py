"""What an observer of routing is told beside the routing itself: whose tokens a step's rows are.

In: from the engine, to whoever counts. Out: nothing; these are nouns. A request is a number and a label here.
Must never know: what is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from amalgam.base.histogram import Histogram
from amalgam.kernels.step import Observer


class TokenSpan(NamedTuple):
    """One request's rows in a step: `[start, stop)`.

    Rows before `record_from` were recorded in an earlier step (a preempted request is computed again); rows from
    `generated_from` on are generated tokens, those before it prompt tokens. Both are clamped to `[start, stop]`.

    Attributes:
        label: what the client calls this kind of request, if anything.
        position: place of row `start` in its sequence.
        is_counted: whether the statistics take these rows.
        wants_trace: whether the request wants to know its own routing.
    """

    request_id: int
    start: int
    stop: int
    record_from: int
    generated_from: int
    label: str | None = None
    position: int = 0
    is_counted: bool = True
    wants_trace: bool = False


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts each token of one request was routed to, in order of the tokens.

    The last token of an answer is never fed back and has no row. Rows of tokens that were not computed for this
    request (their keys and values were there already) hold -1 and weight 0.
    """

    layer_ids: tuple[int, ...]
    expert_ids: npt.NDArray[np.int16]  # [tokens, layers, k], the heaviest first
    gate_weights: npt.NDArray[np.float32]  # [tokens, layers, k]


class RoutingObserver(Observer, Protocol):
    """Sees which experts each token was routed to, and whose tokens they were.

    From `begin_step` to `end_step`, and `count_request`, are called in the step thread only, the rest in any.
    """

    def admit(self, request_id: int, label: str | None, num_traced_tokens: int) -> None:
        """A request that has a label, or wants a trace of at most so many tokens, is about to be queued.

        Raises:
            RequestError: the label is one too many, or the trace too long to be kept.
            OverloadedError: other requests' traces take the memory that there is.
        """

    def begin_step(self, spans: Sequence[TokenSpan]) -> None:
        """A step starts; its rows belong to these requests."""

    def end_step(self, rejected: Mapping[int, int] | None = None) -> None:
        """The step succeeded. A step without this call did not happen.

        Args:
            rejected: request id → how many rows at the end of its span were proposals that did not come true.
        """

    def count_request(self, label: str | None) -> None:
        """A request had its first step."""

    def distinct_experts(self) -> Histogram:
        """With how many experts of a layer a step computed, on the mean over its layers: a value for each step."""

    def distinct_in_step(self) -> float | None:
        """The same of the step that has ended last, guesses included; None: it is not known. In the step thread."""

    def take_trace(self, request_id: int) -> RoutingTrace | None:
        """The trace of a request that has ended, which is then forgotten; None if it kept none."""

    def close(self) -> None:
        """No step follows."""
