"""The chat page at `/`: plain HTML, CSS and ES modules in `static/`, which talk to the OpenAI interface.

In: requests of browsers. Out: files; to programs, the server's status. Must never know: what a message is, how answers
are made. Conversations stay in the browser.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from amalgam.server.api.model_info import RootAnswer, root_answer
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.accept import prefers_html
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.web.files import PAGE, PageFile, file_response, read_files

router = APIRouter(tags=["native"])  # without StrictRoute: probes and proxies may add a query


@cache
def files() -> Mapping[str, PageFile]:
    """Name below `static/` → file."""
    return read_files(__package__)


@router.get("/", response_model=RootAnswer)
async def root(request: Request, service: ServiceArgument) -> Response:
    """What is served here, and whether it can be used. Browsers get a page to chat with the model."""
    if prefers_html(request.headers.get("accept", "")):
        return await file_response(files, PAGE, request, vary="Accept, Accept-Encoding")
    return OrjsonResponse(root_answer(service).model_dump(mode="json"), headers={"Vary": "Accept"})


@router.get("/static/{name:path}", include_in_schema=False)
async def file(name: str, request: Request) -> Response:
    """A file of the page."""
    return await file_response(files, name, request)
