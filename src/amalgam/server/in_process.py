"""The application without a port: requests are calls, in the event loop of whoever asks.

In: a deployment, requests. Out: the messages of answers. Must never know: what an endpoint does, who asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.types import Message, Scope, Send

from amalgam.config.settings import Settings
from amalgam.errors import UnavailableError
from amalgam.server.app import create_app
from amalgam.server.interface import Deployment
from amalgam.server.service import Service

# Of the section `server`: what concerns answers. Keys, limits, addresses and traces are for requests from outside.
_KEPT = (
    "chat_template", "embedding_pooling", "max_batch_prompts", "max_body_bytes", "max_workers", "reasoning_parser",
    "served_model_names", "tool_parser",
)  # fmt: skip
_POLL_SECONDS = 0.01


class InProcessServer:
    """The application over a deployment. To be used in one event loop.

    Args:
        kept: what else of the section `server` holds.
    """

    def __init__(self, deployment: Deployment, settings: Settings, kept: Sequence[str] = ()) -> None:
        server = {name: getattr(settings.server, name) for name in (*_KEPT, *kept)}
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

    async def _ask(self, scope: Scope, body: bytes, send: Send) -> None:
        """Have a request answered. Cancelling the caller cancels it.

        Args:
            scope: see `scope_of`.
            send: given each message of the answer.

        Raises:
            UnavailableError: the answer has ended before its last part, of which the log has the cause.
        """
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        is_whole = False

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()  # the client stays, or the task is cancelled
            raise AssertionError

        async def send_and_note(message: Message) -> None:
            nonlocal is_whole
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        await self._app(scope, receive, send_and_note)
        if not is_whole:
            raise UnavailableError("The answer has ended before its last part.", remedy="The log has the cause.")


def scope_of(method: str, path: str, headers: Sequence[tuple[bytes, bytes]], query: bytes = b"") -> Scope:
    """ASGI's description of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query,
        "headers": list(headers),
        "client": None,
        "server": None,
    }
