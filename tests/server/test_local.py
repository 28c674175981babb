"""Requests of this process get what they would get over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from amalgam.errors import UnavailableError
from amalgam.server.local import LocalServer
from tests.errors import raises
from tests.server.fakes import BreakingOff, FakeDeployment, fake_settings


def ask(path: str, body: dict[str, Any], deployment: FakeDeployment | None = None, **server: Any) -> tuple[int, Any]:
    async def run() -> tuple[int, Any]:
        local = LocalServer(deployment or FakeDeployment(), fake_settings(**server))
        await local.start()
        return await local.post(path, body)

    return asyncio.run(run())


def test_settings_that_change_answers_hold() -> None:
    for pooling, last in (("mean", 0), ("last", ord("c"))):
        status, answer = ask("/v1/embeddings", {"input": "abc", "normalize": False}, embedding_pooling=pooling)
        assert status == 200 and answer["data"][0]["embedding"][1] == last
    assert ask("/v1/embeddings", {"input": "abc"}, served_model_names=["mine"])[1]["model"] == "mine"


def test_a_body_is_no_longer_than_the_line_that_it_comes_from() -> None:
    """Or a line would be refused that the limit allows."""
    for count, status in ((330, 200), (340, 413)):
        assert ask("/tokenize", {"prompt": "月" * count}, max_body_bytes=1024)[0] == status


def test_half_an_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amalgam.server.in_process.create_app", lambda service: BreakingOff())
    with raises(UnavailableError):
        ask("/tokenize", {"prompt": "abc"})


def test_a_document_that_is_refused_is_not_read() -> None:
    deployment = FakeDeployment(tokenizer_override=object())
    deployment.engine.num_waiting = 10**6
    sizes = {"chunk_tokens": 20, "overlap_tokens": 2, "max_summary_tokens": 8}
    status, answer = ask("/summarize", {"text": "abc", **sizes}, deployment)
    assert (status, answer["error"]["type"]) == (503, "overloaded")
