"""Request bodies: what each has to be like, whatever its fields mean."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from amalgam.server import app  # which knows all bodies there are
from amalgam.server.api.anthropic.fields import MessagesBody
from amalgam.server.api.common import MAX_CALLS, MAX_PARTS
from amalgam.server.api.generate import GenerateBody
from amalgam.server.api.openai.chat import ChatBody
from amalgam.server.api.openai.responses import ResponseBody
from amalgam.server.http import body as module
from amalgam.server.http.body import MAX_JSON_KEYS, Body
from tests.server.conftest import wait_until
from tests.server.fakes import FakeDeployment


def bodies(kind: type[Body]) -> Iterator[type[Body]]:
    for derived in kind.__subclasses__():
        yield derived
        yield from bodies(derived)


def lists(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every list in a schema of pydantic's core, and where it stands."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield path, schema
        for name, part in schema.items():
            if name not in ("metadata", "serialization", "json_schema_input_schema"):
                yield from lists(part, f"{path}.{name}")
    elif isinstance(schema, list | tuple):
        for part in schema:
            yield from lists(part, path)


def test_a_long_list_ends_at_its_first_error() -> None:
    """An error for each of a million entries takes minutes, in which nobody else is answered."""
    all_lists = [found for body in set(bodies(Body)) for found in lists(body.__pydantic_core_schema__, body.__name__)]
    assert len(all_lists) > 20
    assert [path for path, schema in all_lists if not schema.get("fail_fast")] == []


@pytest.mark.parametrize(
    ("body", "field"),
    [(GenerateBody, "logit_bias"), (ChatBody, "logit_bias"), (ChatBody, "metadata"), (ResponseBody, "metadata")],
)
def test_a_long_mapping_has_one_error(body: type[Body], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        body.model_validate({field: {f"x{index}": [] for index in range(2000)}})
    assert [error["loc"] for error in caught.value.errors() if error["loc"][0] == field] == [(field,)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (ChatBody, {"content": [{"type": "text", "text": "a"}] * (MAX_PARTS + 1)}),
        (ChatBody, {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}] * (MAX_CALLS + 1)}),
        (MessagesBody, {"content": [{"type": "text", "text": "a"}] * (MAX_PARTS + 1)}),
    ],
)
def test_a_message_has_a_limited_number_of_parts(body: type[Body], message: dict[str, Any]) -> None:
    fields = {"model": "m", "messages": [{"role": "assistant", **message}]}
    with pytest.raises(ValidationError) as caught:
        body.model_validate(fields)
    assert "too_long" in [error["type"] for error in caught.value.errors()]


def test_a_body_has_a_limited_number_of_lists(shared_client: httpx.Client) -> None:
    body = b'{"prompt": [' + b"[]," * MAX_JSON_KEYS + b"[]]}"
    answer = shared_client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, str(MAX_JSON_KEYS) in answer.json()["error"]["message"]) == (400, True)


def test_long_bodies_are_made_in_a_thread_and_mean_the_same(
    client: httpx.Client, deployment: FakeDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "a b", "max_new_tokens": 2, "seed": 3, "stop": ["x" * 100]}
    bad = [{**body, "stop": ["x" * 100, 1]}, {**body, "unknown": "x" * 100}, {**body, "top_p": 2}]
    short = [client.post("/generate", json=fields) for fields in (body, *bad)]
    monkeypatch.setattr(module, "INLINE_BODY_BYTES", 100)
    held, waiting = threading.Event(), threading.Event()

    def parse(raw: bytes, parse_body: Any = module.parse_body) -> Any:
        waiting.set()
        assert held.wait(60)
        return parse_body(raw)

    monkeypatch.setattr(module, "parse_body", parse)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/generate", json=body)
        wait_until(waiting.is_set)
        assert client.get("/health").status_code == 200
        held.set()
        assert answer.result().json()["generated_text"] == short[0].json()["generated_text"]
    for fields, expected in zip(bad, short[1:], strict=True):
        answer = client.post("/generate", json=fields)
        assert (answer.status_code, answer.json()["error"]["message"]) == (422, expected.json()["error"]["message"])


def test_what_has_been_loaded_is_collected_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(gc, "collect", lambda: done.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: done.append("freeze"))
    monkeypatch.setattr(gc, "set_threshold", lambda *counts: done.append(counts))
    deployment = FakeDeployment()
    assert app.settling(lambda: done.append("open") or deployment)() is deployment
    assert done == ["open", "collect", "freeze", (app.YOUNG_OBJECTS, *gc.get_threshold()[1:])]
