"""What clients may expect of every page: HEAD, and a slash at the end.

In: ASGI messages. Out: heads without bodies, redirects. Must never know: what an endpoint does.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMethod:
    """Answers HEAD as GET without the body, which the server leaves out; a stream ends with its head."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        is_complete = False

        async def send_head(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                is_complete = True
                await send(message)
                await send({"type": "http.response.body", "body": b""})  # a stream takes this for its client's leaving

        try:
            await self.app({**scope, "method": "GET"}, receive, send_head)
        except ClientDisconnect:
            if not is_complete:
                raise


def without_slash(pages: Iterable[str], scope: Scope) -> str | None:
    """Where a page is that was asked for with a slash at the end, relative to that address; None if it is none of them.

    Relative, because a proxy may have taken a prefix away and changed the scheme.
    """
    path: str = scope["path"].removesuffix("/")
    if scope["method"] not in ("GET", "HEAD") or path == scope["path"] or path not in pages:
        return None
    query = scope["query_string"].decode("latin-1")
    return "../" + path.rpartition("/")[2] + (f"?{query}" if query else "")
