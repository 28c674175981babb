"""The application: routers, limits, errors and documentation put together, and served.

In: settings and a callable that opens the model. Out: HTTP until a signal arrives. Must never know: tensors.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse

from amalgam.config.settings import Settings
from amalgam.server import dashboard
from amalgam.server.api import experts, exports, native, probes, serving, traces, weights
from amalgam.server.api.native import SamplingFields
from amalgam.server.http.access import AccessLog
from amalgam.server.http.body import BodyLimit
from amalgam.server.http.docs import CONTENT_SECURITY_POLICY, render_docs, with_defaults
from amalgam.server.http.errors import ErrorAnswer, OrjsonResponse, register_error_handlers
from amalgam.server.http.lifecycle import DrainingServer, listen, raise_descriptor_limit, url_of
from amalgam.server.http.methods import HeadMethod
from amalgam.server.http.origins import OriginGuard
from amalgam.server.interface import Deployment
from amalgam.server.service import Service
from amalgam.version import __version__

ROUTERS = (  # every interface there is, in the order of /docs
    native.pages, native.router, experts.router, exports.router, traces.router, weights.router, probes.router,
    serving.router, dashboard.router,
)  # fmt: skip

DESCRIPTION = """One running Transformer made out of several checkpoints in different precisions. null in an optional
field of a request means its default. How a model is sampled by default says its generation_config.json where it has
one, and its defaults are those shown here once it is loaded; GET /model_info has them too, as sampling_defaults."""

logger = logging.getLogger("amalgam.server")


def run(settings: Settings, open_deployment: Callable[[], Deployment], stopping: threading.Event | None = None) -> int:
    """Serve until SIGTERM or SIGINT, finish what is in flight, and return the exit code 0.

    The port opens at once; `open_deployment` runs in a thread, and its requests are refused with 503 meanwhile. A
    second signal ends the process at once. Blocking; to be called in the main thread.

    Args:
        stopping: set when the model is no longer wanted, so that `open_deployment` may raise; the exit code is still 0.

    Raises:
        ConfigError: the address cannot be listened on.
        Exception: what `open_deployment` raised, or an UnavailableError if the engine died.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    raise_descriptor_limit()
    listeners = listen(settings.server)
    service = Service(settings, open_deployment, stopping, url_of(listeners[0], settings.server.host))
    server = DrainingServer(create_app(service), service)
    for listener in listeners:
        logger.info("listening on %s", url_of(listener, ""))
    server.run(sockets=listeners)
    if server.failure is not None:
        raise server.failure
    return 0


def create_app(service: Service) -> FastAPI:
    """An application that starts `service` with its lifespan and closes it at the end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="amalgam",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page needs files from a CDN
        redoc_url=None,
        redirect_slashes=False,
        default_response_class=OrjsonResponse,
        responses={
            "4XX": {"model": ErrorAnswer, "description": "The request cannot be served as it is"},
            422: {"model": ErrorAnswer, "description": "A field is missing, unknown or out of range"},
            503: {"model": ErrorAnswer, "description": "Loading, draining or overloaded; see Retry-After"},
        },
    )
    app.state.service = service
    register_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=service.settings.server.max_body_bytes)
    app.add_middleware(HeadMethod)
    app.add_middleware(OriginGuard, settings=service.settings.server)
    logs_probes = service.settings.server.log_probes
    app.add_middleware(AccessLog, count_refusal=service.count_refusal, logs_probes=logs_probes)
    for router in ROUTERS:
        app.include_router(router)

    schema = app.openapi

    def openapi() -> dict[str, Any]:
        return with_defaults(schema(), set(SamplingFields.model_fields), asdict(service.default_params))

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_docs(app.openapi()), headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})

    return app
