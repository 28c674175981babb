"""The one address of a cluster: the server's application over all replicas, and what looks after them.

In: settings, what carries calls and requests. Out: an ASGI application. Must never know: what carries them.

It is the application of `amalgam serve`, with its keys, limits, logs, endpoints and pages, over a deployment that is
all replicas together. Only what takes prompts is answered by a replica.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from amalgam.base.threads import StoppableThread
from amalgam.cluster.coordinator import Coordinator
from amalgam.cluster.deployment import ClusterDeployment
from amalgam.cluster.figures import ClusterFigures
from amalgam.cluster.forwarding import Forwarding, ForwardingCounts
from amalgam.cluster.interface import Description, ReplicaState, Transport
from amalgam.cluster.members import Members
from amalgam.cluster.metrics import families
from amalgam.cluster.routing import Routing
from amalgam.cluster.settings import check_settings
from amalgam.config.settings import Settings
from amalgam.errors import AmalgamError, UnavailableError
from amalgam.runtime.history import HistoryFile
from amalgam.server import create_app
from amalgam.server.app import warn_if_open
from amalgam.server.http.keys import KeyRing
from amalgam.server.interface import Deployment
from amalgam.server.service import Service

LOOK_SECONDS = 0.25  # between two looks at the replicas
STATE_SECONDS = 5.0  # how long a replica may take to tell its state

logger = logging.getLogger("amalgam.cluster")


class Gateway:
    """See above. An ASGI application whose lifespan says which event loop is its own."""

    def __init__(self, settings: Settings, transport: Transport, routing: Routing) -> None:
        check_settings(settings)
        self._settings = settings
        self._transport = transport
        self._routing = routing
        self._counts = ForwardingCounts()
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = asyncio.Event()
        self._gate.set()
        self._looking: asyncio.Task[None] | None = None
        self.service = Service(settings, self._open_or_log, self._stopping)
        keys = KeyRing(settings.server)
        self._app = create_app(self.service, keys)
        self._app.user_middleware.append(  # the innermost
            Middleware(Forwarding, self.service, routing, transport, self._gate, self._counts)
        )
        warn_if_open(settings, keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._looking = asyncio.create_task(self._look())
        await self._app(scope, receive, send)

    def _open_or_log(self) -> Deployment:
        try:
            return self._open()
        except Exception as error:  # nobody waits here for what the service keeps
            if not self._stopping.is_set():
                logger.error("the gateway cannot begin: %s", error, exc_info=not isinstance(error, AmalgamError))
            raise

    def _open(self) -> Deployment:
        """In a thread: wait for a replica, and make a deployment of all."""
        assert self._loop is not None, "the application has no lifespan"
        members = Members(self._transport, self._loop)
        path, resumes = self._settings.weights.history, self._settings.weights.resume
        history = HistoryFile(Path(path)) if path else None
        coordinator = Coordinator(members, self._routing, self._holding, history, resumes=resumes)
        with ExitStack() as on_failure:
            on_failure.callback(coordinator.close)
            description = self._begin(members, coordinator)
            on_failure.pop_all()
        figures = ClusterFigures(members, self.service.filter_counts)
        self.service.filter_counts, self.service.processes = figures.filtered, figures.by_host
        self.service.more_families = lambda: families(self._routing, self._counts, coordinator, figures)
        return ClusterDeployment(self._settings, description, members, self._routing, coordinator, self._stopping.set)

    def _begin(self, members: Members, coordinator: Coordinator) -> Description:
        """Wait until a replica is ready; what it tells of itself."""
        while not coordinator.begin():
            if self._stopping.wait(LOOK_SECONDS):
                raise UnavailableError("The gateway is stopping.")
        description: Description = members.any("describe")
        StoppableThread(lambda: self._look_after(coordinator), "amalgam-cluster", self._stopping.set).start()
        while not any(seen.is_ready for seen in list(self._routing.replicas.values())):
            if self._stopping.wait(LOOK_SECONDS):
                raise UnavailableError("The gateway is stopping.")
        return description

    async def _look(self) -> None:
        """Ask all replicas for their state, again and again."""
        has_started = False
        while not self._stopping.is_set():
            try:
                if not has_started:
                    await self._transport.start()
                    has_started = True
                await self._look_once()
            except Exception as error:  # the next look may succeed, and without one no replica gets requests
                logger.error("replicas cannot be seen: %s", error, exc_info=not isinstance(error, AmalgamError))
            await asyncio.sleep(LOOK_SECONDS)

    async def _look_once(self) -> None:
        ids, asked_at = set(self._transport.ids()), time.monotonic()
        found = await asyncio.gather(*(self._state(replica_id) for replica_id in ids))
        states = {replica_id: state for replica_id, state in zip(ids, found, strict=True) if state is not None}
        self._routing.update(states, asked_at, gone=set(self._routing.replicas) - ids)

    async def _state(self, replica_id: str) -> ReplicaState | None:
        try:
            async with asyncio.timeout(STATE_SECONDS):
                state: ReplicaState = await self._transport.call(replica_id, "state")
                return state
        except (AmalgamError, TimeoutError):  # it has gone, or is about to
            return None
        except Exception:
            logger.exception("replica %s does not tell its state", replica_id)
            return None

    def _look_after(self, coordinator: Coordinator) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            try:
                coordinator.look_after()
                coordinator.note_answered(self._counts.versions)
            except AmalgamError as error:
                logger.warning("replicas could not be looked after: %s", error)
            except Exception:
                logger.exception("replicas could not be looked after")

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """New requests wait. From any thread."""
        assert self._loop is not None
        loop, began = self._loop, time.monotonic()

        async def close() -> None:
            self._gate.clear()

        asyncio.run_coroutine_threadsafe(close(), loop).result()
        try:
            yield
        finally:
            loop.call_soon_threadsafe(self._gate.set)
            logger.info("new requests have waited %.1f ms for all replicas", (time.monotonic() - began) * 1e3)
