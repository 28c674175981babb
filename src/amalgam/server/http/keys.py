"""API keys: who may ask for what.

In: the settings' keys and a file of keys; requests' headers. Out: 401, 403, or the caller's name. Keys are in memory as
SHA-256 only, and what a request presents is compared with all of them, in constant time each. Must never know: what an
endpoint does; a function says what each needs.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import logging
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from amalgam.base.validation import expectation
from amalgam.config.fields import Section
from amalgam.config.server import ServerSettings
from amalgam.config.text import parse_yaml
from amalgam.engine.params import MAX_PRIORITY
from amalgam.errors import AmalgamError, ConfigError
from amalgam.server.http.errors import error_response
from amalgam.server.http.record import RequestRecord

MAX_FILE_BYTES = 2**20
_KEY = re.compile(r"[\x21-\x7e]{1,512}")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_READABLE_BY_OTHERS = stat.S_IRGRP | stat.S_IROTH

logger = logging.getLogger("amalgam.server")


class UnauthorizedError(AmalgamError):
    """The request has no key that is known here."""

    http_status = 401
    code = "unauthorized"


class ForbiddenError(AmalgamError):
    """The request's key does not allow it."""

    http_status = 403
    code = "forbidden"


class Needs(enum.IntEnum):
    """What a request needs."""

    NOTHING = 0
    KEY = 1
    ADMIN = 2


@dataclass(frozen=True)
class Permission:
    """What a request needs.

    Attributes:
        is_metered: the limits on requests and tokens count it.
        takes_place: it waits in the queue until there is room for it.
    """

    needs: Needs
    is_metered: bool = False
    takes_place: bool = False


@dataclass(frozen=True)
class Caller:
    """Who asks: a key's name and limits, 0: none; and the priority of its requests, the lowest first."""

    name: str
    is_admin: bool = False
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    priority: int = 0


class KeyEntry(Section):
    """One key of the file."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.@-]{1,64}$")
    key: SecretStr
    admin: bool = False
    requests_per_minute: int | None = Field(default=None, ge=0, le=2**31)
    tokens_per_minute: int | None = Field(default=None, ge=0, le=2**53)
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)


class KeyRing:
    """All keys of a server.

    Raises:
        ConfigError: a key that no header can hold, one that stands twice, a file that cannot be used.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._callers: dict[bytes, Caller] = {}
        self.anonymous = self._caller("")
        self.reload()

    def reload(self) -> None:
        """Read the file again. If it cannot be used, the keys stay as they are."""
        settings = self._settings
        callers: dict[bytes, Caller] = {}
        for index, key in enumerate(settings.api_keys, 1):
            _add(callers, key.get_secret_value(), self._caller(f"key-{index}"), "server.api_keys")
        if settings.admin_key is not None:
            _add(callers, settings.admin_key.get_secret_value(), Caller("admin", is_admin=True), "server.admin_key")
        if settings.api_keys_file:
            for entry in _read_file(Path(settings.api_keys_file)):
                _add(callers, entry.key.get_secret_value(), self._caller_of(entry), settings.api_keys_file)
        self._callers = callers

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return any(not caller.is_admin for caller in self._callers.values())

    def may_overtake(self, caller: Caller | None) -> bool:
        """Whether requests may ask to be taken before those of the caller's own priority: where there are keys, an
        administrator's.
        """
        return not self._callers or (caller is not None and caller.is_admin)

    @property
    def has_admin(self) -> bool:
        return any(caller.is_admin for caller in self._callers.values())

    def find(self, presented: Iterable[bytes]) -> Caller | None:
        """Whose key is among `presented`; an administrator's first. A wrong key takes as long as a right one."""
        found: Caller | None = None
        for key in presented:
            digest = hashlib.sha256(key).digest()
            for known, caller in self._callers.items():
                is_same = hmac.compare_digest(known, digest)
                found = caller if is_same and (found is None or caller.is_admin) else found
        return found

    def check(self, needs: Needs, caller: Caller | None) -> None:
        """
        Raises:
            UnauthorizedError: a key is needed, and `caller` is None.
            ForbiddenError: the admin key is needed, and the caller's is another, or there is none.
        """
        if not self._callers or needs is Needs.NOTHING or (needs is Needs.KEY and not self.has_keys):
            return
        if caller is None:
            raise UnauthorizedError(
                "The request has no key that is known here.",
                remedy="Send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            )
        if needs is Needs.ADMIN and not caller.is_admin:
            remedy = "Send the admin key." if self.has_admin else "Set server.admin_key to allow it."
            raise ForbiddenError(
                "This needs the admin key: it changes the server or shows others' traffic.", remedy=remedy
            )

    def _caller(self, name: str) -> Caller:
        return Caller(name, False, self._settings.requests_per_minute, self._settings.tokens_per_minute)

    def _caller_of(self, entry: KeyEntry) -> Caller:
        """The settings' limits hold for all but administrators; those of the file for whom they are given."""
        default = Caller(entry.name, is_admin=True) if entry.admin else self._caller(entry.name)
        requests, tokens = entry.requests_per_minute, entry.tokens_per_minute
        return Caller(
            entry.name,
            entry.admin,
            default.requests_per_minute if requests is None else requests,
            default.tokens_per_minute if tokens is None else tokens,
            entry.priority,
        )


class KeyGuard:
    """Refuses requests without the key that they need, and notes whose it is and what the request is.

    Args:
        permission: method and path → what that needs.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, permission: Callable[[str, str], Permission]) -> None:
        self.app = app
        self._keys = keys
        self._permission = permission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        caller = self._keys.find(presented_keys(scope["headers"]))
        permission = self._permission(scope["method"], scope["path"])
        try:
            self._keys.check(permission.needs, caller)
        except AmalgamError as error:
            await error_response(error)(scope, receive, send)
            return
        record: RequestRecord = scope["state"]["record"]
        record.caller = "" if caller is None else caller.name
        record.priority = 0 if caller is None else caller.priority
        record.may_overtake = self._keys.may_overtake(caller)
        scope["state"]["caller"] = caller or self._keys.anonymous
        scope["state"]["is_metered"] = permission.is_metered
        scope["state"]["takes_place"] = permission.takes_place
        await self.app(scope, receive, send)


def presented_keys(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """What the headers `Authorization: Bearer` and `x-api-key` hold."""
    keys = []
    for name, value in headers:
        if name == b"x-api-key":
            keys.append(value.strip())
        elif name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                keys.append(key.strip())
    return keys


def _add(callers: dict[bytes, Caller], key: str, caller: Caller, where: str) -> None:
    """Messages never hold a key."""
    hashed = _DIGEST.fullmatch(key)
    if key.startswith("sha256:") and hashed is None:
        raise ConfigError(f"{where}: the key {caller.name!r} has no 64 hexadecimal digits after 'sha256:'.")
    if _KEY.fullmatch(key) is None:
        raise ConfigError(
            f"{where}: the key {caller.name!r} cannot be sent in a header.",
            remedy="Use 1 to 512 printable ASCII characters without spaces.",
        )
    digest = bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(key.encode()).digest()
    if digest in callers:
        raise ConfigError(f"{where}: {callers[digest].name!r} and {caller.name!r} have the same key.")
    if any(other.name == caller.name for other in callers.values()):
        raise ConfigError(f"{where}: the name {caller.name!r} stands twice.", remedy="Give each key its own.")
    callers[digest] = caller


def _read_file(path: Path) -> list[KeyEntry]:
    try:
        with path.open("rb") as file:
            mode, content = stat.S_IMODE(path.stat().st_mode), file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"server.api_keys_file {str(path)!r} cannot be read: {error.strerror}.") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"server.api_keys_file {str(path)!r} has more than {MAX_FILE_BYTES} bytes.")
    try:
        items = parse_yaml(content.decode())
    except ValueError:  # whose message would show keys
        items = None
    if isinstance(items, str):  # a key a line
        items = items.split()
    if not isinstance(items, list) or not items:
        raise ConfigError(
            f"server.api_keys_file {str(path)!r} holds no keys.",
            remedy="Write one a line, or a YAML list of mappings with name, key, admin, requests_per_minute, "
            "tokens_per_minute, priority.",
        )
    entries = [_entry(path, index, item) for index, item in enumerate(items, 1)]
    if mode & _READABLE_BY_OTHERS and any(not _DIGEST.fullmatch(entry.key.get_secret_value()) for entry in entries):
        logger.warning("%s holds keys, and others may read it: chmod 600, or write them as sha256:…", path)
    return entries


def _entry(path: Path, index: int, item: Any) -> KeyEntry:
    fields: Mapping[str, Any] | Any = {"name": f"file-{index}", "key": item} if isinstance(item, str) else item
    try:
        return KeyEntry.model_validate(fields)
    except ValidationError as error:
        parts = error.errors(include_input=False)
        if any(part["loc"] == ("key",) and part["type"] == "missing" for part in parts):  # `- KEY: alice`
            parts = [part for part in parts if part["type"] != "extra_forbidden"]
        reasons = [f"{'.'.join(map(str, part['loc'])) or 'it'}: {expectation(part).rstrip('.')}" for part in parts]
        raise ConfigError(f"server.api_keys_file {str(path)!r}, entry {index}: {'; '.join(reasons)}.") from None
