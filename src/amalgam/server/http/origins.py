"""Web pages that reach for the server: whose may, and under which name.

In: the headers by which a browser says for whom it asks. Out: 403, or the answer with the headers that let a page read
it. Must never know: what an endpoint does.

A page in the operator's browser can send requests to 127.0.0.1. Under its own name it reads the answers too, once that
name has been made to point there (DNS rebinding): the Host header then has a foreign name. Without, it can still send
what a form can send: the Origin header then has a foreign page. Programs that are no browsers send neither.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amalgam.config.server import ServerSettings
from amalgam.errors import AmalgamError, describe
from amalgam.server.http.errors import error_response

ANY = "*"
MAX_AGE_SECONDS = 600  # how long a browser may remember what it was allowed
_EXPOSED = "X-Request-ID, X-Amalgam-Weight-Version, Retry-After, " + ", ".join(
    f"X-RateLimit-{what}-{of}" for of in ("Requests", "Tokens") for what in ("Limit", "Remaining", "Reset")
)
_METHODS = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
_HEADERS = "Authorization, Content-Type, X-API-Key, X-Request-ID"
_DEFAULT_PORTS = {"http": 80, "https": 443}


class ForeignHostError(AmalgamError):
    """The request's Host is none of the server's names."""

    http_status = 403
    code = "foreign_host"


class ForeignOriginError(AmalgamError):
    """The request comes from somebody else's web page."""

    http_status = 403
    code = "foreign_origin"


class OriginGuard:
    """Refuses foreign names and foreign pages, and answers for those that are allowed (CORS)."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self._hosts = frozenset(host.strip("[]") for host in settings.allowed_hosts)
        self._suffixes = tuple(host[1:] for host in self._hosts if host.startswith("*."))
        self._origins = frozenset(settings.allowed_origins)
        self._own = {"localhost", settings.host.strip("[]").lower()}
        self._is_private = is_loopback(settings.host)
        self._checks_host = ANY not in self._hosts and (bool(self._hosts) or self._is_private)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        try:
            self._check_host(headers.get(b"host", ""))
            origin = self._foreign_origin(scope["method"], headers)
        except AmalgamError as error:
            await error_response(error)(scope, receive, send)
            return
        if origin is None:
            await self.app(scope, receive, send)
            return
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await send({"type": "http.response.start", "status": 204, "headers": self._preflight(origin, headers)})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_readable(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["Access-Control-Allow-Origin"] = origin
                answer["Access-Control-Expose-Headers"] = _EXPOSED
                answer.add_vary_header("Origin")
                if "Cross-Origin-Resource-Policy" in answer:
                    answer["Cross-Origin-Resource-Policy"] = "cross-origin"
            await send(message)

        await self.app(scope, receive, send_readable)

    def _check_host(self, value: str) -> None:
        if not self._checks_host or not value:  # browsers always send one
            return
        name = _host_name(value)
        if name in self._own or name in self._hosts or name.endswith(self._suffixes):
            return
        if (address := _address(name)) is not None and (not self._is_private or address.is_loopback):
            return  # an address cannot be made to point elsewhere
        raise ForeignHostError(
            f"The Host header is {describe(value)}, which is not a name of this server.",
            remedy=f"Use http://localhost, or allow it: server.allowed_hosts: [{name[:100] or ANY!a}].",
        )

    def _foreign_origin(self, method: str, headers: Mapping[bytes, str]) -> str | None:
        """The origin of another site's page that is allowed; None if the request is no such page's.

        Raises:
            ForeignOriginError: it is one's that is not allowed.
        """
        origin = headers.get(b"origin")
        if origin is not None and not _is_same(origin, headers.get(b"host", "")):
            if ANY in self._origins or origin.lower() in self._origins:
                return origin
            raise ForeignOriginError(
                f"The request comes from a web page of {describe(origin)}.",
                remedy=f"Allow it: server.allowed_origins: [{origin[:100]!a}].",
            )
        is_cross_site = headers.get(b"sec-fetch-site") == "cross-site" and origin is None
        if is_cross_site and ANY not in self._origins and not _is_link(method, headers):
            raise ForeignOriginError(
                "The request comes from another site's web page (Sec-Fetch-Site is 'cross-site').",
                remedy="Have the page use fetch in the mode cors, and allow it with server.allowed_origins.",
            )
        return None

    def _preflight(self, origin: str, headers: Mapping[bytes, str]) -> list[tuple[bytes, bytes]]:
        answer = {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": _METHODS,
            "access-control-allow-headers": headers.get(b"access-control-request-headers", _HEADERS),
            "access-control-max-age": str(MAX_AGE_SECONDS),
            "vary": "Origin, Access-Control-Request-Headers",
        }
        if headers.get(b"access-control-request-private-network") == "true":
            answer["access-control-allow-private-network"] = "true"
        return [(key.encode(), value.encode("latin-1")) for key, value in answer.items()]


def is_loopback(host: str) -> bool:
    """Whether all addresses of a host are this machine's own; False if it has none."""
    host = host.strip("[]")
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    addresses = [_address(str(address[0])) for *_, address in found]
    return all(address is not None and address.is_loopback for address in addresses)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address written as such."""
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_link(method: str, headers: Mapping[bytes, str]) -> bool:
    """Whether the browser opens a page by itself, as when a link is clicked: nobody else gets to see it."""
    is_page = headers.get(b"sec-fetch-mode") == "navigate" and headers.get(b"sec-fetch-dest") == "document"
    return is_page and method in ("GET", "HEAD")


def _is_same(origin: str, host: str) -> bool:
    """Whether an origin is the server itself, by the name under which it was asked; "null" never is."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return False
    name, _, written_port = host.rpartition(":") if _has_port(host) else (host, "", "")
    if not parts.hostname or parts.hostname != _host_name(name) or (written_port and not written_port.isdigit()):
        return False
    default = _DEFAULT_PORTS.get(parts.scheme)
    # Without a port, Host has that of the scheme, which a proxy may have changed on the way.
    return (port or default) == (int(written_port) if written_port else default)


def _has_port(host: str) -> bool:
    return ":" in host.rpartition("]")[2]


def _host_name(host: str) -> str:
    """`[::1]:80` → `::1`, `LOCALHOST.` → `localhost`."""
    name = host.rpartition(":")[0] if _has_port(host) else host
    return name.strip().lower().strip("[]").rstrip(".")
