"""The nouns between a gateway and its replicas, and what carries them from one to the other.

In and out: plain values that any transport can copy. Must never know: what carries them, tensors.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from amalgam.base.machine import ProcessFigures
from amalgam.config.placement import Rule
from amalgam.engine.generation_config import ModelDefaults
from amalgam.engine.request import EngineStatus

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from amalgam.server.filters import FilterCount


@dataclass(frozen=True)
class Forwarded:
    """One HTTP request on its way to a replica, with what the gateway has found out about its caller."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    request_id: str
    priority: int = 0
    may_overtake: bool = True


@dataclass(frozen=True)
class Head:
    """The beginning of an answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Noted:
    """The end of an answer: what the replica's record of the request says, for the gateway's log, limits and spans."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    first_token_seconds: float | None = None
    queue_seconds: float | None = None
    finish_reasons: tuple[str, ...] = ()
    weight_version: int | None = None
    prompts: tuple[str, ...] = ()
    refusal: str | None = None


Part = Head | bytes | Noted
Take = Callable[[Part], Awaitable[None]]  # given each part of an answer in turn; waits while there is no room for it
Answer = Callable[[Forwarded, Take], Awaitable[None]]  # cancelled when nobody wants the answer any more


@dataclass(frozen=True)
class Ask:
    """What a request wants of the replica that gets it.

    Attributes:
        id: of this attempt.
        beginnings: hashes of the prompt's beginnings, the shortest first: see `routing.beginnings_of`.
        weights: the version that it asks for, by name or id; None: the current one.
        tried: replicas that it must not go to again.
    """

    id: str
    beginnings: tuple[int, ...] = ()
    weights: str | int | None = None
    tried: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ReplicaState:
    """What a replica tells of itself all the time.

    Attributes:
        version_id: new requests start on it.
        kept_ids: of versions that requests may ask for.
        coming_id: the lowest id from which on all are free there.
        is_on_probation: the version has yet to show that it answers; if it fails, the replica goes back by itself.
        before_id: of the version that is kept for all to go back to; None: it is needed no longer.
        host, pid: where it runs.
        statistics_revision: changes with the expert statistics; None: nothing is counted.
    """

    version_id: int
    names: Mapping[str, int]
    kept_ids: frozenset[int]
    coming_id: int
    status: EngineStatus
    statistics_revision: int | None
    is_on_probation: bool = False
    before_id: int | None = None
    host: str = ""
    pid: int = 0

    @property
    def kv_use(self) -> float:
        """Share of the KV cache in use."""
        return 1 - self.status.num_free_blocks / max(self.status.num_blocks, 1)


@dataclass(frozen=True)
class Weights:
    """One version as all replicas are to have it.

    Attributes:
        digest: over what it is made of, without the state of files, which differs from machine to machine.
    """

    version_id: int
    rules: tuple[Rule, ...]
    digest: str


@dataclass(frozen=True)
class Description:
    """What a replica tells once: its weights, and what all replicas have in common.

    Attributes:
        before: what is kept for all to go back to.
    """

    current: Weights
    named: Mapping[str, Weights]
    model_name: str
    defaults: ModelDefaults
    max_prompt_tokens: int
    counts_experts: bool
    before: Weights | None = None


@dataclass(frozen=True)
class Counted:
    """A replica's expert statistics: a saved set as a file, and the experts' decaying rates, [layers, experts]."""

    content: bytes
    rates: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Figures:
    """What a replica's process takes, and what its filters have found."""

    host: str
    process: ProcessFigures
    filtered: Mapping[FilterCount, int]


class Transport(Protocol):
    """Carries calls and requests to replicas. Belongs to the gateway's event loop, but for `ids`."""

    async def start(self) -> None:
        """To be awaited before anything else; there may be no replica for long."""

    def ids(self) -> Collection[str]:
        """The replicas that run, as far as is known. Any thread."""

    async def call(self, replica_id: str, method: str, *args: Any) -> Any:
        """What `Member.<method>` of one replica returns.

        Raises:
            AmalgamError: it was raised there.
            ReplicaLostError: the replica has gone.
            UnavailableError: the call has failed in another way.
        """

    def send(self, ask: Ask, request: Forwarded) -> AsyncGenerator[Sequence[Part]]:
        """The answer of a replica of the router's choice, in groups of parts as they come. Closing it cancels.

        Raises:
            ReplicaLostError: the replica has gone.
            UnavailableError: there is none to go to, or the replica has failed without an answer.
        """
