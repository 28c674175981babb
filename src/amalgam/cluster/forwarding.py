"""A request for tokens on its way to a replica, and its answer on the way back.

In: ASGI requests, behind keys, limits and the record. Out: the answer of a replica. Must never know: which replica is
best, what carries requests.

If a replica is lost, what it was asked is asked of another one, as long as no event of its answer has left; the answer
is pure computation. An answer that does not stream is whole before it leaves, so that no such request is lost. A
stream of which a token has left ends with an error event whose code is `replica_lost`: to begin anew would give other
tokens than those that the client has.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amalgam.cluster.interface import Ask, Forwarded, Head, Noted, Part, Transport
from amalgam.cluster.routing import Routing, beginnings_of, read_body, weights_of
from amalgam.errors import AmalgamError, ReplicaLostError, UnavailableError
from amalgam.server.api.anthropic.messages import PING
from amalgam.server.events import COMMENT, DONE, event
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.errors import error_content, error_response
from amalgam.server.http.record import RequestRecord
from amalgam.server.http.shapes import anthropic, shape_for
from amalgam.server.service import Service

PATHS = {
    "/generate", "/batch_generate", "/summarize", "/tokenize", "/detokenize", "/chat/completions", "/dashboard/chat",
    "/experts/trace",
}  # fmt: skip
PATHS_BELOW = ("/v1/",)
PROPS = ("GET", "/props")  # the gateway has no tokenizer, and so no template
ROOM_SECONDS = 60.0  # how long a request waits for a replica where there is none at the moment
LARGE_BODY = 2**18  # that a thread reads
_POLL_SECONDS = 0.02
_IDS = (b"x-request-id", b"request-id")  # which the gateway gives by itself
_HOP_HEADERS = (b"connection", b"keep-alive", b"transfer-encoding", b"host", b"authorization", b"x-api-key", *_IDS)


@dataclass
class ForwardingCounts:
    """What has happened so far; changed by the event loop only."""

    num_sent: int = 0  # attempts
    num_resent: int = 0  # to another replica than the one that was lost
    num_cut: int = 0  # streams that ended because their replica was lost
    num_waited: int = 0  # requests for which there was no replica at first
    versions: set[int] = field(default_factory=set)  # weight versions that have given answers


@dataclass
class _Answer:
    """What has left of an answer."""

    send: Send
    scope: Scope
    head: Head | None = None
    has_begun: bool = False
    has_ended: bool = False
    held: list[Part] = field(default_factory=list)  # of an answer that does not stream

    async def take(self, parts: Sequence[Part]) -> None:
        """More of it has come."""
        for part in parts:
            if isinstance(part, Head):
                await self._take_head(part)
            elif isinstance(part, bytes):
                await self._take_body(part)
            else:
                _note(self.scope, part)
                await self._end()

    async def cut(self, error: AmalgamError) -> None:
        """Nothing more comes of a stream."""
        self.scope["state"]["refusal"] = error.code
        await self._send_body(_error_event(self.scope, error), more=False)
        self.has_ended = True

    @property
    def is_streaming(self) -> bool:
        """Its head has left, so that an error can only be one more event."""
        return self.head is not None and _is_stream(self.head)

    async def _take_head(self, head: Head) -> None:
        if self.is_streaming and not _is_stream(head):  # another replica refuses what the first one had taken
            self.held = [head]
            return
        self.held.clear()
        is_first = self.head is None
        self.head = head
        if self.is_streaming and is_first:
            await self._send_head(head)

    async def _take_body(self, body: bytes) -> None:
        if not self.is_streaming or self.held:
            self.held.append(body)
            return
        self.has_begun = self.has_begun or not _is_idle(body)
        await self._send_body(body, more=True)

    async def _end(self) -> None:
        self.has_ended = True
        if self.is_streaming and self.held:
            body = b"".join(part for part in self.held if isinstance(part, bytes))
            await self._send_body(b"data: %b\n\n" % body + _end_of(self.scope), more=False)
        elif self.is_streaming:
            await self._send_body(b"", more=False)
        else:
            assert self.head is not None
            body = b"".join(part for part in self.held if isinstance(part, bytes))
            await self._send_head(self.head)
            await self._send_body(body, more=False)

    async def _send_head(self, head: Head) -> None:
        headers = [(name, value) for name, value in head.headers if name.lower() not in _IDS]
        await self.send({"type": "http.response.start", "status": head.status, "headers": headers})

    async def _send_body(self, body: bytes, *, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": more})


class _Patience:
    """How long one request waits for replicas in all, however often it is sent again."""

    def __init__(self) -> None:
        self._seconds_left = ROOM_SECONDS

    async def wait(self) -> None:
        """A moment.

        Raises:
            UnavailableError: it has waited long enough.
        """
        if self._seconds_left <= 0:
            raise UnavailableError("No replica is ready.", remedy="GET /ready tells when requests are taken.")
        before = time.monotonic()
        await asyncio.sleep(_POLL_SECONDS)
        self._seconds_left -= time.monotonic() - before


class Forwarding:
    """The innermost middleware: what a replica has to answer goes there, the rest is answered here.

    Args:
        gate: is set but for the moment in which all replicas change their weights.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        routing: Routing,
        transport: Transport,
        gate: asyncio.Event,
        counts: ForwardingCounts,
    ) -> None:
        self.app = app
        self._service = service
        self._routing = routing
        self._transport = transport
        self._gate = gate
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_forwarded(scope["method"], scope["path"]):
            await self.app(scope, receive, send)
            return
        scope["route"] = SimpleNamespace(path=scope["path"])
        has_ended = False

        async def noting(message: Message) -> None:
            nonlocal has_ended
            await send(message)
            has_ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        answer = _Answer(noting, scope)
        try:
            with self._service.admit():
                body = await _read(receive)
                scope["state"]["record"].received_at = time.monotonic()
                await unless_client_leaves(receive, self._forward(scope, body, answer))
        except ClientDisconnect:  # which ASGI servers tell behind the last part of an answer, too
            if not has_ended:
                raise
        except AmalgamError as error:
            if answer.is_streaming:
                await answer.cut(error)
            else:
                await error_response(error)(scope, receive, send)

    async def _forward(self, scope: Scope, body: bytes, answer: _Answer) -> None:
        fields = await asyncio.to_thread(read_body, body) if len(body) > LARGE_BODY else read_body(body)
        beginnings, weights = beginnings_of(fields), weights_of(fields)
        request = _forwarded(scope, body)
        tried: frozenset[str] = frozenset()
        patience = _Patience()
        while True:
            await self._gate.wait()
            ask = Ask(secrets.token_hex(8), beginnings, weights, tried)
            try:
                await self._wait_for_room(ask, patience)
                self._counts.num_sent += 1
                async with aclosing(self._transport.send(ask, request)) as groups:
                    async for parts in groups:
                        await answer.take(parts)
                if not answer.has_ended:
                    raise ReplicaLostError("The replica has ended before its answer.")
                self._note_version(scope)
                return
            except ReplicaLostError:
                replica_id = self._routing.chosen_for(ask)
                if replica_id is not None:
                    self._routing.lost(replica_id)
                    tried |= {replica_id}
                if answer.has_begun:
                    self._counts.num_cut += 1
                    await answer.cut(lost_midway())
                    return
                if replica_id is None:  # who says which replicas there are knew of it before the routing
                    await patience.wait()
                else:
                    self._counts.num_resent += 1
            finally:
                self._routing.ended(ask)

    def _note_version(self, scope: Scope) -> None:
        record: RequestRecord = scope["state"]["record"]
        is_answered = record.num_new_tokens > 0 and scope["state"].get("refusal") is None
        if is_answered and record.weight_version is not None:
            self._counts.versions.add(record.weight_version)

    async def _wait_for_room(self, ask: Ask, patience: _Patience) -> None:
        """
        Raises:
            UnavailableError: there is no replica, and none has come for long.
        """
        if self._routing.has_room(ask):
            return
        self._counts.num_waited += 1
        while not self._routing.has_room(ask):
            self._service.check_ready()
            await patience.wait()


def is_forwarded(method: str, path: str) -> bool:
    """Whether a replica answers it: what takes prompts."""
    return (method == "POST" and (path in PATHS or path.startswith(PATHS_BELOW))) or (method, path) == PROPS


def lost_midway() -> ReplicaLostError:
    return ReplicaLostError(
        "The replica that gave this answer has gone, and its other tokens with it.", remedy="Send the request again."
    )


async def _read(receive: Receive) -> bytes:
    """The whole body; `BodyLimit` watches its size and its time.

    Raises:
        ClientDisconnect: the client has left before its end.
    """
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return b"".join(pieces)


def _forwarded(scope: Scope, body: bytes) -> Forwarded:
    record: RequestRecord = scope["state"]["record"]
    headers = tuple((name, value) for name, value in scope["headers"] if name not in _HOP_HEADERS)
    return Forwarded(
        scope["method"],
        scope["path"],
        scope["query_string"],
        headers,
        body,
        record.request_id,
        record.priority,
        record.may_overtake,
    )


def _note(scope: Scope, noted: Noted) -> None:
    """The replica's record into ours, as if the tokens had been computed here."""
    record: RequestRecord = scope["state"]["record"]
    record.first_token_seconds = noted.first_token_seconds
    record.num_cached_tokens = noted.num_cached_tokens
    record.queue_seconds = noted.queue_seconds
    record.finish_reasons += noted.finish_reasons
    record.prompts += noted.prompts
    record.add_prompt_tokens(noted.num_prompt_tokens)
    record.add_new_tokens(noted.num_new_tokens)
    record.weight_version = noted.weight_version  # the answer's head has left: no second header comes of it
    if noted.refusal is not None:
        scope["state"]["refusal"] = noted.refusal


def _is_stream(head: Head) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in head.headers
    )


def _is_idle(body: bytes) -> bool:
    """Whether it is made of nothing but what is sent while there is nothing to tell."""
    return not body.replace(COMMENT, b"").replace(PING, b"")


def _end_of(scope: Scope) -> bytes:
    return b"" if shape_for(scope) is anthropic or scope["path"] == "/v1/responses" else DONE


def _error_event(scope: Scope, error: AmalgamError) -> bytes:
    """What ends a stream, in the words of the interface that it is of."""
    request_id, shape = scope["state"]["record"].request_id, shape_for(scope)
    if scope["path"] == "/v1/responses":  # OpenAI's event `error`
        told: dict[str, Any] = {"type": "error", "code": error.code, "message": str(error), "param": None}
        return event(told, "error")
    return event(error_content(error, request_id, shape), "error" if shape is anthropic else "") + _end_of(scope)
