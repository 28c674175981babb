"""Which replica a request goes to: one that has its weights, and the keys and values of its beginning, and has room.

In: what requests want, what replicas tell of themselves. Out: replicas, the best first. Must never know: what carries
requests. Any thread.

A replica that has computed a beginning has it in its KV cache, so that requests with a common beginning go to the same
replica as long as that one has at most `max_imbalance` requests more than the idlest. Beginnings are known by hashes of
the request's text up to every `PIECE_BYTES`, each of which covers all before it: a lookup takes a step for each piece,
however many requests there have been. SGLang's and Ray's routers keep a tree of characters for the same purpose.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from amalgam.base.histogram import Bins, Histogram
from amalgam.cluster.interface import Ask, ReplicaState
from amalgam.config.names import CURRENT
from amalgam.runtime.versions import as_id

PIECE_BYTES = 128
MAX_PIECES = 256  # 32 KiB of a prompt; what is alike for longer is hardly ever something else behind that
MAX_BEGINNINGS = 2**17  # that are remembered, the least recently used go first
ROUTE_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)
# Of a body, what a prompt is made of, in the order in which templates write it.
_PROMPT_FIELDS = ("weights", "tools", "instructions", "system", "messages", "input", "prompt", "prompts", "text")
REASONS = ("weights", "prefix", "overflow", "load")


def read_body(body: bytes) -> Mapping[str, Any]:
    """A request's fields; none of a body that the replica will refuse."""
    try:
        fields = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError:
        return {}
    return fields if isinstance(fields, dict) else {}


def beginnings_of(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Hashes of a prompt's beginnings, one for each whole piece, the shortest first."""
    try:
        text = b"".join(orjson.dumps(fields[name]) for name in _PROMPT_FIELDS if name in fields)
    except (TypeError, orjson.JSONEncodeError):  # integers beyond 64 bits, which are refused behind
        return ()
    found, checksum = [], 0
    for start in range(0, min(len(text) // PIECE_BYTES, MAX_PIECES) * PIECE_BYTES, PIECE_BYTES):
        piece = text[start : start + PIECE_BYTES]
        checksum = hash((checksum, piece))
        found.append(checksum)
    return tuple(found)


def weights_of(fields: Mapping[str, Any]) -> str | int | None:
    """The version that a request asks for."""
    weights = fields.get("weights")
    return weights if isinstance(weights, str | int) and not isinstance(weights, bool) else None


@dataclass
class Seen:
    """A replica as the router knows it."""

    state: ReplicaState
    is_ready: bool = False  # it has the weights that all have
    lost_at: float | None = None  # on the monotonic clock, as far as is known; None: it is there
    num_in_flight: int = 0  # requests that were sent and are not answered
    num_routed: int = 0

    @property
    def is_lost(self) -> bool:
        return self.lost_at is not None

    def has(self, weights: str | int | None) -> bool:
        """Whether a request for these weights can run there."""
        if weights is None or weights == CURRENT:
            return True
        version_id = as_id(weights)
        return weights in self.state.names if version_id is None else version_id in self.state.kept_ids


class Routing:
    """See above.

    Args:
        max_imbalance: requests more than the idlest replica that one may have and still get those that it knows.
    """

    def __init__(self, max_imbalance: int) -> None:
        self.replicas: dict[str, Seen] = {}
        self.reasons: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._max_imbalance = max_imbalance
        self._lock = threading.Lock()  # a router may have an event loop of its own
        self._known: OrderedDict[int, str] = OrderedDict()  # beginning → the replica that had it last
        self._chosen: dict[str, tuple[Ask, str]] = {}  # attempt → the replica that it went to
        self._seconds = Bins(ROUTE_BOUNDS)

    def has_room(self, ask: Ask) -> bool:
        """Whether there is a replica to go to."""
        with self._lock:
            return any(self._is_open(replica_id, ask) for replica_id in self.replicas)

    def order(self, ask: Ask, candidates: Collection[str] | None = None) -> list[str]:
        """The replicas that may have a request, the best first; the reason for that is counted.

        Args:
            candidates: those that there are; None: all that are known.
        """
        with self._lock:
            open_ids = [
                replica_id
                for replica_id in (self.replicas if candidates is None else candidates)
                if self._is_open(replica_id, ask)
            ]
            having = [replica_id for replica_id in open_ids if self.replicas[replica_id].has(ask.weights)]
            # If nobody has the weights, any replica tells the client so, in its own words.
            chosen = sorted(having or open_ids, key=lambda replica_id: (self._load(replica_id), replica_id))
            if not chosen:
                return []
            familiar = next(
                (self._known[part] for part in reversed(ask.beginnings) if self._known.get(part) in chosen), None
            )
            reason = "weights" if len(having) < len(open_ids) and having else "load"
            if familiar is not None:
                if self._load(familiar) <= self._load(chosen[0]) + self._max_imbalance:
                    chosen.remove(familiar)
                    chosen.insert(0, familiar)
                    reason = "prefix"
                else:
                    reason = "overflow"
            self.reasons[reason] += 1
            return chosen

    def routed(self, ask: Ask, replica_id: str, seconds: float = 0.0) -> None:
        """An attempt went to a replica, `seconds` after it was begun."""
        with self._lock:
            seen = self.replicas.get(replica_id)
            if seen is None:
                return
            seen.num_in_flight += 1
            seen.num_routed += 1
            self._seconds.add(seconds)
            self._chosen[ask.id] = ask, replica_id
            for part in ask.beginnings:
                self._known.pop(part, None)
                self._known[part] = replica_id
            while len(self._known) > MAX_BEGINNINGS:
                self._known.popitem(last=False)

    def chosen_for(self, ask: Ask) -> str | None:
        """The replica that an attempt has gone to; None: it has not gone yet."""
        chosen = self._chosen.get(ask.id)
        return None if chosen is None else chosen[1]

    def ended(self, ask: Ask) -> None:
        """An attempt is over, whatever came of it. Harmless when repeated."""
        with self._lock:
            chosen = self._chosen.pop(ask.id, None)
            if chosen is not None and (seen := self.replicas.get(chosen[1])) is not None:
                seen.num_in_flight -= 1

    def lost(self, replica_id: str) -> None:
        """A replica has gone: nothing goes there any more, whether or not others have noticed."""
        with self._lock:
            if (seen := self.replicas.get(replica_id)) is not None:
                seen.lost_at = time.monotonic()

    def set_ready(self, replica_id: str, *, is_ready: bool) -> None:
        """Whether a replica may have requests: it has the weights that all have."""
        with self._lock:
            if (seen := self.replicas.get(replica_id)) is not None:
                seen.is_ready = is_ready

    def update(self, states: Mapping[str, ReplicaState], asked_at: float, gone: Iterable[str] = ()) -> None:
        """What replicas tell of themselves.

        Args:
            asked_at: when they were asked, on the monotonic clock. One that was lost later may have answered before.
        """
        with self._lock:
            for replica_id in gone:
                self.replicas.pop(replica_id, None)
            for replica_id, state in states.items():
                seen = self.replicas.setdefault(replica_id, Seen(state))
                if seen.lost_at is None or seen.lost_at < asked_at:  # it answers: it was only out of reach
                    seen.state, seen.lost_at = state, None

    def read_seconds(self) -> Histogram:
        """How long attempts took to get on their way."""
        return self._seconds.read()

    def _is_open(self, replica_id: str, ask: Ask) -> bool:
        seen = self.replicas.get(replica_id)
        return seen is not None and seen.is_ready and not seen.is_lost and replica_id not in ask.tried

    def _load(self, replica_id: str) -> int:
        """Requests there. What a replica tells of itself is a quarter of a second old, and not asked for."""
        return self.replicas[replica_id].num_in_flight
