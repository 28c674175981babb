"""The log: a line for each request, its forms, and what is never in it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from amalgam.server.http.logs import TEXT, JSONFormatter
from tests.server.conftest import serving, wait_until
from tests.server.fakes import FAIL, FakeDeployment, fake_settings

GENERATE = {"prompt": "my\nprompt", "max_new_tokens": 3}
ATTACKS = [
    "a\nERROR forged", "a\r\nforged", "a\x1b[31mred", "a\u2028b", "a\x85b", "a\x00b", '"}\n{"level": "ERROR"}',
    "é" * 300,
]  # fmt: skip


@contextmanager
def logged(formatter: logging.Formatter, **settings: Any) -> Iterator[tuple[httpx.Client, io.StringIO]]:
    """A server, and what its log would hold."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.getLogger("amalgam.server")
    level = logger.level
    settings = {"log_probes": False, **settings}
    with (
        serving(fake_settings(port=0, **settings), FakeDeployment) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        wait_until(lambda: client.get("/ready").status_code == 200)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield client, stream
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def lines(stream: io.StringIO, count: int) -> list[str]:
    wait_until(lambda: stream.getvalue().count("\n") >= count)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_s_line_as_json(stream: bool) -> None:
    with logged(JSONFormatter(), api_keys="secret-key") as (client, log):
        headers = {"Authorization": "Bearer secret-key", "X-Request-ID": "mine.1:2-3_4"}
        response = client.post("/generate?x=", json={**GENERATE, "stream": stream}, headers=headers)
        assert response.status_code == 422
        response = client.post("/generate", json={**GENERATE, "stream": stream}, headers=headers)
        assert response.headers["x-request-id"] == "mine.1:2-3_4"
        entry = json.loads(lines(log, 2)[1])
    assert 0 < entry.pop("first_token_seconds") <= entry.pop("seconds")
    assert entry.pop("message").startswith("POST /generate 200 ")
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "INFO", "logger": "amalgam.server", "request_id": "mine.1:2-3_4", "method": "POST",
        "path": "/generate", "status": 200, "key": "key-1", "prompt_tokens": 9, "generated_tokens": 3,
        "finish_reason": "length", "weight_version": 1,
    }  # fmt: skip
    assert "secret" not in log.getvalue() and "prompt\\n" not in log.getvalue()


def test_a_request_s_line_for_people() -> None:
    with logged(logging.Formatter(TEXT)) as (client, log):
        request_id = client.post("/generate", json=GENERATE).headers["x-request-id"]
        [line] = lines(log, 1)
    assert " INFO amalgam.server POST /generate 200 " in line
    assert f" ms {request_id} prompt_tokens=9 generated_tokens=3 first_token_seconds=" in line
    assert line.endswith(" finish_reason=length weight_version=1")


def test_a_client_that_left_is_told_with_what_it_had(deployment: FakeDeployment) -> None:
    with logged(JSONFormatter()) as (client, log):
        with client.stream(
            "POST", "/generate", json={"prompt": "a", "max_new_tokens": 10**6, "stream": True}
        ) as answer:
            next(answer.iter_lines())
        [line] = lines(log, 1)
    entry = json.loads(line)
    assert entry["status"] == 499 and entry["prompt_tokens"] == 1 and entry["generated_tokens"] > 0
    assert "finish_reason" not in entry


@pytest.mark.parametrize(("stream", "status"), [(False, 500), (True, 200)])
def test_an_error_s_code_is_told_where_the_status_has_left_too(stream: bool, status: int) -> None:
    with logged(JSONFormatter()) as (client, log):
        client.post("/generate", json={"prompt": FAIL, "max_new_tokens": 3, "stream": stream})
        entry = json.loads(lines(log, 2)[-1])  # behind one about the failure
    assert (entry["status"], entry["error"]) == (status, "internal_error")


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("is_wanted", [False, True])
def test_prompts_are_logged_only_if_asked_for(form: str, is_wanted: bool) -> None:
    formatter = JSONFormatter() if form == "json" else logging.Formatter(TEXT)
    with logged(formatter, log_prompts=is_wanted) as (client, log):
        client.post("/generate", json=GENERATE)
        client.post("/batch_generate", json={"prompts": ["alpha", "omega"], "max_new_tokens": 1})
        found = lines(log, 2)
    assert len(found) == 2
    for text, line in (("my\\nprompt", found[0]), ("alpha", found[1]), ("omega", found[1])):
        assert (text in line) is is_wanted
    if form == "json":
        assert json.loads(found[0]).get("prompts") == (["my\nprompt"] if is_wanted else None)


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_that_a_client_sends_makes_a_second_line(form: str) -> None:
    formatter = JSONFormatter() if form == "json" else logging.Formatter(TEXT)
    with logged(formatter, log_prompts=True) as (client, log):
        for text in ATTACKS:
            headers = [
                (b"x-request-id", text.encode("utf-8").replace(b"\n", b"?").replace(b"\r", b"?").replace(b"\x00", b"?"))
            ]
            response = client.post("/x" + quote(text), headers=headers)
            assert response.status_code in (400, 404)
            client.post("/generate", json={"prompt": text[:60], "max_new_tokens": 1, "domain": "a"})
            client.get("/end")
            wait_until(lambda: "GET /end" in log.getvalue())
            written = log.getvalue()
            log.seek(0)
            log.truncate()
            # People's lines are split at any Unicode line end, as some readers do.
            found = written.removesuffix("\n").split("\n") if form == "json" else written.splitlines()
            assert all(line.startswith("{") if form == "json" else " INFO amalgam.server " in line for line in found)
            assert len(found) == (3 if response.status_code == 404 else 2)
            assert "\x1b" not in written and "\x00" not in written
            for line in found:
                if form == "json":
                    assert json.loads(line)["level"] == "INFO"
                assert len(line) < 2500


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "é", "a;b", "<script>", "a\tb"])
def test_a_request_id_that_could_do_harm_is_replaced(shared_client: httpx.Client, given: str) -> None:
    response = shared_client.get("/health", headers=[(b"x-request-id", given.encode("latin-1"))])
    assert response.headers["x-request-id"] != given
    assert len(response.headers["x-request-id"]) == 12


def test_json_lines_hold_whatever_comes() -> None:
    record = logging.LogRecord("a", logging.ERROR, "", 0, "%s", ("\ud800",), None)
    assert "\n" not in JSONFormatter().format(record)
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("a", logging.ERROR, "", 0, "failed", (), (type(error), error, error.__traceback__))
    text = JSONFormatter().format(record)
    assert "\n" not in text and "two\nlines" in json.loads(text)["exception"]
