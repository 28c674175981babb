"""Expert statistics as files: exports, reports, pictures, saved sets.

In: formats, names. Out: files, sent or written to `server.export_dir`. All work is done in threads.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from amalgam.experts.saved.names import MAX_FILE_NAME_CHARS
from amalgam.server.api.queries import WindowBody, WindowQuery
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import Body, StrictRoute

# The other modules of amalgam.experts are imported in threads: they import torch, and the port opens before that.

router = APIRouter(route_class=StrictRoute, tags=["experts"])


class ExportBody(WindowBody):
    format: Literal["json", "csv", "parquet", "npz", "png", "html"] = "json"
    """json: everything that /expert_stats answers; csv, parquet: a row per expert; npz: a saved set for
    numpy; png: a heatmap; html: a report."""


class ExportAnswer(BaseModel):
    file_name: str
    """The file's name in `server.export_dir`."""
    media_type: str
    encoding: Literal["text", "base64"]
    """How `content` holds the file."""
    content: str

    model_config = ConfigDict(use_attribute_docstrings=True)


class SaveSetBody(Body):
    name: str = Field(min_length=1, max_length=MAX_FILE_NAME_CHARS)
    """Letters, digits, . _ and -, 200 at most; or the name of its file. A set of that name is replaced."""
    merge: list[str] | None = Field(default=None, min_length=1, max_length=64, fail_fast=True)
    """Saved sets to put together; null: save what has been counted since the last reset."""


class SavedSetAnswer(BaseModel):
    name: str
    file_name: str
    """In `server.export_dir`."""
    tokens: int
    labels: list[str]

    model_config = ConfigDict(use_attribute_docstrings=True)


class SavedSetsAnswer(BaseModel):
    sets: list[str]


@router.post("/export_expert_stats")
async def export_expert_stats(service: ServiceArgument, body: ExportBody | None = None) -> ExportAnswer:
    """Write the statistics to a file in `server.export_dir`; answers with its name and content."""
    wanted, statistics = body or ExportBody(), service.statistics

    def write() -> ExportAnswer:
        result = statistics.export_to(service.settings.server.export_dir, wanted.format, wanted.minutes)
        return ExportAnswer(
            file_name=result.file_name,
            media_type=result.media_type,
            encoding="text" if result.is_text else "base64",
            content=result.content.decode() if result.is_text else base64.b64encode(result.content).decode(),
        )

    return await asyncio.to_thread(write)


@router.get("/experts/report", response_class=Response)
async def get_report(service: ServiceArgument, query: Annotated[WindowQuery, Query()]) -> Response:
    """Everything on one HTML page without scripts."""
    statistics = service.statistics

    def answer() -> Response:
        from amalgam.experts.export.html import CONTENT_SECURITY_POLICY

        result = statistics.export("html", query.minutes)
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
        return Response(result.content, media_type=result.media_type, headers=headers)

    return await asyncio.to_thread(answer)


@router.get("/experts/heatmap.png", response_class=Response)
async def get_heatmap(service: ServiceArgument, query: Annotated[WindowQuery, Query()]) -> Response:
    """Layers × experts as a picture: each expert's use against an even share."""
    result = await asyncio.to_thread(service.statistics.export, "png", query.minutes)
    return Response(result.content, media_type=result.media_type)


@router.get("/experts/set.npz", response_class=Response)
async def get_set(service: ServiceArgument) -> Response:
    """A saved set of what has been counted since the last reset, which is not kept here, for `numpy.load` too."""
    result = await asyncio.to_thread(service.statistics.export, "npz")
    return Response(result.content, media_type=result.media_type)


@router.get("/experts/sets")
async def list_sets(service: ServiceArgument) -> SavedSetsAnswer:
    """The saved sets in `server.export_dir`."""

    def names() -> list[str]:
        from amalgam.experts.saved.folder import list_names

        return list_names(service.settings.server.export_dir)

    return SavedSetsAnswer(sets=await asyncio.to_thread(names))


@router.post("/experts/sets")
async def save_set(body: SaveSetBody, service: ServiceArgument) -> SavedSetAnswer:
    """Save the statistics, or several saved sets together, under a name, to be compared with later."""
    save, folder = service.statistics.save_set, service.settings.server.export_dir
    saved = await asyncio.to_thread(save, folder, body.name, body.merge)
    service.shared_answers.forget()  # of the set that was replaced
    return SavedSetAnswer(
        name=saved.name, file_name=saved.file_name, tokens=saved.num_tokens, labels=list(saved.labels)
    )
