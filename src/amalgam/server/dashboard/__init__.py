"""The page at `/dashboard`: plain HTML, CSS and ES modules in `static/`, fed by JSON endpoints and an event stream.

In: requests of browsers. Out: files and events. Must never know: tensors, how experts are counted.
"""

from __future__ import annotations

from fastapi import APIRouter

from amalgam.server.dashboard import chat, events, expert, mapping, pages, statistics

router = APIRouter()
router.include_router(pages.router)
router.include_router(events.router)
router.include_router(expert.router)
router.include_router(statistics.router)
router.include_router(mapping.router)
router.include_router(chat.router)

__all__ = ["router"]
