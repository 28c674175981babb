"""The gateway on Ray Serve: the application that Serve's proxies hand requests to.

In: settings, a handle of the replicas. Out: an ASGI application, and a drain.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from amalgam.cluster.gateway import Gateway
from amalgam.cluster.ray.shared import here
from amalgam.cluster.ray.transport import RayTransport
from amalgam.cluster.routing import Routing
from amalgam.config.settings import Settings
from amalgam.server.http.logs import start_logging
from amalgam.server.service import Status

_POLL_SECONDS = 0.05


@serve.ingress()
class ServeGateway:
    """Serve makes one, and asks it for its application."""

    def __init__(self, settings: Settings, replicas: DeploymentHandle[Any]) -> None:
        start_logging(settings.server.log_format)
        here.routing = Routing(settings.cluster.max_imbalance)
        self._gateway = Gateway(settings, RayTransport(replicas), here.routing)

    def __serve_build_asgi_app__(self) -> Gateway:
        return self._gateway

    async def check_health(self) -> None:
        """Serve puts another gateway in the place of one that cannot go on."""
        if (failure := self._gateway.service.failure) is not None:
            raise failure

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
