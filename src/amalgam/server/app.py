"""The application: routers, limits, errors and documentation put together.

In: a `Service`. Out: an ASGI application that loads the model in the background. Must never know: tensors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.responses import HTMLResponse

from amalgam import __version__
from amalgam.server import admin, native
from amalgam.server.access import AccessLog
from amalgam.server.body import BodyLimit
from amalgam.server.docs import CONTENT_SECURITY_POLICY, render_docs
from amalgam.server.errors import ErrorAnswer, OrjsonResponse, register_error_handlers
from amalgam.server.service import Service

ROUTERS = (native.router, admin.router)


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
        description="One running Transformer made out of several checkpoints in different precisions.",
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
    app.add_middleware(AccessLog)
    for router in ROUTERS:
        app.include_router(router)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_docs(app.openapi()), headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})

    return app
