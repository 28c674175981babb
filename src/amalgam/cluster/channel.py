"""One connection between a gateway and a replica, for all requests to it and all of their answers.

In: requests at one end, parts of answers at the other. Out: the same at the opposite end. Must never know: what
answers, which replica is best.

A frame is the length of its content, the number of a request, a kind (9 bytes, little-endian) and the content. The
first one that a gateway sends is the replica's secret, which it has from elsewhere: whoever does not know it is cut
off. All that is written in one round of the event loop leaves in one piece: a step's tokens of all streams. Ray Serve's
calls, which could carry answers, too, take 2 ms of processor time for each item.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, cast

from amalgam.cluster.interface import Answer, Forwarded, Head, Noted, Part
from amalgam.errors import AmalgamError, ReplicaLostError, UnavailableError

CONNECT_SECONDS = 5.0
SECRET_SECONDS = 5.0  # that whoever connects has to show the secret
SILENT_SECONDS = 10  # of a machine until it is asked whether it is there; without an answer for as long it is lost
MOST_UNSENT = 2**16  # bytes that wait for the end of a round
_FRAME = struct.Struct("<IIB")
_LENGTH = struct.Struct("<I")
_LATIN = "latin-1"  # of HTTP's headers

logger = logging.getLogger("amalgam.cluster")


@dataclass(frozen=True)
class Address:
    """Where a replica listens, and what it wants to be told first."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class _Kind(IntEnum):
    SECRET = 0
    REQUEST = 1
    CANCEL = 2
    HEAD = 3
    BODY = 4
    NOTED = 5  # the last of an answer
    FAILED = 6  # there is no answer: the name of an error's class


class _Connection(asyncio.Protocol):
    """Frames over a socket.

    Args:
        take: called with the kind, the number and the content of each frame.
        lost: called once, when nothing more comes.
    """

    def __init__(self, take: Callable[[int, int, bytes], None], lost: Callable[[], None]) -> None:
        self._take = take
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._unsent: list[bytes] = []
        self._num_unsent = 0  # bytes
        self._may_write = asyncio.Event()
        self._may_write.set()
        self.is_open = False
        self.most_bytes: int | None = None  # of a frame

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _watch_for_silence(transport.get_extra_info("socket"))
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._may_write.set()
        self._lost()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        begin = 0
        while self.is_open and len(received) - begin >= _FRAME.size:
            length, number, kind = _FRAME.unpack_from(received, begin)
            if self.most_bytes is not None and length > self.most_bytes:
                self.close()
                break
            end = begin + _FRAME.size + length
            if len(received) < end:
                break
            self._take(kind, number, bytes(received[begin + _FRAME.size : end]))
            begin = end
        del received[:begin]

    def send(self, kind: _Kind, number: int, *content: bytes) -> None:
        """Write a frame, together with others of the same round. Nothing happens on a connection that is lost."""
        if not self._unsent:
            self._loop.call_soon(self.flush)
        length = sum(map(len, content))
        self._unsent.append(_FRAME.pack(length, number, kind))
        self._unsent += content
        self._num_unsent += length
        if self._num_unsent > MOST_UNSENT:  # who sends without a break must learn that there is no room
            self.flush()

    def flush(self) -> None:
        """Write what has been sent so far."""
        data = b"".join(self._unsent)
        self._unsent.clear()
        self._num_unsent = 0
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the other end has read what was written."""
        await self._may_write.wait()

    def close(self) -> None:
        """Write what is unsent, and read nothing more. Harmless when repeated."""
        self.is_open = False
        if self._transport is not None:
            self.flush()
            self._transport.close()


class Listener:
    """A replica's end: whoever connects and knows the secret is answered.

    Args:
        answer: gives an answer's parts in turn, the last a `Noted`; cancelled when nobody wants it any more.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._secret = secrets.token_bytes(32)
        self._server: asyncio.Server | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()

    async def listen(self, host: str) -> Address:
        """Take connections on a port of the system's choice."""
        self._server = await asyncio.get_running_loop().create_server(self._accept, host, 0)
        return Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    @property
    def num_open(self) -> int:
        """Requests that are not answered yet."""
        return len(self._answering)

    async def close(self) -> None:
        """End all connections, and with them what is not answered yet."""
        if self._server is not None:
            self._server.close()
        answering, connections = list(self._answering), list(self._connections)
        for connection in connections:
            connection.close()
        await asyncio.sleep(0)  # what has been written leaves, where the other end reads
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)

    def _accept(self) -> _Connection:
        tasks: dict[int, asyncio.Task[None]] = {}
        is_known = False

        def take(kind: int, number: int, content: bytes) -> None:
            nonlocal is_known
            if not is_known:
                is_known = kind == _Kind.SECRET and secrets.compare_digest(content, self._secret)
                if is_known:
                    connection.most_bytes = None
                else:
                    connection.close()
            elif kind == _Kind.REQUEST:
                task = asyncio.create_task(self._run(connection, number, _forwarded(content)))
                tasks[number] = task
                self._answering.add(task)
                task.add_done_callback(lambda _: tasks.pop(number, None))
                task.add_done_callback(self._answering.discard)
            elif kind == _Kind.CANCEL and (asked := tasks.get(number)) is not None:
                asked.cancel()

        def lost() -> None:
            unknown.cancel()
            self._connections.discard(connection)
            for task in list(tasks.values()):
                task.cancel()

        def end_unknown() -> None:
            if not is_known:
                connection.close()

        connection = _Connection(take, lost)
        connection.most_bytes = len(self._secret)
        unknown = asyncio.get_running_loop().call_later(SECRET_SECONDS, end_unknown)
        self._connections.add(connection)
        return connection

    async def _run(self, connection: _Connection, number: int, request: Forwarded) -> None:
        async def take(part: Part) -> None:
            if isinstance(part, bytes):
                connection.send(_Kind.BODY, number, part)
            elif isinstance(part, Head):
                connection.send(_Kind.HEAD, number, _encoded(part.status, _strings(part.headers)))
            else:
                connection.send(_Kind.NOTED, number, _encoded(asdict(part)))
            await connection.drain()

        try:
            await self._answer(request, take)
        except Exception as error:
            logger.exception("a forwarded request has failed")
            connection.send(_Kind.FAILED, number, type(error).__name__.encode())


class Channel:
    """A gateway's end. Belongs to one event loop."""

    def __init__(self) -> None:
        self._connection = _Connection(self._take, self._end)
        self._number = 0
        self._asked: dict[int, _Asked] = {}

    @classmethod
    async def open(cls, address: Address) -> Channel:
        """
        Raises:
            ReplicaLostError: nobody listens there any more.
        """
        channel = cls()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().create_connection(
                    lambda: channel._connection, address.host, address.port
                )
        except (OSError, TimeoutError) as error:
            raise ReplicaLostError(f"The replica at {address.host} has gone ({type(error).__name__}).") from None
        channel._connection.send(_Kind.SECRET, 0, address.secret)
        return channel

    @property
    def is_open(self) -> bool:
        """Whether requests can still be asked here."""
        return self._connection.is_open

    async def ask(self, request: Forwarded) -> AsyncGenerator[Sequence[Part]]:
        """The answer, in groups of the parts that there are. Closing it cancels.

        Raises:
            ReplicaLostError: the replica has gone.
            UnavailableError: it has failed without an answer of its own.
        """
        if not self.is_open:
            raise _gone()
        self._number = number = (self._number + 1) % 2**32
        asked = self._asked[number] = _Asked()
        self._connection.send(_Kind.REQUEST, number, *_request(request))
        try:
            while asked.parts or not asked.has_ended:  # it may end while whoever reads it waits
                await asked.has_more.wait()
                asked.has_more.clear()
                parts, asked.parts = asked.parts, []
                if parts:
                    yield parts
            if asked.error is not None:
                raise asked.error
        finally:
            del self._asked[number]
            if not asked.has_ended:
                self._connection.send(_Kind.CANCEL, number)

    def close(self) -> None:
        """What has been asked and not answered ends as with a replica that has gone. Harmless when repeated."""
        self._connection.close()
        self._end()

    def _take(self, kind: int, number: int, content: bytes) -> None:
        asked = self._asked.get(number)
        if asked is None:  # cancelled meanwhile
            return
        if kind == _Kind.BODY:
            asked.parts.append(content)
        elif kind == _Kind.HEAD:
            status, headers = json.loads(content)
            asked.parts.append(Head(status, _pairs(headers)))
        elif kind == _Kind.NOTED:
            fields = json.loads(content)
            tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            asked.parts.append(Noted(**fields | tuples))
            asked.has_ended = True
        elif kind == _Kind.FAILED:
            asked.fail(
                UnavailableError(f"A replica failed: {content.decode(_LATIN)}.", remedy="Its log has the cause.")
            )
        asked.has_more.set()

    def _end(self) -> None:
        for asked in self._asked.values():
            if not asked.has_ended:
                asked.fail(_gone())


@dataclass
class _Asked:
    """A request under way."""

    parts: list[Part] = field(default_factory=list)
    has_more: asyncio.Event = field(default_factory=asyncio.Event)
    has_ended: bool = False
    error: AmalgamError | None = None

    def fail(self, error: AmalgamError) -> None:
        self.error, self.has_ended = error, True
        self.has_more.set()


def _gone() -> ReplicaLostError:
    return ReplicaLostError("The replica has gone.", remedy="Another one comes in its place.")


def _encoded(*values: Any) -> bytes:
    """JSON: one value, or a list of several. Half of a surrogate pair, which a prompt may have, stays what it is."""
    return json.dumps(values[0] if len(values) == 1 else values).encode()


def _request(request: Forwarded) -> tuple[bytes, ...]:
    """A request's content: the length of all but its body, that, its body as it is."""
    fields = {name: value for name, value in vars(request).items() if name != "body"}
    fields |= {"query": request.query.decode(_LATIN), "headers": _strings(request.headers)}
    head = _encoded(fields)
    return _LENGTH.pack(len(head)), head, request.body


def _forwarded(content: bytes) -> Forwarded:
    (length,) = _LENGTH.unpack_from(content)
    begin = _LENGTH.size + length
    fields = json.loads(content[_LENGTH.size : begin])
    fields |= {"query": fields["query"].encode(_LATIN), "headers": _pairs(fields["headers"])}
    return Forwarded(**fields, body=content[begin:])


def _strings(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode(_LATIN), value.decode(_LATIN)) for name, value in headers]


def _pairs(headers: Sequence[Sequence[str]]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name.encode(_LATIN), value.encode(_LATIN)) for name, value in headers)


def _watch_for_silence(connected: socket.socket) -> None:
    """Have the system notice a machine that is silent, since one without power closes nothing."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": SILENT_SECONDS, "TCP_KEEPINTVL": SILENT_SECONDS // 5, "TCP_KEEPCNT": 5,
        "TCP_USER_TIMEOUT": 2 * SILENT_SECONDS * 1000,  # nobody is asked while what was sent is not acknowledged
    }  # fmt: skip
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has all of them
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
