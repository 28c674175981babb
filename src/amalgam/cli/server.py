"""A running server, asked by a verb: JSON and events over HTTP, and what goes wrong as our own errors."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPResponse
from typing import Any, TypeVar

from amalgam.base.escaping import one_line
from amalgam.base.strict_json import parse_json
from amalgam.config.server import ServerSettings
from amalgam.errors import AmalgamError, ConfigError, ConflictError, NotFoundError, RequestError, UnavailableError

TIMEOUT_SECONDS = 30.0
_MAX_ERROR_BYTES = 2**16
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # to listen on; one that can be called
_BY_STATUS: Mapping[int, type[AmalgamError]] = {404: NotFoundError, 409: ConflictError}
T = TypeVar("T")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key goes to the server that it was given for, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


class Server:
    """A server of ours at an address.

    Args:
        url: its address.
        key: sent as a bearer token; empty: none.
    """

    def __init__(self, url: str, key: str = "") -> None:
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("The key holds characters that no header can bear.", remedy="Give the key itself.")
        self.url = url
        self._key = key

    def get(self, path: str, query: Mapping[str, Any] | None = None) -> Any:
        """The JSON that a path answers.

        Raises:
            RequestError: the server refuses the request.
            UnavailableError: there is no server, or it cannot answer.
        """
        search = f"?{urllib.parse.urlencode(query)}" if query else ""
        return self._fetch(self._request("GET", path + search), _json)

    def read(self, path: str) -> bytes:
        """The bytes that a path answers. Raises the errors of `get`."""
        return self._fetch(self._request("GET", path), HTTPResponse.read)

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that a request with a body answers. Raises the errors of `get`."""
        return self._fetch(self._request(method, path, body), _json)

    def events(self, path: str) -> Iterator[tuple[str, Any]]:
        """The name and the JSON of each server-sent event, until the server says that there are no more.

        Raises:
            RequestError: the server refuses the request.
            UnavailableError: there is no server, or the stream ends before.
        """
        with self._fetch(self._request("GET", path), lambda response: response, keeps_open=True) as response:
            name = ""
            try:
                for line in response:
                    field, _, value = line.decode().rstrip("\n").partition(": ")
                    if field == "event":
                        name = value
                    elif field == "data" and value == "[DONE]":
                        return
                    elif field == "data":
                        yield name, parse_json(value.encode())
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise UnavailableError(f"The events of {self.url} broke off ({error}).") from None
        raise UnavailableError(f"The events of {self.url} broke off.")

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> urllib.request.Request:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        return urllib.request.Request(f"{self.url}/{path}", data, headers, method=method)

    def _fetch(
        self, request: urllib.request.Request, read: Callable[[HTTPResponse], T], *, keeps_open: bool = False
    ) -> T:
        try:
            response: HTTPResponse = _opener.open(request, timeout=TIMEOUT_SECONDS)
            if keeps_open:
                return read(response)
            with response:
                return read(response)
        except urllib.error.HTTPError as error:
            with error:
                kind = _BY_STATUS.get(error.code, RequestError if error.code < 500 else UnavailableError)
                message, details = _told_by(error)
            raise kind(f"{self.url} answered {error.code}: {message}", details=details) from None
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(
                f"No server answers at {self.url} ({getattr(error, 'reason', error)}).",
                remedy="Start one with `amalgam serve`, or give the address of another.",
            ) from None
        except ValueError:
            raise no_server_of_ours(self.url) from None


def address_of(url: str | None, server: ServerSettings) -> str:
    """The address that a flag gives, or else the one that the settings say.

    Raises:
        ConfigError: it is none.
    """
    if url is None:
        host = _EVERY_ADDRESS.get(server.host, server.host)
        return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(f"{url!r} is no address of a server.", remedy="Expected one like http://127.0.0.1:8080.")
    return url.rstrip("/")


def key_of(server: ServerSettings) -> str:
    """The key that the settings have for what needs the admin key; empty: none. Digests of keys open nothing."""
    keys = [server.admin_key, *server.api_keys]
    texts = [key.get_secret_value() for key in keys if key is not None]
    return next((text for text in texts if not text.startswith("sha256:")), "")


def no_server_of_ours(url: str) -> UnavailableError:
    return UnavailableError(f"What answers at {url} is no amalgam server.", remedy="Check the address.")


def _json(response: HTTPResponse) -> Any:
    return parse_json(response.read())


def _told_by(error: urllib.error.HTTPError) -> tuple[str, dict[str, Any]]:
    """What an answer with an error says, its beginning if it is none of ours; and what stands beside the message."""
    text = error.read(_MAX_ERROR_BYTES).decode(errors="replace")
    try:
        fields = dict(parse_json(text.encode())["error"])
        message = one_line(fields.pop("message"))
        return message, {name: value for name, value in fields.items() if name not in ("type", "param")}
    except (ValueError, LookupError, TypeError, AttributeError):
        return one_line(text[:200]), {}
