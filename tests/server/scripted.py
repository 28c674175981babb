"""A server whose chat answers as the test has written it, in the shapes that OpenAI publishes for its streams.

In: scripts by message. Out: events. The page and all else are the real server's, with a fake model.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from amalgam.server import create_app
from amalgam.server.http.lifecycle import DrainingServer, listen, url_of
from amalgam.server.service import Service
from tests.server.conftest import wait_until_ready
from tests.server.fakes import FakeDeployment, fake_settings

NUM_LAYERS, NUM_EXPERTS, TOP_K = 6, 16, 4
FORMATS = {"bf16": 16.0, "fp8": 8.5, "int4": 4.5}


@dataclass
class Script:
    """One answer.

    Attributes:
        deltas: of the events: texts, or whole `delta` objects.
        is_held: waits before the last delta until the model is released.
        status: an error's instead of an answer, with `message`.
        breaks_off: the connection ends without a finish reason.
        error: an error's message in the midst of the stream.
        weight_version: that answers.
        tokens_per_delta: how many tokens each delta has.
        is_cut: the connection is lost after the deltas.
    """

    deltas: Sequence[str | Mapping[str, Any]] = ()
    finish: str = "stop"
    is_held: bool = False
    status: int = 200
    message: str = ""
    retry_after: int | None = None
    breaks_off: bool = False
    error: str = ""
    seconds: float = 0.0
    num_prompt_tokens: int = 12
    weight_version: int = 1
    tokens_per_delta: int = 1
    is_cut: bool = False


@dataclass
class ScriptedModel:
    """Scripts by the last message's text; what has none is said back.

    Attributes:
        requests: bodies and headers, in order.
        key: the API key that requests need, if any.
        num_left: answers whose client left before their end.
        counts_experts: whether the routing of answers is told, if there are experts.
        formats: weight version → the formats of expert 0, 1, 2 and so on, in turn; those that are in memory.
        asked: weight versions whose formats have been asked for.
    """

    scripts: dict[str, list[Script]] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    has_chat_template: bool = True
    key: str = ""
    is_released: threading.Event = field(default_factory=threading.Event)
    num_left: int = 0
    num_experts: int = NUM_EXPERTS
    counts_experts: bool = True
    formats: dict[int, tuple[str, ...]] = field(default_factory=lambda: {1: tuple(FORMATS)})
    asked: set[int] = field(default_factory=set)

    def script(self, text: str) -> Script:
        """The next script of a message; its last one stays."""
        scripts = self.scripts.get(text)
        if not scripts:
            return Script([f"You said: {text}"])
        return scripts.pop(0) if len(scripts) > 1 else scripts[0]

    def has_lost(self, num_clients: int) -> bool:
        return self.num_left == num_clients

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/experts/precision_map", self._precision_map),
            Route("/model_info", self._model_info),
        ]

    def _refusal(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        error = {"message": "The request has no key that is known here.", "type": "invalid_request_error"}
        return JSONResponse({"error": error}, 401)

    async def _models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"object": "list", "data": [{"id": "scripted"}]})

    async def _model_info(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        return JSONResponse(
            {
                "sizes": {"layers": NUM_LAYERS, "experts_per_layer": self.num_experts},
                "precisions": {
                    name: {"parameters": 1000, "weights": 1, "bytes": 125 * bits} for name, bits in FORMATS.items()
                },
                "sampling_defaults": {
                    "temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.0, "max_new_tokens": 512,
                    "from_model": ["temperature"],
                },
                "weight_version": {"version": 1},
                "has_chat_template": self.has_chat_template,
                "counts_experts": self.num_experts > 0 and self.counts_experts,
            }
        )  # fmt: skip

    async def _precision_map(self, request: Request) -> Response:
        version = int(request.query_params["weight_version"])
        if version not in self.formats:
            return JSONResponse({"error": {"message": "It is not in memory.", "type": "version_not_found"}}, 404)
        formats = self.formats[version]
        self.asked.add(version)
        names = [
            [formats[(layer + expert) % len(formats)] for expert in range(NUM_EXPERTS)] for layer in range(NUM_LAYERS)
        ]
        names[0][1] = "mixed"
        return self._refusal(request) or JSONResponse(
            {
                "weight_version": version,
                "layer_ids": list(range(1, NUM_LAYERS + 1)),
                "num_experts": NUM_EXPERTS,
                "formats": [
                    [["int4", "int4", "bf16"] if name == "mixed" else [name] * 3 for name in row] for row in names
                ],
                "bits": [[FORMATS.get(name, 8.0) for name in row] for row in names],
            }
        )

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, lambda body: body["messages"][-1]["content"], "chat.completion.chunk")

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, lambda body: body["prompt"], "text_completion")

    async def _answer(self, request: Request, text_of: Any, kind: str) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = json.loads(await request.body())
        self.requests.append(body)
        if body.get("routed_experts") and not self.counts_experts:
            return JSONResponse({"error": {"message": "Expert statistics are not kept.", "type": "unsupported"}}, 400)
        script = self.script(text_of(body))
        if script.status != 200:
            headers = {} if script.retry_after is None else {"Retry-After": str(script.retry_after)}
            return JSONResponse({"error": {"message": script.message, "type": "x"}}, script.status, headers)
        return StreamingResponse(self._events(script, kind, body), media_type="text/event-stream")

    async def _events(self, script: Script, kind: str, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        def event(**fields: Any) -> bytes:
            fingerprint = f"amalgam-0-weights-{script.weight_version}"
            head = {"id": "x", "object": kind, "model": "scripted", "system_fingerprint": fingerprint}
            if body["stream_options"].get("continuous_usage_stats"):
                fields = {"usage": usage, **fields}
            return f"data: {json.dumps({**head, **fields})}\n\n".encode()

        usage = {
            "prompt_tokens": script.num_prompt_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 8},
        }
        is_chat = kind == "chat.completion.chunk"
        is_complete = False
        try:
            if is_chat:
                yield event(
                    choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
                )
            for index, delta in enumerate(script.deltas):
                if script.is_held and index == len(script.deltas) - 1:
                    while not self.is_released.is_set():  # noqa: ASYNC110 – set by the test, in another thread
                        await asyncio.sleep(0.01)
                await asyncio.sleep(script.seconds)
                piece = {"content": delta} if isinstance(delta, str) else dict(delta)
                usage["completion_tokens"] = (index + 1) * script.tokens_per_delta
                part: dict[str, Any] = {"delta": piece} if is_chat else {"text": piece["content"]}
                yield event(choices=[{"index": 0, **part, "finish_reason": None}])
            if script.is_cut:
                raise ConnectionError("as a server that is killed")
            if script.error:
                yield f"data: {json.dumps({'error': {'message': script.error, 'type': 'server_error'}})}\n\n".encode()
            elif not script.breaks_off:
                last: dict[str, Any] = {"index": 0, "finish_reason": script.finish}
                last["delta" if is_chat else "text"] = {} if is_chat else ""
                if body.get("routed_experts"):
                    last["routed_experts"] = routing(script.num_prompt_tokens + len(script.deltas) - 1)
                yield event(choices=[last])
                yield event(choices=[], usage=usage)
                yield b"data: [DONE]\n\n"
            is_complete = True
        finally:
            self.num_left += not is_complete


def routed(num_tokens: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """`[tokens, layers, top_k]`: token i goes to experts i % 5, 5, 7 + layer and 15."""
    rows = [[[token % 5, 5, 7 + layer, 15] for layer in range(NUM_LAYERS)] for token in range(num_tokens)]
    return np.array(rows, np.int16)


def routing(num_tokens: int) -> str:
    file = io.BytesIO()
    np.save(file, routed(num_tokens))
    return base64.b64encode(file.getvalue()).decode()


@contextmanager
def serving_scripts(model: ScriptedModel) -> Iterator[str]:
    """A server in a thread; yields its base URL."""
    settings = fake_settings(port=0)
    listeners = listen(settings.server)
    service = Service(settings, cast("Callable[[], Any]", FakeDeployment))
    app = create_app(service)
    app.router.routes[:0] = model.routes()
    server = DrainingServer(app, service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": listeners})
    thread.start()
    try:
        url = url_of(listeners[0], settings.server.host)
        wait_until_ready(url)
        yield url
    finally:
        model.is_released.set()
        server.config.timeout_graceful_shutdown = 0
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
