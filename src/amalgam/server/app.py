"""The application: routers, limits, errors and documentation put together, and served.

In: settings and a callable that opens the model. Out: HTTP until a signal arrives. Must never know: tensors.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import cache
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.responses import HTMLResponse
from starlette.routing import BaseRoute

from amalgam.config.settings import Settings
from amalgam.server import dashboard, page
from amalgam.server.api import (
    anthropic,
    autoplan,
    experts,
    exports,
    filters,
    generate,
    model_info,
    others,
    probes,
    serving,
    summaries,
    traces,
    weights,
)
from amalgam.server.api.generate import SamplerFields
from amalgam.server.api.openai import chat, completions, embeddings, models, responses, tokenize
from amalgam.server.http.access import AccessLog
from amalgam.server.http.body import BodyLimit
from amalgam.server.http.docs import CONTENT_SECURITY_POLICY, render_docs, with_defaults
from amalgam.server.http.errors import ErrorAnswer, OrjsonResponse, register_error_handlers
from amalgam.server.http.heads import AbsoluteTarget, HeadLimit, RootPath
from amalgam.server.http.keys import KeyGuard, KeyRing
from amalgam.server.http.lifecycle import DrainingServer, listen, raise_descriptor_limit, url_of
from amalgam.server.http.limits import RateLimits
from amalgam.server.http.logs import start_logging
from amalgam.server.http.methods import HeadMethod
from amalgam.server.http.origins import OriginGuard, is_loopback
from amalgam.server.http.queueing import QueueGuard
from amalgam.server.http.tls import Certificate, certificate_of
from amalgam.server.http.tracing import Tracer, tracer_of
from amalgam.server.interface import Deployment
from amalgam.server.permissions import permissions
from amalgam.server.service import Service
from amalgam.version import __version__

ROUTERS = (  # every interface there is, in the order of /docs
    page.router, generate.router, model_info.router, summaries.router, experts.router, exports.router, traces.router,
    *weights.ROUTERS, autoplan.router, probes.router, others.router, serving.router, filters.router, models.router,
    completions.router, chat.router, responses.router, embeddings.router, tokenize.router, anthropic.router,
    dashboard.router,
)  # fmt: skip

DESCRIPTION = """One running Transformer made out of several checkpoints in different precisions. null in an optional
field of a request means its default. How a model is sampled by default says its generation_config.json where it has
one, and its defaults are those shown here once it is loaded; GET /model_info has them too, as sampling_defaults."""

RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be served as it is"},
    422: {"model": ErrorAnswer, "description": "A field is missing, unknown or out of range"},
    503: {"model": ErrorAnswer, "description": "Loading, draining or overloaded; see Retry-After"},
}

D = TypeVar("D", bound=Deployment)

UNDOCUMENTED_PAGES = {"/dashboard", "/docs", "/openapi.json"}
YOUNG_OBJECTS = 10_000  # that the garbage collector waits for; 700 are a fraction of one request

logger = logging.getLogger("amalgam.server")


def run(settings: Settings, open_deployment: Callable[[], Deployment], stopping: threading.Event | None = None) -> int:
    """Serve until SIGTERM or SIGINT, finish what is in flight, and return the exit code 0.

    The port opens at once; `open_deployment` runs in a thread, and its requests are refused with 503 meanwhile. A
    second signal ends the process at once. Blocking; to be called in the main thread.

    Args:
        stopping: set when the model is no longer wanted, so that `open_deployment` may raise; the exit code is still 0.

    Raises:
        ConfigError: the address cannot be listened on; keys or certificates cannot be used.
        Exception: what `open_deployment` raised, or an UnavailableError if the engine died.
    """
    start_logging(settings.server.log_format)
    keys, certificate = KeyRing(settings.server), certificate_of(settings.server)
    tracer = tracer_of(settings.server.otlp_endpoint, lambda: service.model_name)
    raise_descriptor_limit()
    listeners = listen(settings.server)
    scheme = "http" if certificate is None else "https"
    service = Service(settings, settling(open_deployment), stopping, url_of(listeners[0], settings.server.host, scheme))
    server = DrainingServer(
        create_app(service, keys, tracer), service, certificate, reloading(settings, keys, certificate)
    )
    for listener in listeners:
        logger.info("listening on %s", url_of(listener, "", scheme))
    warn_if_open(settings, keys)
    server.run(sockets=listeners)
    if server.failure is not None:
        raise server.failure
    return 0


def settling(open_deployment: Callable[[], D]) -> Callable[[], D]:
    """The same, and what is in memory then stays out of the garbage collector's sight.

    It lives as long as the process. To go over its several hundred thousand objects stops every thread for a tenth of a
    second, and a request with many small objects sets that off several times.
    """

    def open_and_settle() -> D:
        deployment = open_deployment()
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
        return deployment

    return open_and_settle


def reloading(settings: Settings, keys: KeyRing, certificate: Certificate | None) -> Callable[[], None] | None:
    """What reads the files anew that may change while the server runs; None: there are none."""

    def reload() -> None:
        keys.reload()
        if certificate is not None:
            certificate.reload()

    return reload if certificate is not None or settings.server.api_keys_file else None


def warn_if_open(settings: Settings, keys: KeyRing) -> None:
    """Say in the log that others can use the server, or change it."""
    if settings.server.unix_socket or is_loopback(settings.server.host) or keys.has_keys:
        return
    who = "use this server" if keys.has_admin else "use this server and change its weights"
    logger.warning(
        "Without API keys anybody who reaches %s can %s: set server.api_keys and server.admin_key, or listen on "
        "127.0.0.1.", settings.server.host or "this machine", who,
    )  # fmt: skip


def add_middleware(app: FastAPI, service: Service, keys: KeyRing, tracer: Tracer) -> None:
    """What each request passes, from the last to the first: its path, its record, whose page and key it comes from."""
    settings = service.settings.server
    paths = set(paths_of(app.routes))
    app.add_middleware(QueueGuard, check_room=service.check_room)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, max_seconds=settings.body_seconds)
    app.add_middleware(HeadMethod)
    app.add_middleware(RateLimits)
    app.add_middleware(KeyGuard, keys=keys, permission=permissions(paths, keyless_metrics=settings.keyless_metrics))
    app.add_middleware(OriginGuard, settings=settings)
    app.add_middleware(HeadLimit, max_bytes=settings.max_header_bytes)
    app.add_middleware(
        AccessLog,
        count_refusal=service.count_refusal,
        export=tracer.export,
        logs_probes=settings.log_probes,
        request_seconds=settings.request_seconds,
    )
    if settings.root_path:
        app.add_middleware(RootPath, root_path=settings.root_path)
    app.add_middleware(AbsoluteTarget)


def paths_of(routes: Iterable[BaseRoute]) -> Iterator[str]:
    """Of all routes, as they are declared; FastAPI keeps an included router as one route."""
    for route in _single(routes):
        if path := getattr(route, "path", ""):
            yield path


def _single(routes: Iterable[BaseRoute]) -> Iterator[BaseRoute]:
    for route in routes:
        if (router := getattr(route, "original_router", None)) is not None:
            yield from _single(router.routes)
        else:
            yield route


@cache
def every_route() -> list[BaseRoute]:
    """The routes of all routers, made once in a process: FastAPI takes milliseconds for each."""
    together = APIRouter(default_response_class=OrjsonResponse, responses=RESPONSES)
    for router in ROUTERS:
        together.include_router(router)
    return together.routes


@cache
def pages() -> frozenset[str]:
    """What a browser may open: documented paths that take GET, and pages."""
    documented = {
        route.path_format
        for route in _single(every_route())
        if isinstance(route, APIRoute) and route.include_in_schema and "GET" in (route.methods or ())
    }
    return frozenset(documented | UNDOCUMENTED_PAGES)


def prepare_routes(app: FastAPI) -> None:
    """Ask each route about a request that none takes: FastAPI finishes a route when it is first asked, and the first
    path that nobody serves would hold up all streams for half a second."""
    scope = {"type": "http", "method": "GET", "path": "/ ", "root_path": "", "headers": [], "app": app}
    for route in app.router.routes:
        route.matches(scope)


def create_app(service: Service, keys: KeyRing | None = None, tracer: Tracer | None = None) -> FastAPI:
    """An application that starts `service` with its lifespan and closes it at the end.

    Args:
        keys, tracer: None: those that the settings say.

    Raises:
        ConfigError: the settings' keys cannot be used; there is no library for traces.
    """
    keys = KeyRing(service.settings.server) if keys is None else keys
    if tracer is None:
        tracer = tracer_of(service.settings.server.otlp_endpoint, lambda: service.model_name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        await asyncio.to_thread(prepare_routes, app)
        yield
        await asyncio.to_thread(service.close)
        await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="amalgam",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_url=None,  # see `add_description`
        docs_url=None,  # FastAPI's own page needs files from a CDN
        redoc_url=None,
        redirect_slashes=False,
        servers=[{"url": root}] if (root := service.settings.server.root_path) else None,
        default_response_class=OrjsonResponse,
        responses=RESPONSES,
    )
    app.state.service = service
    register_error_handlers(app, pages())
    app.router.routes += every_route()
    add_middleware(app, service, keys, tracer)

    schema, turn = app.openapi, threading.Lock()

    def openapi() -> dict[str, Any]:
        with turn:  # whoever asks first has it made, which takes most of a second
            made = schema()
        return with_defaults(made, set(SamplerFields.model_fields), asdict(service.default_params))

    app.openapi = openapi  # type: ignore[method-assign]
    add_description(app)
    return app


def add_description(app: FastAPI) -> None:
    """`/openapi.json` and `/docs`, made in a thread: the loop that all streams share goes on."""

    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> OrjsonResponse:
        return await asyncio.to_thread(lambda: OrjsonResponse(app.openapi()))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        html = await asyncio.to_thread(lambda: render_docs(app.openapi()))
        return HTMLResponse(html, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})
