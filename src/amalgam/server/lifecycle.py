"""From the open port to the exit: serve, drain on a signal, stop.

In: an application and the service behind it. Out: a server that returns when its drain is done or the service failed.
uvicorn closes its port on the first signal, so that readiness could not say 503 and streams would be cut: the drain is
ours, and uvicorn's shutdown begins when nothing is in flight.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from contextlib import ExitStack
from types import FrameType

import h11
import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from amalgam.config import ServerSettings
from amalgam.errors import AmalgamError, ConfigError
from amalgam.server.errors import error_content
from amalgam.server.service import Service

MIN_DRAIN_SECONDS = 1.0  # an idle server too stays up this long, so that a balancer's probe can see the 503
FAILURE_SECONDS = 3.0  # how long a server whose engine died goes on answering before it exits
BACKLOG = 2048
CLOSE_SECONDS = 5  # for responses to leave after the drain

logger = logging.getLogger("amalgam.server")


def listen(settings: ServerSettings) -> socket.socket:
    """A listening socket, opened before the model loads so that a taken port is known at once.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        # The protocol must be named: asyncio sets TCP_NODELAY only then, and without it each answer waits 40 ms.
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as cleanup:
            listener = cleanup.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            cleanup.pop_all()
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on host {settings.host!r}, port {settings.port}: {error.strerror}.",
            remedy="Choose another with --host and --port.",
        ) from None
    return listener


class DrainingServer(uvicorn.Server):
    """uvicorn with a drain before its shutdown.

    On the first signal the service refuses new work with 503 while the port goes on answering. When nothing is in
    flight, or `drain_seconds` have passed and the rest has been ended with an error, uvicorn shuts down.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=JSONErrorProtocol,  # on h11: httptools accepts headers of many megabytes
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self.failure: Exception | None = None
        self._service = service
        self._drain_started: float | None = None
        self._failed_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_started is not None:
            os._exit(128 + sig)
        logger.info("signal %d: draining, at most %g s", sig, self._service.settings.server.drain_seconds)
        self._drain_started = time.monotonic()
        self._service.drain()

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


class JSONErrorProtocol(H11Protocol):
    """Answers what is not HTTP in the shape of all other errors."""

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = orjson.dumps(error_content(AmalgamError(msg, remedy="Check the request line and the headers.")))
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
            ]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
