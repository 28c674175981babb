"""The page and its files.

In: paths. Out: files.

The policy needs neither `unsafe-inline` nor `unsafe-eval`. plotly.js writes two style sheets into the page when it
loads, unless elements of their ids are there already: `index.html` has them, and `plotly.css` holds the rules that our
charts use. Its heatmaps would need images from `data:` addresses, so the grids are drawn on canvases of our own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from amalgam.server.web.files import MEDIA_TYPES, PAGE, PageFile, file_response, read_files

PLOTLY = "plotly.min.js"

router = APIRouter(include_in_schema=False)


@cache
def files() -> Mapping[str, PageFile]:
    """Name below `static/` → file, and plotly.js from its own package."""
    plotly = importlib.util.find_spec("plotly")  # found without being imported: only its file is wanted
    assert plotly is not None and plotly.origin is not None
    script = Path(plotly.origin).parent / "package_data" / PLOTLY
    return {**read_files(__package__), PLOTLY: PageFile(script.read_bytes(), MEDIA_TYPES[".js"])}


@router.get("/dashboard")
async def page(request: Request) -> Response:
    """The page."""
    return await file_response(files, PAGE, request)


@router.get("/dashboard/static/{name:path}")
async def file(name: str, request: Request) -> Response:
    """A file of the page."""
    return await file_response(files, name, request)
