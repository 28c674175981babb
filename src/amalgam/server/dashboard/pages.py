"""The page and its files, from the package, under headers that let nothing else in.

In: paths. Out: files. Only the names found in `static/` at the first request exist; a path is never opened.

The policy needs neither `unsafe-inline` nor `unsafe-eval`. plotly.js writes two style sheets into the page when it
loads, unless elements of their ids are there already: `index.html` has them, and `plotly.css` holds the rules that our
charts use. Its heatmaps would need images from `data:` addresses, so the grids are drawn on canvases of our own.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import importlib.resources
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for again each time: the ETag answers
}
PAGE = "index.html"
PLOTLY = "plotly.min.js"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class PageFile:
    """One file, read once."""

    content: bytes
    media_type: str

    @cached_property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'

    @cached_property
    def compressed(self) -> bytes:
        return gzip.compress(self.content, 6, mtime=0)

    def response(self, request: Request) -> Response:
        """The file, or 304 if the client has it."""
        headers = {**HEADERS, "ETag": self.etag, "Vary": "Accept-Encoding"}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self.content, headers=headers, media_type=self.media_type)
        return Response(self.compressed, headers={**headers, "Content-Encoding": "gzip"}, media_type=self.media_type)


@cache
def files() -> Mapping[str, PageFile]:
    """Name below `static/` → file, and plotly.js from its own package."""
    found: dict[str, PageFile] = {}

    def collect(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                collect(entry, f"{prefix}{entry.name}/")
            elif media_type := _MEDIA_TYPES.get(PurePosixPath(entry.name).suffix):
                found[prefix + entry.name] = PageFile(entry.read_bytes(), media_type)

    collect(importlib.resources.files(__package__).joinpath("static"), "")
    plotly = importlib.util.find_spec("plotly")  # found without being imported: only its file is wanted
    assert plotly is not None and plotly.origin is not None
    script = Path(plotly.origin).parent / "package_data" / PLOTLY
    found[PLOTLY] = PageFile(script.read_bytes(), _MEDIA_TYPES[".js"])
    return found


@router.get("/dashboard")
async def page(request: Request) -> Response:
    """The page."""
    return await asyncio.to_thread(lambda: files()[PAGE].response(request))


@router.get("/dashboard/static/{name:path}")
async def file(name: str, request: Request) -> Response:
    """A file of the page."""

    def respond() -> Response:
        found = files().get(name)
        if found is None:
            raise HTTPException(404)
        return found.response(request)

    return await asyncio.to_thread(respond)
