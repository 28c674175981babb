"""The server's endpoints without a port: requests of this process, answered exactly as over HTTP.

In: a deployment, bodies. Out: statuses and JSON. Must never know: what an endpoint does, where requests come from.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.types import Message, Scope

from amalgam.config.settings import Settings
from amalgam.server.api.summaries import SummarizeAnswer, SummarizeBody, Watch, summary_of
from amalgam.server.app import create_app
from amalgam.server.interface import Deployment
from amalgam.server.service import Service

# Of the section `server`: what concerns answers. Keys, limits, addresses and traces are for requests from outside.
_KEPT = (
    "chat_template", "embedding_pooling", "max_batch_prompts", "max_body_bytes", "max_workers", "reasoning_parser",
    "served_model_names", "tool_parser",
)  # fmt: skip
_POLL_SECONDS = 0.01


class LocalServer:
    """The application, asked by calls. To be used in one event loop; the deployment is the caller's to close."""

    def __init__(self, deployment: Deployment, settings: Settings) -> None:
        server = {name: getattr(settings.server, name) for name in _KEPT}
        self._service = Service(settings.replace(server=server), lambda: deployment)
        self._app = create_app(self._service)

    async def start(self) -> None:
        """To be awaited before the first request."""
        self._service.start()
        while not self._service.has_loaded:  # noqa: ASYNC110 – a thread tells
            await asyncio.sleep(_POLL_SECONDS)

    @property
    def failure(self) -> Exception | None:
        """Why nothing is answered any more."""
        return self._service.failure

    @property
    def max_in_flight(self) -> int:
        """How many requests at a time keep the engine busy, and leave room in its queue for their samples."""
        return self._service.max_batch_in_flight

    async def post(self, path: str, body: Mapping[str, Any], request_id: str = "") -> tuple[int, Any]:
        """The status and the JSON that a POST is answered with. Cancelling the caller cancels the request.

        Args:
            request_id: as `X-Request-ID` has it.
        """
        # Takes integers of any size, which the endpoint refuses; and is no longer than the line that it came from.
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
        headers: Sequence[tuple[bytes, bytes]] = [
            (b"content-type", b"application/json"),
            (b"x-request-id", request_id.encode("ascii", "replace")),
        ]
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": None,
            "server": None,
        }
        messages: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
        parts: list[bytes] = []
        status = 0

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()  # the client stays
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self._app(scope, receive, send)
        return status, orjson.loads(b"".join(parts))

    async def summarize(self, body: SummarizeBody, watch: Watch) -> SummarizeAnswer:
        """What `POST /summarize` answers, of any number of chunks.

        Args:
            watch: is told how many of the prompts known of so far have been answered.
        """
        return await summary_of(self._service, body, watch=watch)
