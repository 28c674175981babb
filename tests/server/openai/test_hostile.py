"""Requests that no client should send to OpenAI's interface: each gets 4xx in its shape, and the next one works."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest

from amalgam.errors import RequestError
from amalgam.server import service
from tests.server.conftest import serving, wait_until
from tests.server.fakes import FakeDeployment, fake_settings

JSON = {"Content-Type": "application/json"}
USER = '"messages":[{"role":"user","content":"a"}]'
GOOD = {
    "/v1/completions": '"prompt":"a","max_tokens":1',
    "/v1/chat/completions": f'{USER},"max_tokens":1',
    "/v1/responses": '"input":"a","max_output_tokens":1',
    "/v1/embeddings": '"input":"a"',
    "/tokenize": '"prompt":"a"',
    "/detokenize": '"tokens":[1]',
}
BAD_NUMBERS = ["-1", "9223372036854775808", "1e999", "-1e999", "NaN", "true", '"1"', "[1]", "{}", "9" * 400]
NUMBERS = {
    "/v1/completions": [
        "max_tokens",
        "n",
        "best_of",
        "top_p",
        "temperature",
        "logprobs",
        "repetition_penalty",
        "min_p",
    ],
    "/v1/chat/completions": ["max_tokens", "max_completion_tokens", "n", "top_p", "top_logprobs", "min_tokens"],
    "/v1/responses": ["max_output_tokens", "top_logprobs", "temperature"],
    "/v1/embeddings": ["dimensions"],
}
DEEP = "[" * 5000 + "]" * 5000
NESTED = '{"a":' * 200 + "1" + "}" * 200
CORPUS: list[tuple[str, str]] = [
    *[(path, f'"{name}":{value}') for path, names in NUMBERS.items() for name in names for value in BAD_NUMBERS],
    *[(path, f'"model":{value}') for path in GOOD for value in ("1", '"b"', '"\\ud800"', "[]", '""')],
    *[(path, f'"{name}":1') for path in GOOD for name in ("temprature", "__proto__", "\\ud800", "")],
    *[(path, f'"x":{DEEP}') for path in GOOD],
    *[("/v1/completions", f'"seed":{value}') for value in ("1e999", "1.5", "true", str(2**64), str(-(2**63) - 1))],
    *[("/v1/completions", f'"presence_penalty":{value}') for value in ("2.1", "-2.1", "true", "NaN")],
    *[
        ("/v1/completions", f'"logit_bias":{value}')
        for value in ('{"a":1}', '{"1":101}', '{"1":true}', '{"-1":1}', "[]", '{"99999999999":1}', '{"1":NaN}')
    ],
    *[("/v1/completions", f'"stop":{value}') for value in ('""', '[""]', "[1]", json.dumps(["a"] * 17), '"\\udfff"')],
    *[("/v1/completions", f'"stop_token_ids":{value}') for value in ("[-1]", "[true]", "[1e9]", '"a"')],
    *[
        ("/v1/completions", f'"stream_options":{value}')
        for value in ('{"include_usage":true}', '{"a":1}', "true", '{"include_obfuscation":true}')
    ],
    *[
        ("/v1/chat/completions", f'"response_format":{value}')
        for value in (
            '{"type":"xml"}', '{"type":"json_schema"}', '{"type":"json_schema","json_schema":{"schema":{}}}', "[]",
            '{"type":"text","json_schema":{"name":"a","schema":{}}}', '{"type":"structural_tag"}',
        )
    ],
    *[
        ("/v1/chat/completions", f'"tools":{value}')
        for value in (
            '[{"type":"function"}]', '[{"type":"custom","custom":{"name":"a"}}]', '"a"',
            '[{"type":"function","function":{"name":"a b"}}]', '[{"type":"function","function":{"name":""}}]',
            '[{"type":"function","function":{"name":"a"}},{"type":"function","function":{"name":"a"}}]',
        )
    ],
    *[
        ("/v1/chat/completions", f'"tool_choice":{value}')
        for value in (
            '"required"', '"always"', "1", "[]", '{"type":"function"}', '{"type":"mcp"}', '{"type":["a"]}', "{}",
        )
    ],
    *[
        ("/v1/responses", f'"tools":[{{"type":"function","name":"a"}}],"tool_choice":{value}')
        for value in (
            '"always"', "1", '{"type":"function","name":[]}', '{"type":"allowed_tools","mode":"auto","tools":[1]}',
        )
    ],
    *[("/v1/responses", f'"text":{value}') for value in ('{"format":{"type":"json_schema"}}', '{"format":1}', '"a"')],
    ("/v1/chat/completions", '"metadata":{"a":1}'),
    ("/v1/chat/completions", f'"metadata":{NESTED}'),
    ("/v1/chat/completions", '"chat_template_kwargs":[]'),
    ("/v1/chat/completions", '"priority":9223372036854775808'),
    ("/v1/completions", '"prompt_logprobs":21'),
    ("/v1/completions", '"best_of":2'),
    ("/v1/completions", '"guided_regex":"a","guided_choice":["a"]'),
    ("/v1/completions", '"guided_choice":[]'),
    ("/v1/completions", '"structured_outputs":{"regex":"a","json":{}}'),
    ("/v1/embeddings", '"encoding_format":"hex"'),
    ("/v1/embeddings", '"pooling":"max"'),
    ("/v1/embeddings", '"dimensions":2'),
]  # fmt: skip
# In place of the good prompt.
PROMPTS = ["[]", "[[]]", "[1,true]", "[-1]", "[1.5]", '[1,"a"]', '["a",1]', "[[1],2]", "{}", "true", "1", "[99999999]",
           '"\\ud800"', '["a","\\udfff"]', "null", "[[[1]]]", json.dumps([1] * 99), json.dumps("a" * 5000)]  # fmt: skip
MESSAGES = ["[]", "[1]", "{}", '"a"', '[{"role":"user"}]', '[{"content":"a"}]', '[{"role":"king","content":""}]',
            '[{"role":"user","content":1}]', '[{"role":"user","content":[{"type":"text"}]}]', "[[]]", "null",
            '[{"role":"user","content":[{"type":["text"],"text":"a"}]}]',
            '[{"role":"user","content":[{"type":"file"}]}]',
            '[{"role":"assistant","tool_calls":[{"id":"a","function":{"name":"f","arguments":{}}}]}]',
            '[{"role":"user","content":"a","tool_calls":[]}]', '[{"role":"user","content":"\\ud800"}]',
            '[{"role":"user","content":"a","x":1}]', '[{"role":"tool","content":"a"}]']  # fmt: skip
BODIES: list[tuple[str, str]] = [
    *[(path, f"{{{GOOD[path]},{fields}}}") for path, fields in CORPUS],
    *[("/v1/completions", f'{{"prompt":{value}}}') for value in PROMPTS],
    *[("/v1/embeddings", f'{{"input":{value}}}') for value in PROMPTS],
    *[("/v1/chat/completions", f'{{"messages":{value}}}') for value in MESSAGES],
    *[
        ("/v1/responses", f'{{"input":{value}}}')
        for value in ("1", "[1]", "{}", "[[]]", '[{"type":1}]', '[{"type":"x"}]')
    ],
    *[(path, body) for path in GOOD for body in ("", "null", "[]", "{", '"a"', "NaN", "{}", '{"a":1,"a":2}')],
]  # fmt: skip


@pytest.fixture(scope="module")
def deployment() -> FakeDeployment:
    return FakeDeployment()


@pytest.fixture(scope="module")
def http(deployment: FakeDeployment) -> Iterator[httpx.Client]:
    with serving(fake_settings(port=0), lambda: deployment) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield client


@pytest.mark.parametrize("path", GOOD)
def test_corpus(http: httpx.Client, path: str) -> None:
    for body in (body for where, body in BODIES if where == path):
        response = http.post(path, content=body.encode("utf-8", "surrogatepass"), headers=JSON)
        assert response.status_code in (400, 404, 413, 415), (body[:200], response.status_code, response.text[:300])
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        assert len(error["message"]) < 1500
        assert error["type"] == "invalid_request_error"
    good = http.post(path, content=f"{{{GOOD[path]}}}", headers=JSON)
    assert good.status_code == 200, good.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_who_leaves_cancels_all_samples(
    http: httpx.Client, deployment: FakeDeployment, path: str, is_stream: bool
) -> None:
    engine = deployment.engine
    engine.held_at = 2
    body = json.loads(f"{{{GOOD[path]}}}") | {"stream": is_stream}
    body |= {"max_output_tokens": 40} if path == "/v1/responses" else {"max_tokens": 40, "n": 3}
    try:
        with closing(HTTPConnection(http.base_url.netloc.decode(), timeout=60)) as leaver:
            leaver.request("POST", path, json.dumps(body), JSON)
            wait_until(lambda: len(engine.running) == body.get("n", 1))
        wait_until(lambda: not engine.running)
    finally:
        engine.held_at = None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"])
def test_overload_is_told_with_when_to_come_again(http: httpx.Client, deployment: FakeDeployment, path: str) -> None:
    engine = deployment.engine
    engine.max_queue, before = 0, engine.max_queue
    try:
        response = http.post(path, content=f"{{{GOOD[path]}}}", headers=JSON)
    finally:
        engine.max_queue = before
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_long_tools_are_refused_before_they_are_written(http: httpx.Client, path: str) -> None:
    function = {"name": "a", "parameters": {"enum": ["ab"] * 2**17}}
    tool = {"type": "function", **function} if path == "/v1/responses" else {"type": "function", "function": function}
    given = {"input": "a"} if path == "/v1/responses" else {"messages": [{"role": "user", "content": "a"}]}
    error = http.post(path, json={**given, "tools": [tool]}).json()["error"]
    assert error["param"] == "tools" and "262144" in error["message"]


@pytest.mark.parametrize(
    "given",
    [
        {"guided_json": {"enum": ["a" * 2**17]}},
        {"guided_choice": ["a" * 2**17]},
        {"structured_outputs": {"json": {"a" * 2**17: True}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [1] * 2**18}}}},
    ],
)
def test_long_grammars_are_refused_before_they_are_written(http: httpx.Client, given: dict[str, Any]) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", **given})
    assert answer.status_code == 400 and "131072" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("path", "name"), [("/v1/embeddings", "input"), ("/v1/completions", "prompt")])
def test_the_prompt_that_is_too_long_is_named(http: httpx.Client, path: str, name: str) -> None:
    message = http.post(path, json={name: ["a", "x" * 10_000]}).json()["error"]["message"]
    assert message.endswith(f". This is {name}[1].") and ".." not in message
    assert f"{name}[" not in http.post(path, json={name: "x" * 10_000}).json()["error"]["message"]


def test_more_prompts_than_the_queue_takes(http: httpx.Client, deployment: FakeDeployment) -> None:
    engine = deployment.engine
    engine.max_queue, before = 2, engine.max_queue
    try:
        body: dict[str, Any] = {"prompt": ["a", "bb", "ccc", "dddd"], "max_tokens": 3, "n": 1}
        answer = http.post("/v1/completions", json=body).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert {choice["text"] for choice in answer["choices"]} == {"w0 w1 w2 "}
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        assert {json.loads(line)["choices"][0]["index"] for line in lines[:-1]} == {0, 1, 2, 3}
    finally:
        engine.max_queue = before


def test_a_failure_in_a_stream_has_the_shape_too(http: httpx.Client) -> None:
    body = {"prompt": "fail", "max_tokens": 5, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert json.loads(lines[-2])["error"]["type"] == "server_error"
    assert lines[-1] == "[DONE]"
    assert http.post("/v1/completions", json={**body, "stream": False}).status_code == 500
    with http.stream("POST", "/v1/responses", json={"input": "fail", "stream": True}) as stream:
        last = [line for line in stream.iter_lines() if line.startswith("data: ")][-1]
    event = json.loads(last.removeprefix("data: "))
    assert (event["type"], event["response"]["status"]) == ("response.failed", "failed")
    assert event["response"]["error"]["code"] == "server_error"


def test_many_at_once(http: httpx.Client, deployment: FakeDeployment) -> None:
    bodies = [(path, f"{{{GOOD[path]}}}") for path in GOOD] * 4
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda item: http.post(item[0], content=item[1], headers=JSON), bodies))
    assert {answer.status_code for answer in answers} == {200}
    assert not deployment.engine.running


def test_a_grammar_that_takes_its_time_holds_up_nobody(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it may take: it is tried in a process and made in a thread."""
    waiting, held = threading.Event(), threading.Event()

    def compile_grammar(*_: Any) -> Any:
        waiting.set()
        assert held.wait(60)
        raise RequestError("It takes more time than it may.", param="guided_regex")

    monkeypatch.setattr(service, "compile_grammar", compile_grammar)
    body = {"prompt": "a", "max_tokens": 1}
    with ThreadPoolExecutor(1) as pool:
        hostile = pool.submit(http.post, "/v1/completions", json=body | {"guided_regex": "a{1,9}"})
        wait_until(waiting.is_set)
        assert http.get("/health").status_code == 200
        assert http.post("/v1/completions", json=body).status_code == 200
        held.set()
        assert hostile.result().status_code == 400
