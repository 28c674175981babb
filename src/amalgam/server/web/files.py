"""Files of pages, from the package, under headers that let nothing else in.

In: a package with a folder `static`. Out: its files, and those that all pages share, as answers. Only the names found
at the first request exist; a path is never opened. Must never know: which pages there are.

The shared files are served beside a page's own, so that modules name each other by `./name.js` wherever they lie. What
differs from page to page has the same name in each: `i18n.js` reads the page's `words.js`.

A page names its files under a digest of them all, `static/0123456789ab/name.js`, and modules find each other below it.
Such an address means one content for ever, so that browsers ask for no file twice. Without the digest, or under that of
another installation (a page was loaded from another replica), there is the same file, which is asked for each time.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import importlib.resources
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath

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
KEPT = {"Cache-Control": "max-age=31536000, immutable"}
PAGE = "index.html"
_DIGEST = re.compile(r"[0-9a-f]{12}")
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


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

    def response(self, request: Request, vary: str = "Accept-Encoding", *, is_kept: bool = False) -> Response:
        """The file, or 304 if the client has it.

        Args:
            is_kept: its address will never mean anything else.
        """
        headers = {**HEADERS, **(KEPT if is_kept else {}), "ETag": self.etag, "Vary": vary}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self.content, headers=headers, media_type=self.media_type)
        return Response(self.compressed, headers={**headers, "Content-Encoding": "gzip"}, media_type=self.media_type)


def read_files(package: str) -> dict[str, PageFile]:
    """Name below `static/` → file, of a page's package and of all pages."""
    found: dict[str, PageFile] = {}

    def collect(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            name = prefix + entry.name
            if entry.is_dir():
                collect(entry, f"{name}/")
            elif media_type := MEDIA_TYPES.get(PurePosixPath(entry.name).suffix):
                assert name not in found, f"{name} exists twice"
                found[name] = PageFile(entry.read_bytes(), media_type)

    for owner in (package, __package__):
        collect(importlib.resources.files(owner).joinpath("static"), "")
    return found


def digest_of(files: Mapping[str, PageFile]) -> str:
    """Of the names and contents of all files."""
    whole = "".join(f"{name}{file.etag}" for name, file in sorted(files.items()))
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


@lru_cache(8)
def _naming(page: PageFile, digest: str) -> PageFile:
    """The page with the digest in the addresses of its files."""
    content = re.sub(rb'((?:href|src)="(?:\w+/)*static/)', rb"\g<1>" + digest.encode() + b"/", page.content)
    return replace(page, content=content)


async def file_response(
    files: Callable[[], Mapping[str, PageFile]], name: str, request: Request, vary: str = "Accept-Encoding"
) -> Response:
    """The file of that name, which may begin with a digest. `files` may read them first, in a thread.

    Raises:
        HTTPException: 404.
    """

    def respond() -> Response:
        known = files()
        digest = digest_of(known)
        asked, slash, rest = name.partition("/")
        found = known.get(rest if slash and _DIGEST.fullmatch(asked) else name)
        if found is None:
            raise HTTPException(404)
        if found.media_type == MEDIA_TYPES[".html"]:
            return _naming(found, digest).response(request, vary)
        return found.response(request, vary, is_kept=asked == digest)

    return await asyncio.to_thread(respond)
