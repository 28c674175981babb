"""What goes on in the server, told to every open page.

In: the service. Out: server-sent events, one every two seconds. All viewers share one computation, and each has a place
for one event: a slow viewer misses events, it does not pile them up.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from amalgam.errors import OverloadedError
from amalgam.server.api.serving import describe_serving
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import StrictRoute
from amalgam.server.service import Service, Status

INTERVAL_SECONDS = 2.0
MAX_VIEWERS = 256
NUM_POINTS = 4  # more than come up between two events

logger = logging.getLogger("amalgam.server")

router = APIRouter(route_class=StrictRoute, include_in_schema=False)


class EventHub:
    """Calls `describe` every `interval` seconds in a thread while anyone watches, and hands the result to all.

    Should `describe` hang, nobody gets an event, an old one neither, and no second call is begun: pages then say that
    their figures are old. Belongs to the event loop.
    """

    def __init__(self, describe: Callable[[], dict[str, Any]], interval: float) -> None:
        self.num_described = 0
        self._describe = describe
        self._interval = interval
        self._viewers: set[asyncio.Queue[bytes]] = set()
        self._latest: bytes | None = None
        self._made_at = -math.inf
        self._describing: asyncio.Future[dict[str, Any]] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    def check_room(self) -> None:
        """
        Raises:
            OverloadedError: too many watch already.
        """
        if len(self._viewers) >= MAX_VIEWERS:
            raise OverloadedError(f"{MAX_VIEWERS} viewers watch already.", remedy="Close another page and try again.")

    @contextmanager
    def watch(self) -> Iterator[asyncio.Queue[bytes]]:
        """A queue that always holds the newest event not yet taken."""
        viewer: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)
        if self._latest is not None and time.monotonic() - self._made_at <= 2 * self._interval:
            viewer.put_nowait(self._latest)
        self._viewers.add(viewer)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)
            if not self._viewers and self._task is not None:
                self._task.cancel()
                self._task = self._latest = None

    async def _run(self) -> None:
        while True:
            try:
                fields = await self._described()
                self._latest = b"data: %b\n\n" % orjson.dumps(fields, option=orjson.OPT_NON_STR_KEYS)
                self._made_at = time.monotonic()
                self.num_described += 1
                for viewer in self._viewers:
                    if viewer.full():
                        viewer.get_nowait()
                    viewer.put_nowait(self._latest)
            except Exception:
                logger.exception("the dashboard's events could not be made")
            await asyncio.sleep(self._interval)

    async def _described(self) -> dict[str, Any]:
        """What the call gives that is under way, perhaps since before the last viewers left, or else a new one."""
        if self._describing is None or self._describing.done():
            self._describing = asyncio.ensure_future(asyncio.to_thread(self._describe))
        return await asyncio.shield(self._describing)


class ViewerStream(Response):
    """The events of one viewer, until it leaves or the server drains."""

    media_type = "text/event-stream"

    def __init__(self, hub: EventHub, service: Service) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._hub = hub
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_client_leaves(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with self._hub.watch() as viewer:
            while True:
                event = await viewer.get()
                is_last = self._service.status is Status.DRAINING
                await send({"type": "http.response.body", "body": event, "more_body": not is_last})
                if is_last:
                    return


@router.get("/dashboard/events")
async def events(request: Request, service: ServiceArgument) -> Response:
    """Every two seconds, what goes on in the server."""
    hub = hub_of(request.app.state, service)
    hub.check_room()
    return ViewerStream(hub, service)


def hub_of(state: Any, service: Service) -> EventHub:
    """The hub of one application, made at first use."""
    hub: EventHub | None = getattr(state, "dashboard_hub", None)
    if hub is None:
        hub = state.dashboard_hub = EventHub(lambda: describe_event(service), INTERVAL_SECONDS)
    return hub


def describe_event(service: Service) -> dict[str, Any]:
    """The fields of one event. Any thread. `interval` is how many seconds later the next one comes.

    `started_at` is another one once another process answers. Of the serving figures' history it holds the end: a page
    reads the rest once. `remapped_at` and `statistics_version`
    change when there are new entries in `/remaps` and new counts. `change` is the change of
    the weights that is under way.
    """
    fields = {
        "interval": INTERVAL_SECONDS,
        "status": service.status,
        "model": service.model_name,
        "started_at": service.started_at,
        "uptime": service.uptime_seconds,
        "weight_version": service.weight_version,
        "remapped_at": None,
        "statistics_version": None,
        "serving": None,
        "change": None,
    }
    if not service.has_loaded or service.status is Status.FAILED:
        return fields
    serving = describe_serving(service)
    remaps, statistics, change = (
        service.deployment.remaps,
        service.deployment.statistics,
        service.deployment.jobs.running,
    )
    return fields | {
        "remapped_at": remaps[-1].at if remaps else None,
        "statistics_version": None if statistics is None else statistics.revision,
        "change": None if change is None else change.status().as_json(),
        "serving": serving.model_copy(update={"series": serving.series[-NUM_POINTS:]}).model_dump(),
    }
