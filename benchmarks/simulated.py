"""A server whose times are known, to hold load generators against: OpenAI's `/v1/completions` with nothing behind it.

    python benchmarks/simulated.py --port 8090 --first-ms 50 --gap-ms 10 --slots 8

An answer takes a slot; when it has one, its first token comes after `--first-ms` and each further one `--gap-ms` later.
Whoever finds all slots taken waits in the order of arrival, so answers of n tokens saturate it at
slots / (first + (n - 1) * gap) requests a second. `usage` counts words of the prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "simulated"


@dataclass
class Simulated:
    """
    Args:
        first, gap: seconds.
    """

    first: float
    gap: float
    slots: asyncio.Semaphore

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": MODEL}]})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        prompt = body["prompt"] if isinstance(body["prompt"], str) else " ".join(body["prompt"])
        num_tokens = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
        usage = {
            "prompt_tokens": len(prompt.split()),
            "completion_tokens": num_tokens,
            "total_tokens": len(prompt.split()) + num_tokens,
        }
        if not body.get("stream"):
            async with self.slots:
                await asyncio.sleep(self.first + (num_tokens - 1) * self.gap)
            choice = {"index": 0, "text": " w" * num_tokens, "finish_reason": "length"}
            return JSONResponse(
                {"id": "s", "object": "text_completion", "model": MODEL, "choices": [choice], "usage": usage}
            )
        wants_usage = (body.get("stream_options") or {}).get("include_usage", False)
        return StreamingResponse(
            self._events(num_tokens, usage if wants_usage else None), media_type="text/event-stream"
        )

    async def _events(self, num_tokens: int, usage: dict[str, int] | None) -> AsyncIterator[bytes]:
        head = {"id": "s", "object": "text_completion", "model": MODEL}
        async with self.slots:
            due = time.perf_counter() + self.first
            for index in range(num_tokens):
                await asyncio.sleep(due - time.perf_counter())
                due += self.gap  # by the clock, so that delays do not add up
                last = index + 1 == num_tokens
                choice = {"index": 0, "text": " w", "finish_reason": "length" if last else None}
                yield _event({**head, "choices": [choice]})
        if usage is not None:
            yield _event({**head, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"


def _event(data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--first-ms", type=float, default=50.0)
    parser.add_argument("--gap-ms", type=float, default=10.0)
    parser.add_argument("--slots", type=int, default=8, help="answers at a time")
    arguments = parser.parse_args()
    simulated = Simulated(arguments.first_ms / 1e3, arguments.gap_ms / 1e3, asyncio.Semaphore(arguments.slots))
    uvicorn.run(simulated.application(), host="127.0.0.1", port=arguments.port, log_level="warning", http="h11")


if __name__ == "__main__":
    main()
