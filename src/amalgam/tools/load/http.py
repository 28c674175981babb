"""HTTP/1.1 over many connections at little cost: the pieces of a body as they arrive, each with its time.

In: an address, requests. Out: status, headers and pieces of the body, handed to a reader. Must never know what is
asked.

Bytes are parsed where the event loop reads them: no task is woken for a piece, and its time is when it was read.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import h11

from amalgam.errors import ConfigError, describe

CONNECT_SECONDS = 10.0
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)

Headers = Sequence[tuple[str, str]]


class ExchangeError(Exception):
    """A request that got no whole answer.

    Attributes:
        kind: `connect`, `descriptors`, `timeout`, `cut` or `protocol`.
    """

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


@dataclass(frozen=True)
class Address:
    """Where a server listens; `prefix` is the path before `/v1`, empty or beginning with a slash."""

    scheme: str
    host: str
    port: int
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Address:
        """The address in a URL, which may end with `/v1`, as OpenAI's clients take it.

        Raises:
            ConfigError: it is no such URL.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
            host = (parts.hostname or "").encode("idna").decode()
            is_address = bool(port and host and parts.port != 0 and parts.scheme in _DEFAULT_PORTS)
        except ValueError:
            is_address = False
        if not is_address or parts.query or parts.fragment or parts.username is not None:
            raise ConfigError(f"The address is {describe(url)}.", remedy="Expected one like http://127.0.0.1:8080.")
        path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~")
        return cls(parts.scheme, host, port, path.rstrip("/").removesuffix("/v1").rstrip("/"))

    @property
    def authority(self) -> str:
        """What the `Host` header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.prefix}"

    @cached_property
    def tls(self) -> ssl.SSLContext | None:
        return ssl.create_default_context() if self.scheme == "https" else None


class Reader(Protocol):
    """Takes an answer as it comes. What its methods raise ends the exchange."""

    def head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Names of headers are in small letters. True: no more is wanted."""

    def piece(self, data: bytes, now: float) -> bool:
        """A piece of the body, read at `now` of `time.perf_counter`. True: no more is wanted."""


class Connections:
    """Connections to one address, kept for the next request where the server lets them.

    Args:
        keeps: False: each request has a connection of its own.
    """

    def __init__(self, address: Address, *, keeps: bool = True) -> None:
        self._address = address
        self._keeps = keeps
        self._idle: list[_Connection] = []

    async def exchange(self, method: str, path: str, headers: Headers, body: bytes, reader: Reader) -> None:
        """One request, until its answer has ended or the reader wants no more.

        Args:
            path: below the address's prefix.

        Raises:
            ExchangeError: there is no connection, or it ended before the answer did.
        """
        request = h11.Request(
            method=method,
            target=self._address.prefix + path,
            headers=[("Host", self._address.authority), ("Content-Length", str(len(body))), *headers],
        )
        while True:
            connection = self._take_idle() or await self._connect()
            try:
                await connection.exchange(request, body, reader)
            except _StaleError:
                continue
            finally:
                if self._keeps and connection.is_idle:
                    self._idle.append(connection)
                else:
                    connection.close()
            return

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            if (connection := self._idle.pop()).is_idle:
                return connection
        return None

    async def _connect(self) -> _Connection:
        address = self._address
        connecting = asyncio.get_running_loop().create_connection(
            _Connection, address.host, address.port, ssl=address.tls
        )
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await connecting
        except TimeoutError:
            raise ExchangeError("connect", f"no connection in {CONNECT_SECONDS:g} s") from None
        except OSError as error:  # TLS that fails is one too
            kind = "descriptors" if error.errno in _NO_DESCRIPTORS else "connect"
            # Of TLS and of names, the numbers are not the system's.
            is_own = error.errno is None or isinstance(error, ssl.SSLError | socket.gaierror)
            raise ExchangeError(kind, str(error) if is_own else os.strerror(error.errno or 0)) from None
        return connection


class _StaleError(Exception):
    """The server has ended an idle connection while it was taken for the next request."""


class _Connection(asyncio.Protocol):
    """One connection, and the request that is under way on it."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._reader: Reader | None = None
        self._ended: asyncio.Future[None] | None = None
        self._is_first = True
        self._has_answer = False

    @property
    def is_idle(self) -> bool:
        """Whether it is ready for a request."""
        return self._transport is not None and self._reader is None and self._http.our_state is h11.IDLE

    def exchange(self, request: h11.Request, body: bytes, reader: Reader) -> asyncio.Future[None]:
        assert self._transport is not None
        self._reader, self._has_answer = reader, False
        self._ended = asyncio.get_running_loop().create_future()
        parts = (self._http.send(event) for event in (request, h11.Data(data=body), h11.EndOfMessage()))
        self._transport.write(b"".join(part for part in parts if part))
        return self._ended

    def close(self) -> None:
        """At once: a request that is under way is abandoned."""
        self._reader = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._receive(data, time.perf_counter())

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._reader is not None and error is None:
            self._receive(b"", time.perf_counter())  # the end of a body without a length, or of a cut one
        if self._reader is not None:
            self._fail(ExchangeError("cut", f"the connection ended before the answer: {error or 'closed'}"))

    def _receive(self, data: bytes, now: float) -> None:
        reader = self._reader
        if reader is None:  # nothing is asked: whatever comes, the connection is of no use any more
            self.close()
            return
        try:
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if type(event) is h11.Data:
                    if reader.piece(bytes(event.data), now):
                        self._end()
                        return
                elif type(event) is h11.Response:
                    self._has_answer = True
                    if reader.head(event.status_code, list(event.headers)):
                        self._end()
                        return
                elif type(event) is h11.EndOfMessage:
                    self._end()
                    return
                elif type(event) is not h11.InformationalResponse:
                    return
        except h11.RemoteProtocolError as error:
            self._fail(ExchangeError("protocol" if data else "cut", str(error)))
        except Exception as error:
            self._fail(error)

    def _end(self) -> None:
        self._reader, self._is_first = None, False
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self._is_first and not self._has_answer and isinstance(error, ExchangeError) and error.kind == "cut":
            error = _StaleError()
        self.close()
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)
