"""From the open port to the exit: serve, drain on a signal, stop.

In: an application and the service behind it. Out: a server that returns when its drain is done or the service failed.
uvicorn closes its port on the first signal, so that readiness could not say 503 and streams would be cut: the drain is
ours, and uvicorn's shutdown begins when nothing is in flight.
"""

from __future__ import annotations

import asyncio
import errno
import http
import ipaddress
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any, Protocol

import h11
import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from amalgam.base.escaping import one_line
from amalgam.config.server import ServerSettings
from amalgam.config.settings import Settings
from amalgam.errors import AmalgamError, ConfigError
from amalgam.server.http.access import NO_DESCRIPTORS, log_request, new_request_id, shortage_log
from amalgam.server.http.errors import error_content
from amalgam.server.http.heads import HeadersTooLargeError
from amalgam.server.http.record import RequestRecord
from amalgam.server.http.tls import Certificate
from amalgam.server.http.unix import UnixListener, listen_unix

MIN_DRAIN_SECONDS = 1.0  # an idle server too stays up this long, so that a balancer's probe can see the 503
FAILURE_SECONDS = 3.0  # how long a server whose engine died goes on answering before it exits
BACKLOG = 2048  # connections that wait to be accepted
NUM_PORT_ATTEMPTS = 8
MAX_REQUEST_LINE_BYTES = 1024  # beside the headers: a head that is just too long is told what is allowed
LOOPBACK = ("127.0.0.1", "::1")
CLOSE_SECONDS = 5  # for responses to leave after the drain

logger = logging.getLogger("amalgam.server")


def listen(settings: ServerSettings) -> list[socket.socket]:
    """Listening sockets, opened before the model loads so that a taken port is known at once.

    One for each address of the host: `localhost` has two. `::` takes IPv4 connections as well. With port 0 all get the
    same one.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    if settings.unix_socket:
        return [listen_unix(settings)]
    host = settings.host.strip("[]")
    try:
        # The protocol must be named: asyncio sets TCP_NODELAY only then, and without it each answer waits 40 ms.
        # Not every machine's list of names has both for localhost.
        names = LOOPBACK if host.lower() == "localhost" else [host or None]
        found = [
            address
            for name in names
            for address in socket.getaddrinfo(
                name, settings.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
            )
        ]
        return _bind_all(list(dict.fromkeys(found)))
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on host {settings.host!r}, port {settings.port}: {error.strerror or error}.",
            remedy="Choose another with --host and --port.",
        ) from None


def _bind_all(found: list[Any]) -> list[socket.socket]:
    """A socket for each address that this machine has; one at least.

    Raises:
        OSError: there is none, or a port is taken.
    """
    is_dual = len(found) == 1  # `::` alone
    missing: OSError | None = None
    for attempt in range(NUM_PORT_ATTEMPTS):
        with ExitStack() as cleanup:
            sockets: list[socket.socket] = []
            try:
                for family, kind, protocol, _, address in found:
                    if sockets and address[1] == 0:
                        address = (address[0], sockets[0].getsockname()[1], *address[2:])
                    try:
                        listener = cleanup.enter_context(socket.socket(family, kind, protocol))
                        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        if family == socket.AF_INET6:
                            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
                        listener.bind(address)
                        listener.listen(BACKLOG)
                    except OSError as error:
                        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                            raise
                        missing = error
                    else:
                        sockets.append(listener)
            except OSError:
                # A port that the system has chosen for one address may be taken at another.
                if not sockets or found[0][4][1] != 0 or attempt == NUM_PORT_ATTEMPTS - 1:
                    raise
                continue
            if not sockets:
                raise missing or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
            cleanup.pop_all()
            return sockets
    raise AssertionError("unreachable")


def url_of(listener: socket.socket, host: str, scheme: str = "http") -> str:
    """An address that this machine's browser can open; `host` as the user wrote it, if that is a name."""
    if isinstance(listener, UnixListener):
        return f"unix:{listener.path}"
    address, port = listener.getsockname()[:2]
    if address in ("0.0.0.0", "::"):  # all addresses, and this machine has the one below
        address = "127.0.0.1" if address == "0.0.0.0" else "::1"
    elif host and not is_address(host.strip("[]")):
        address = host
    return f"{scheme}://[{address}]:{port}" if ":" in address else f"{scheme}://{address}:{port}"


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def raise_descriptor_limit() -> None:
    """Take as many file descriptors as the system gives: a connection needs one each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # some systems say unlimited and mean less
        logger.debug("file descriptors: at most %d, which cannot be raised to %d: %s", soft, hard, error)
    else:
        logger.debug("file descriptors: at most %d, before %d", hard, soft)


class Drainable(Protocol):
    """What stands behind the application."""

    @property
    def settings(self) -> Settings: ...
    @property
    def has_loaded(self) -> bool: ...
    @property
    def failure(self) -> Exception | None:
        """Why it cannot go on."""

    @property
    def num_active(self) -> int:
        """Requests that are not answered yet."""

    def drain(self) -> None:
        """Admit nothing more."""

    def abort(self) -> None:
        """End what is still in flight with an error. Blocking."""


class DrainingServer(uvicorn.Server):
    """uvicorn with a drain before its shutdown.

    On the first signal the service refuses new work with 503 while the port goes on answering. When nothing is in
    flight, or `drain_seconds` have passed and the rest has been ended with an error, uvicorn shuts down.

    Args:
        certificate: for https; None: http.
        reload: called at SIGHUP; a ConfigError is logged, and nothing has changed then. None: SIGHUP ends the process.
        has_lifespan: whether the application's lifespan is this server's; it may be that of whoever has made both.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Drainable,
        certificate: Certificate | None = None,
        reload: Callable[[], None] | None = None,
        *,
        has_lifespan: bool = True,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=JSONErrorProtocol,  # on h11: httptools accepts headers of many megabytes
                ws="none",
                lifespan="on" if has_lifespan else "off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                timeout_keep_alive=service.settings.server.keep_alive_seconds,  # type: ignore[arg-type] # as a timer's
                backlog=service.settings.server.accept_backlog,
                h11_max_incomplete_event_size=service.settings.server.max_header_bytes + MAX_REQUEST_LINE_BYTES,
                ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
            )
        )
        self.failure: Exception | None = None
        self._service = service
        self._reload = reload
        self._drain_started: float | None = None
        self._failed_at = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_on_loop_error)
        if self._reload is not None and threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        await super().startup(sockets)
        # asyncio takes the number of connections that it accepts in a row for that of those that may wait as well.
        for listener in sockets or []:
            listener.listen(BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_started is not None:
            os._exit(128 + sig)
        logger.info("signal %d: draining, at most %g s", sig, self._service.settings.server.drain_seconds)
        self._drain_started = time.monotonic()
        self._service.drain()

    def _on_reload(self) -> None:
        assert self._reload is not None
        try:
            self._reload()
        except ConfigError as error:
            logger.error("SIGHUP: nothing has changed. %s", one_line(str(error)))
        else:
            logger.info("SIGHUP: keys and certificates have been read again")

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        self._watch_for_failure()
        if self._drain_started is not None:
            await self._advance_drain(time.monotonic() - self._drain_started)
        return await super().on_tick(counter)

    def _watch_for_failure(self) -> None:
        if self.failure is None:
            self.failure, self._failed_at = self._service.failure, time.monotonic()
        elif not self._service.has_loaded or time.monotonic() - self._failed_at > FAILURE_SECONDS:
            self.should_exit = True

    async def _advance_drain(self, elapsed: float) -> None:
        limit = self._service.settings.server.drain_seconds
        if elapsed < min(limit, MIN_DRAIN_SECONDS):
            return
        if self._service.num_active and elapsed < limit:
            return
        if self._service.num_active:
            logger.warning("drain: ending %d requests after %g s", self._service.num_active, limit)
            await asyncio.to_thread(self._service.abort)
        self.should_exit = True


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio reports each connection that it cannot accept, as often as it would have accepted some in a row."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (*NO_DESCRIPTORS, errno.ENOBUFS, errno.ENOMEM):
        shortage_log.warn("a new connection", error)
    else:
        loop.default_exception_handler(context)


class _Connection(h11.Connection):
    """Keeps what uvicorn drops: the status that h11 has for a request which is no HTTP, or too long."""

    status_hint = 400

    def next_event(self) -> Any:
        try:
            return super().next_event()
        except h11.RemoteProtocolError as error:
            self.status_hint = error.error_status_hint
            raise


class JSONErrorProtocol(H11Protocol):
    """Answers what is not HTTP in the shape of all other errors, and ends connections that send nothing, or slowly.

    A request's head must arrive within the keep-alive time. `BodyLimit` limits the size and the time of a body.
    """

    def __init__(self, config: uvicorn.Config, *others: Any, **named: Any) -> None:
        super().__init__(config, *others, **named)
        assert config.h11_max_incomplete_event_size is not None
        self._max_head_bytes = config.h11_max_incomplete_event_size
        self.conn = _Connection(h11.SERVER, self._max_head_bytes)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head(self.timeout_keep_alive)

    def data_received(self, data: bytes) -> None:
        deadline = self.timeout_keep_alive_task
        super().data_received(data)
        has_no_request = self.cycle is None or self.cycle.response_complete
        if has_no_request and deadline is not None and self.timeout_keep_alive_task is None:
            self._await_head(deadline.when() - self.loop.time())  # the time goes on from where it began

    def _await_head(self, seconds: float) -> None:
        if not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(max(seconds, 0.0), self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        """Of any status that a request has which no application sees; so its line in the log is written here."""
        assert isinstance(self.conn, _Connection)
        status = self.conn.status_hint
        error = AmalgamError(msg, remedy="Check the request line and the headers.")
        if status == HeadersTooLargeError.http_status:
            allowed = self._max_head_bytes - MAX_REQUEST_LINE_BYTES
            error = HeadersTooLargeError(
                f"The request's head has more than {allowed} bytes.",
                remedy=f"Allowed: {allowed} (server.max_header_bytes).",
            )
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            record = RequestRecord(new_request_id(), method="-", path="-", status=status, error=error.code)
            body = orjson.dumps(error_content(error, record.request_id))
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"x-request-id", record.request_id.encode()),
                (b"connection", b"close"),
            ]
            head = h11.Response(status_code=status, headers=headers, reason=http.HTTPStatus(status).phrase.encode())
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            log_request(record)
        self.transport.close()
