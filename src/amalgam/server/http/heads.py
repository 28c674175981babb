"""The target of a request, the path under which a proxy shows the server, and the size of a request's head.

In: ASGI messages. Out: paths without host and prefix, whether the proxy has taken that away or not; 431. Must never
know: what an endpoint does.
"""

from __future__ import annotations

from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

from amalgam.errors import AmalgamError
from amalgam.server.http.errors import error_response

MAX_HEADERS = 100


class HeadersTooLargeError(AmalgamError):
    """The request's head exceeds `server.max_header_bytes`, or has too many headers."""

    http_status = 431
    code = "headers_too_large"


class AbsoluteTarget:
    """Takes the path of a target that has a host before it, as clients send it to proxies: servers have to know it, and
    that host takes the place of the header's (RFC 9112, 3.2.2).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw_target: bytes = scope.get("raw_path") or b""
        if scope["type"] == "http" and raw_target.lower().startswith((b"http://", b"https://")):
            host, slash, rest = raw_target.partition(b"://")[2].partition(b"/")
            raw_path = slash + rest if slash else b"/"
            headers = [(b"host", host), *((name, value) for name, value in scope["headers"] if name != b"host")]
            scope = {**scope, "path": unquote(raw_path.decode("ascii")), "raw_path": raw_path, "headers": headers}
        await self.app(scope, receive, send)


class RootPath:
    """Takes the prefix from paths that begin with it. Pages link relatively, so that nobody else needs to know it."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self._prefix = root_path
        self._raw_prefix = root_path.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._prefix + "/"):
            raw_path = scope.get("raw_path") or b""
            scope = {
                **scope,
                "path": scope["path"].removeprefix(self._prefix),
                "raw_path": raw_path.removeprefix(self._raw_prefix),
            }
        await self.app(scope, receive, send)


class HeadLimit:
    """Refuses requests whose headers are too many or too long."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            num_bytes = len(scope.get("raw_path") or b"") + len(scope["query_string"])
            num_bytes += sum(len(name) + len(value) + len(b": \r\n") for name, value in headers)
            if len(headers) > MAX_HEADERS or num_bytes > self._max_bytes:
                error = HeadersTooLargeError(
                    f"The request has {len(headers)} headers, with its path {num_bytes} bytes.",
                    remedy=f"Allowed: {MAX_HEADERS} and {self._max_bytes} (server.max_header_bytes).",
                )
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
