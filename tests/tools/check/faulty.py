"""A small server that speaks OpenAI's interface well, but for the faults that it is told to have."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

KEY, ADMIN_KEY = "sk-user-0123456789", "sk-admin-0123456789"
FORBIDDEN = "purple walrus"
RULE = {"pattern": "model.layers.0.*", "source": "base"}
CONTEXT = 2000
MAX_BODY = 100_000
_WORDS = ("sea", "wind", "ship", "iron", "bread", "star", "horse", "garden", "clock", "letter")
_SPECIAL = re.compile(r"<\|\w+\|>|</s>|<eos>|<end_of_turn>")
_UNIT = re.compile(r"<\|\w+\|>|[A-Za-z]{1,4}|\d|\S")
_TOKEN_SECONDS = 0.001


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


@dataclass
class Server:
    """
    Attributes:
        faults: names; empty: none.
        log: file with a line for each request.
    """

    faults: frozenset[str]
    log: Path
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    prompts: list[str] = field(default_factory=list)  # under way
    is_draining: bool = False
    ids: Iterator[int] = field(default_factory=itertools.count)
    requests: Iterator[int] = field(default_factory=itertools.count)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    is_broken: bool = False

    def __post_init__(self) -> None:
        def metric(kind: Any, name: str, *labels: str) -> Any:
            return kind(f"tiny_{name}", name, labels, registry=self.registry)

        self.running = metric(Gauge, "requests_running")
        self.tokens = metric(Counter, "generated_tokens")
        self.asked = metric(Counter, "user_requests", "user")
        if "few_metrics" not in self.faults:
            metric(Gauge, "requests_waiting")
            metric(Counter, "requests_finished")
            metric(Counter, "requests_refused")
            for name in ("first_token_seconds", "request_seconds", "per_token_seconds"):
                metric(Histogram, name)

    def has(self, fault: str) -> bool:
        return fault in self.faults

    def note(self, line: str) -> None:
        with self.log.open("a") as file:
            file.write(line + "\n")

    def count(self, text: str) -> int:
        """Tokens of a prompt; a control token is one only where users' are obeyed."""
        if not self.has("obeys_tokens"):
            return len(re.findall(r"[A-Za-z]{1,4}|\d|\S", text)) + 3
        return len(_UNIT.findall(_SPECIAL.sub("<|x|>", text))) + 3

    def answer(self, prompt: str, num_tokens: int, body: dict[str, Any]) -> list[str]:
        """The tokens of an answer, which hang on the prompt alone."""
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
        if schema:
            said = schema["properties"]["said"]["enum"][0]
            return ['{"said": "', *re.findall(r"\w+|\W", said), '"}']
        seed = hashlib.sha256(f"{prompt} {body.get('seed')}".encode()).digest()
        chances = random.Random(None if self.has("random") else seed)
        return [f"{chances.choice(_WORDS)} " for _ in range(num_tokens)]

    def filtered(self, tokens: list[str], *, is_stream: bool) -> tuple[list[str], str]:
        text = "".join(tokens)
        is_open = self.has("unfiltered") or (is_stream and self.has("unfiltered_streams"))
        return (tokens, "length") if is_open or FORBIDDEN not in text else (["[removed]"], "content_filter")


def make_app(server: Server) -> FastAPI:
    app = FastAPI(openapi_url=None)
    has = server.has
    codes: dict[str, None] = {}
    mixed: dict[str, str] = {}
    together: asyncio.Barrier | None = None

    def guard(request: Request, key: str = KEY) -> None:
        if server.is_draining:
            raise RefusedError(503, "The server is draining.")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if has("leaks_key"):
            server.note(f"key {given}")
        if has("no_key") or (has("any_key") and given):
            return
        if given not in (key, ADMIN_KEY):
            raise RefusedError(403 if given == KEY else 401, "The key is wrong.")

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, refusal: RefusedError) -> Response:
        if has("no_error_object"):
            return PlainTextResponse(refusal.message, refusal.status)
        return JSONResponse({"error": {"message": refusal.message, "type": "refused"}}, refusal.status)

    if not has("no_health"):

        @app.get("/health")
        async def health() -> str:
            if has("slow_health") and server.prompts:
                await asyncio.sleep(0.4)
            return "ok"

    if not has("no_ready"):

        @app.get("/ready")
        async def ready() -> str:
            if server.is_draining:
                raise RefusedError(503, "The server is draining.")
            return "ok"

    @app.get("/metrics")
    async def metrics() -> Response:
        if has("broken_metrics"):
            return PlainTextResponse("tiny_requests{ 3")
        return Response(generate_latest(server.registry), media_type="text/plain; version=0.0.4")

    @app.get("/api/v1/{what}")
    async def prometheus(what: str, request: Request) -> dict[str, Any]:
        """As a Prometheus answers that reads this server, and has an alert of each kind."""
        if what == "targets":
            port = 1 if has("unscraped") else request.url.port
            return {"data": {"activeTargets": [{"scrapeUrl": f"http://tiny:{port}/metrics", "health": "up"}]}}
        queries = (
            "tiny_request_seconds_sum > 3",
            "tiny_requests_refused_total > 1",
            "up == 0",
            "node_memory_bytes < 1",
        )
        rules = [{"name": f"Alert{i}", "query": query, "type": "alerting"} for i, query in enumerate(queries)]
        rules[0] |= {"health": "err", "lastError": "no such function"} if has("sick_rules") else {"health": "ok"}
        return {"data": {"groups": [{"rules": rules}]}}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        guard(request)
        headers = {}
        if has("any_origin"):
            headers = {"access-control-allow-origin": "*"}
        owner = {"owned_by": "amalgam"} if has("ours") else {}
        return JSONResponse({"data": [{"id": "tiny", "max_model_len": CONTEXT, **owner}]}, headers=headers)

    if has("ours"):

        @app.get("/model_info")
        async def model_info(request: Request) -> dict[str, Any]:
            guard(request)
            return {"rules": [RULE], "weight_version": {"version": 2}}

        @app.get("/remaps")
        async def remaps(request: Request) -> dict[str, Any]:
            guard(request, ADMIN_KEY)
            return {"remaps": [{"version": 2, "ok": True}]}

    @app.get("/serving")
    async def serving(request: Request) -> dict[str, int]:
        guard(request, KEY if has("open_administration") else ADMIN_KEY)
        return {"requests": len(server.prompts)}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        guard(request)
        if has("tight_rate") and next(server.requests) % 2:
            return JSONResponse({"error": {"message": "Too many."}}, 429, {"retry-after": "0"})
        content = await request.body()
        if len(content) > MAX_BODY and not has("any_body"):
            server.is_broken = has("breaks")
            raise RefusedError(413, "The body is too large.")
        try:
            return await reply(content)
        except RefusedError:
            raise
        except Exception:
            if has("stack_traces"):
                return PlainTextResponse(traceback.format_exc(), 500)
            raise RefusedError(400, "The request is wrong.") from None

    async def reply(content: bytes) -> Response:
        if server.is_broken:
            raise RefusedError(500, "out of memory")
        if has("logs_bodies"):
            server.note(content.decode(errors="replace"))
        body = json.loads(content)
        prompt = str(body["messages"][-1]["content"]) if isinstance(body["messages"][-1], dict) else body[0]
        if not isinstance(body.get("temperature", 0), int | float):
            raise RefusedError(400, "temperature is no number.")
        num_tokens = body["max_tokens"] + 0
        if num_tokens < 1:
            raise RefusedError(500 if has("fails_on_zero") else 400, "max_tokens is too small.")
        if FORBIDDEN in prompt and not has("unfiltered"):
            raise RefusedError(400, "The prompt is blocked.")
        num_prompt_tokens = server.count(prompt)
        if num_prompt_tokens > CONTEXT:
            if has("fails_on_long"):
                raise RefusedError(500, "out of memory")
            if not has("cuts_prompts"):
                raise RefusedError(400, "The prompt is too long.")
            num_prompt_tokens = CONTEXT
        if has("flaky") and body.get("ignore_eos") and num_tokens == 12 and next(server.ids) % 3 == 0:
            raise RefusedError(500, "by chance")
        if has("labels_users") and "user" in body:
            server.asked.labels(body["user"]).inc()
        server.note(f"POST {num_prompt_tokens} tokens")
        num_tokens = min(num_tokens, CONTEXT)
        if has("mixes") and prompt.startswith("Code "):
            await mix_up(prompt)
        source = mixed.pop(prompt, prompt)
        tokens = server.answer(source, num_tokens, body)
        tokens, reason = server.filtered(tokens, is_stream=bool(body.get("stream")))
        num_new = len(tokens) + 3 * has("counts_wrong")
        usage = {
            "prompt_tokens": num_prompt_tokens, "completion_tokens": num_new,
            "total_tokens": num_prompt_tokens + num_new,
        }  # fmt: skip
        id_ = "same" if has("same_ids") else f"id-{next(server.ids)}"
        headers = {} if has("no_rate") else {"x-ratelimit-limit-requests": "10000"}
        making = produce(prompt, tokens)
        if body.get("stream"):
            events = stream(making, tokens, reason, usage, id_)
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        async for _ in making:
            pass
        message = {"role": "assistant", "content": "".join(tokens)}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return JSONResponse({"id": id_, "choices": [choice], "usage": usage}, headers=headers)

    async def mix_up(prompt: str) -> None:
        """Each has been asked alone before all are asked at a time."""
        nonlocal together
        if prompt not in codes or len(codes) == 1:
            codes.setdefault(prompt)
            return
        together = together or asyncio.Barrier(len(codes))
        await together.wait()
        others = list(codes)
        mixed[prompt] = others[others.index(prompt) - 1]

    async def produce(prompt: str, tokens: list[str]) -> AsyncIterator[str]:
        server.prompts.append(prompt)
        server.running.inc()
        try:
            await asyncio.sleep(0.3 if has("slow") else 0.005)
            for token in tokens:
                if not has("stuck_metrics"):
                    server.tokens.inc()
                await asyncio.sleep(_TOKEN_SECONDS)
                yield token
        finally:
            if has("computes_on") and len(tokens) > 100:
                task = asyncio.create_task(asyncio.sleep(60))
                server.tasks.add(task)
                task.add_done_callback(lambda _: server.running.dec())
            else:
                server.running.dec()
            server.prompts.remove(prompt)

    async def stream(
        making: AsyncIterator[str], tokens: list[str], reason: str, usage: dict[str, int], id_: str
    ) -> AsyncIterator[bytes]:
        def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
            return b"data: " + json.dumps({"id": id_, "choices": choices, **more}).encode() + b"\n\n"

        def piece(text: str) -> dict[str, Any]:
            return {"index": 0, "delta": {"content": text}}

        async for token in making:
            if not has("one_event"):
                yield event([piece(token)])
        if has("one_event"):
            yield event([piece("".join(tokens))])
        yield event([{"index": 0, "delta": {}, "finish_reason": reason}])
        yield event([], usage=usage)
        if not has("cut_streams"):
            yield b"data: [DONE]\n\n"

    return app


@contextmanager
def serving(log: Path, *faults: str) -> Iterator[str]:
    """The server in a thread; its address."""
    with _running(log, *faults) as (url, _):
        yield url


@contextmanager
def _running(log: Path, *faults: str, waits: bool = False) -> Iterator[tuple[str, Server]]:
    """
    Args:
        waits: at the end until the last bytes have left.
    """
    log.touch()
    state = Server(frozenset(faults), log)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(make_app(state), log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            _wait(lambda: server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", state
        finally:
            server.should_exit, server.force_exit = True, not waits
            thread.join(60)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def main() -> None:
    """A process of its own, which drains at SIGTERM: it prints its address."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    log, *faults = sys.argv[1:]
    with _running(Path(log), *faults, waits=True) as (url, server):
        print(url, flush=True)
        signal.sigwait({signal.SIGTERM})
        if "ends_at_once" in faults:
            os._exit(3)
        server.is_draining = "takes_all" not in faults
        _wait(lambda: not server.prompts)


if __name__ == "__main__":
    main()
