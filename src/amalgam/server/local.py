"""The server's endpoints without a port: requests of this process, answered exactly as over HTTP.

In: a deployment, bodies. Out: statuses and JSON. Must never know: what an endpoint does, where requests come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import Message

from amalgam.server.api.summaries import SummarizeAnswer, SummarizeBody, Watch, summary_of
from amalgam.server.in_process import InProcessServer, scope_of


class LocalServer(InProcessServer):
    """The application, asked by calls. To be used in one event loop; the deployment is the caller's to close."""

    @property
    def max_in_flight(self) -> int:
        """How many requests at a time keep the engine busy, and leave room in its queue for their samples."""
        return self._service.max_batch_in_flight

    async def post(self, path: str, body: Mapping[str, Any], request_id: str = "") -> tuple[int, Any]:
        """The status and the JSON that a POST is answered with. Cancelling the caller cancels the request.

        Args:
            request_id: as `X-Request-ID` has it.

        Raises:
            UnavailableError: the answer has ended before its last part.
        """
        # Takes integers of any size, which the endpoint refuses; and is no longer than the line that it came from.
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
        headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode("ascii", "replace"))]
        parts: list[bytes] = []
        status = 0

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self._ask(scope_of("POST", path, headers), content, send)
        return status, orjson.loads(b"".join(parts))

    async def summarize(self, body: SummarizeBody, watch: Watch) -> SummarizeAnswer:
        """What `POST /summarize` answers, of any number of chunks.

        Args:
            watch: is told how many of the prompts known of so far have been answered.
        """
        return await summary_of(self._service, body, watch=watch)
