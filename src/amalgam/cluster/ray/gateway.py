"""The gateway on Ray Serve: it takes requests itself, or Serve's proxies hand them to it.

In: settings, a handle of the replicas. Out: an ASGI application at an address of its own or Serve's, and a drain.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from amalgam.cluster.gateway import Gateway
from amalgam.cluster.ray.shared import here
from amalgam.cluster.ray.transport import RayTransport
from amalgam.cluster.routing import Routing
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError, UnavailableError
from amalgam.server.http.lifecycle import DrainingServer, listen, raise_descriptor_limit, url_of
from amalgam.server.http.logs import start_logging
from amalgam.server.http.tls import certificate_of
from amalgam.server.service import Status

PORT_SECONDS = 30.0  # until the port is free that the gateway before this one has listened on
_POLL_SECONDS = 0.05

logger = logging.getLogger("amalgam.cluster")


@serve.ingress()
class ServeGateway:
    """Serve makes one, asks it for its application, and runs that one's lifespan."""

    async def __init__(self, settings: Settings, replicas: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        start_logging(settings.server.log_format)
        here.routing = routing = Routing(settings.cluster.max_imbalance)
        self._gateway = Gateway(settings, RayTransport(replicas, routing), routing)
        self._own = None if settings.cluster.proxies else await OwnServer.start(self._gateway, settings)

    def __serve_build_asgi_app__(self) -> Gateway:
        return self._gateway

    async def check_health(self) -> None:
        """Serve puts another gateway in the place of one that cannot go on."""
        if (failure := self._gateway.service.failure) is not None:
            raise failure
        if self._own is not None:
            self._own.check()

    async def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._gateway.service.status is Status.HEALTHY

    async def drain(self, seconds: float) -> int:
        """Take nothing more and wait for what is in flight, `seconds` at most; how many requests are left."""
        service = self._gateway.service
        service.drain()
        deadline = time.monotonic() + seconds
        while service.num_active and time.monotonic() < deadline:  # noqa: ASYNC110 – requests tell nobody
            await asyncio.sleep(_POLL_SECONDS)
        return service.num_active

    async def __del__(self) -> None:
        """Serve ends the application before: who ends the cluster in order has drained it."""
        if (own := getattr(self, "_own", None)) is not None:
            await own.stop()


class OwnServer:
    """The gateway's own server, where Serve's proxies take no requests: each token would pass one process more."""

    def __init__(self, server: DrainingServer, running: asyncio.Task[None]) -> None:
        self._server = server
        self._running = running

    @classmethod
    async def start(cls, gateway: Gateway, settings: Settings) -> OwnServer:
        """
        Raises:
            ConfigError: the address cannot be listened on; certificates cannot be used.
        """
        certificate = certificate_of(settings.server)
        raise_descriptor_limit()
        deadline = time.monotonic() + PORT_SECONDS
        while True:
            try:
                listeners = listen(settings.server)
                break
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_POLL_SECONDS)
        for listener in listeners:
            logger.info("listening on %s", url_of(listener, "", "http" if certificate is None else "https"))
        server = DrainingServer(gateway, gateway.service, certificate, has_lifespan=False)
        return cls(server, asyncio.create_task(server.serve(sockets=listeners)))

    def check(self) -> None:
        """
        Raises:
            UnavailableError: nobody listens any more.
        """
        if self._running.done():
            raise UnavailableError("The gateway's server has ended.")

    async def stop(self) -> None:
        """Close the port, and connections when their answers have left."""
        self._server.should_exit = True
        await self._running
