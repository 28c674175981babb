"""A server that answers as a script says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

MODELS = {"object": "list", "data": [{"id": "scripted", "object": "model"}]}


def chunked(parts: Sequence[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def head(status: str = "200 OK", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


STREAM_HEAD = head("200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked")


def events(num_tokens: int, prompt_tokens: int, *, chat: bool = False, usage: bool = True) -> list[bytes]:
    """The stream of an answer: a token in each event, then the counts."""
    pieces = [{"delta": {"content": "a"}} if chat else {"text": "a"} for _ in range(num_tokens)]
    ending = {"delta": {}} if chat else {"text": ""}
    bodies: list[dict[str, Any]] = [{"choices": [{"index": 0, **piece}]} for piece in pieces]
    bodies.append({"choices": [{"index": 0, **ending, "finish_reason": "length"}]})
    if usage:
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}
        bodies.append({"choices": [], "usage": counts})
    return [b"data: %b\n\n" % json.dumps(body).encode() for body in bodies] + [b"data: [DONE]\n\n"]


@dataclass
class Script:
    """What the server does, and what it was asked.

    Attributes:
        answer: a request's number (from 0, models left out) and body → the bytes of the answer; None: cut it off.
        stops_at: the request at which the server goes away.
    """

    answer: Callable[[int, dict[str, Any]], bytes | None]
    stops_at: int | None = None
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    num_connections: int = 0

    async def serve(self, stop: Callable[[], None]) -> Callable[..., Awaitable[None]]:
        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.num_connections += 1
            try:
                while True:
                    await self._one(reader, writer, stop)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        return take

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: Callable[[], None]) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        path = first.split()[1]
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
        if path.endswith("/models"):
            content = json.dumps(MODELS).encode()
            writer.write(head("200 OK", f"Content-Length: {len(content)}") + content)
            return
        number = len(self.requests)
        self.requests.append((path, headers, body))
        if number == self.stops_at:
            stop()
        answer = None if self.stops_at is not None and number >= self.stops_at else self.answer(number, body)
        if answer is None:
            writer.write(STREAM_HEAD + chunked(events(2, 1)[:1]))
            await writer.drain()
            raise ConnectionError
        writer.write(answer)


def whole(number: int, body: dict[str, Any]) -> bytes:
    """A good answer; a prompt has two tokens for each word, and one more."""
    chat = "messages" in body
    text = body["messages"][-1]["content"] if chat else body["prompt"]
    parts = events(body.get("max_tokens", 3), 1 + 2 * len(text.split()), chat=chat, usage="stream_options" in body)
    return STREAM_HEAD + chunked(parts) + b"0\r\n\r\n"


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """The server in a thread; its address."""
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Server:
        listening: list[asyncio.Server] = []
        take = await script.serve(lambda: listening[0].close())
        listening.append(await asyncio.start_server(take, "127.0.0.1", 0))
        return listening[0]

    server = loop.run_until_complete(start())
    port = server.sockets[0].getsockname()[1]
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
