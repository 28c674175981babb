"""Requests that no client should send: each is refused in the one shape, and the next good request works."""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

import httpx
import pytest

from amalgam.engine.params import SamplingParams
from amalgam.errors import OverloadedError
from amalgam.server.permissions import QUEUED
from tests.cases import each_case
from tests.server.conftest import wait_until
from tests.server.fakes import FakeDeployment

JSON = {"Content-Type": "application/json"}
GOOD = {"prompt": "a", "max_new_tokens": 1}


def with_field(name: str, value: str, path: str = "/generate") -> tuple[str, bytes]:
    """A good body with one field's JSON text exchanged."""
    start = {"/generate": b'{"prompt":"a",', "/batch_generate": b'{"prompts":["a"],'}[path]
    return path, start + f'"{name}":{value}}}'.encode()


BAD_NUMBERS = ["-1", "9223372036854775808", "1e999", "-1e999", "NaN", "Infinity", "true", '"1"', "[1]", "{}", "9" * 400]
INTEGERS = ["max_new_tokens", "top_k", "seed", "min_tokens"]
FLOATS = ["temperature", "top_p", "min_p", "repetition_penalty"]
# Where numbers of the right kind stop making sense.
BEYOND = [
    ("temperature", "1e38"), ("top_p", "1e38"), ("repetition_penalty", "1e-38"), ("repetition_penalty", "0.009"),
    ("repetition_penalty", "5e-324"), ("repetition_penalty", "1e38"), ("top_k", str(2**31)), ("top_k", str(2**63)),
    ("seed", str(2**63)), ("seed", str(2**64)), ("max_new_tokens", str(2**63)), ("min_p", "1e38"), ("min_p", "-1e-300"),
]  # fmt: skip

CORPUS: dict[str, tuple[str, bytes]] = {
    **{f"{name}={value[:9]}": with_field(name, value) for name in INTEGERS + FLOATS for value in BAD_NUMBERS},
    **{f"{name}=1.5": with_field(name, "1.5") for name in INTEGERS},
    **{f"batch {name}=true": with_field(name, "true", "/batch_generate") for name in INTEGERS + FLOATS},
    **{f"{name}=0": with_field(name, "0") for name in ("max_new_tokens", "top_p", "repetition_penalty")},
    **{f"{name}={value}": with_field(name, value) for name, value in BEYOND},
    "temperature above": with_field("temperature", "100.001"),
    "top_p above": with_field("top_p", "1.0000001"),
    "max_new_tokens above": with_field("max_new_tokens", str(2**31)),
    "bool as number": with_field("do_sample", "1"),
    "bool as string": with_field("stream", '"true"'),
    "empty stop": with_field("stop", '[""]'),
    "stop of numbers": with_field("stop", "[1,2]"),
    "presence_penalty above": with_field("presence_penalty", "2.1"),
    "frequency_penalty NaN": with_field("frequency_penalty", "NaN"),
    "priority of text": with_field("priority", '"high"'),
    "bias above": with_field("logit_bias", '{"1":101}'),
    "bias of no token": with_field("logit_bias", '{"a":1}'),
    "bias of a negative token": with_field("logit_bias", '{"-1":1}'),
    "bias of text": with_field("logit_bias", '{"1":"2"}'),
    "bias as a list": with_field("logit_bias", "[[1,2]]"),
    "biases too many": with_field("logit_bias", json.dumps({str(i): 0 for i in range(2000)})),
    "stop tokens negative": with_field("stop_token_ids", "[-1]"),
    "stop tokens of text": with_field("stop_token_ids", '["1"]'),
    "stop tokens too many": with_field("stop_token_ids", json.dumps([1] * 129)),
    "ignore_eos as number": with_field("ignore_eos", "1"),
    "stop too many": with_field("stop", json.dumps(["x"] * 17)),
    "unknown field": with_field("temprature", "0.5"),
    "prototype": with_field("__proto__", "{}"),
    "key twice": with_field("prompt", '"b"'),
    "nested key twice": ("/update_weight_mapping", b'{"weight_mapping":{"a":"base","a":"int4"}}'),
    "prompt missing": ("/generate", b"{}"),
    "prompt empty": ("/generate", b'{"prompt":""}'),
    "prompt null": ("/generate", b'{"prompt":null}'),
    "prompt number": ("/generate", b'{"prompt":7}'),
    "prompt list": ("/generate", b'{"prompt":["a"]}'),
    "prompt lone surrogate": ("/generate", b'{"prompt":"\\ud800"}'),
    "key lone surrogate": ("/generate", b'{"prompt":"a","\\udfff":1}'),
    "prompt control character": ("/generate", b'{"prompt":"a\x00b"}'),
    "prompt not UTF-8": ("/generate", b'{"prompt":"\xff\xfe"}'),
    "prompt too long": ("/generate", json.dumps({"prompt": "a" * 5000}).encode()),
    "byte order mark": ("/generate", b'\xef\xbb\xbf{"prompt":"a"}'),
    "UTF-16": ("/generate", '{"prompt":"a"}'.encode("utf-16")),
    "empty body": ("/generate", b""),
    "white space": ("/generate", b"  \n"),
    "not JSON": ("/generate", b"hello"),
    "form": ("/generate", b"prompt=a&top_k=1"),
    "cut off": ("/generate", b'{"prompt":"a"'),
    "trailing comma": ("/generate", b'{"prompt":"a",}'),
    "single quotes": ("/generate", b"{'prompt':'a'}"),
    "two values": ("/generate", b'{"prompt":"a"}{"prompt":"b"}'),
    "array": ("/generate", b'["a"]'),
    "string": ("/generate", b'"a"'),
    "null": ("/generate", b"null"),
    "number": ("/generate", b"1"),
    "deep arrays": ("/generate", b"[" * 100_000),
    "deep objects": ("/generate", b'{"prompt":' * 100_000),
    "deep and closed": ("/generate", b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}"),
    "many keys": ("/generate", json.dumps({f"k{i}": i for i in range(200_000)}).encode()),
    "long key": ("/generate", json.dumps({"k" * 1_000_000: 1}).encode()),
    "long array": ("/batch_generate", b'{"prompts":[' + b"0," * 2_000_000 + b"0]}"),
    "9 MB body": ("/generate", json.dumps({"prompt": "a" * 9_000_000}).encode()),
    "no prompts": ("/batch_generate", b'{"prompts":[]}'),
    "prompts string": ("/batch_generate", b'{"prompts":"a"}'),
    "prompts mixed": ("/batch_generate", b'{"prompts":["a",1,null]}'),
    "batch stream": ("/batch_generate", b'{"prompts":["a"],"stream":true}'),
    "empty mapping": ("/update_weight_mapping", b'{"weight_mapping":{}}'),
    "mapping list": ("/update_weight_mapping", b'{"weight_mapping":["a"]}'),
    "mapping to number": ("/update_weight_mapping", b'{"weight_mapping":{"a":4}}'),
    "reload field": ("/reload_weights", b'{"force":true}'),
    "reset field": ("/reset_expert_stats", b'{"layer":1}'),
    "export format": ("/export_expert_stats", b'{"format":"../../etc/passwd"}'),
    "stats top_k 0": ("/expert_stats", b'{"top_k":0}'),
    "stats top_k true": ("/expert_stats", b'{"top_k":true}'),
    "stats minutes 0": ("/expert_stats", b'{"minutes":0}'),
    "stats minutes NaN": ("/expert_stats", b'{"minutes":NaN}'),
}


def check_error(response: httpx.Response) -> dict[str, Any]:
    assert 400 <= response.status_code < 500, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"]
    assert len(error["message"]) < 1000
    return error


def test_corpus(shared_client: httpx.Client) -> None:
    with each_case() as case:
        for name, (path, body) in CORPUS.items():
            with case(name):
                check_error(shared_client.post(path, content=body, headers=JSON))
                if case.count % 10 == 0:
                    assert shared_client.post("/generate", json=GOOD).status_code == 200
    assert shared_client.post("/generate", json=GOOD).status_code == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("", 415),
        ("application/json; charset=utf-8", 200),
    ],
)
@pytest.mark.parametrize(("path", "body"), [("/generate", json.dumps(GOOD)), ("/reload_weights", "")])
def test_only_json_is_read(client: httpx.Client, content_type: str, status: int, path: str, body: str) -> None:
    response = client.post(path, content=body, headers={"Content-Type": content_type})
    assert response.status_code == status


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /nowhere", 404),
        ("POST /generate/", 404),
        ("GET /../../etc/passwd", 404),
        ("GET /generate", 405),
        ("DELETE /", 405),
        ("POST /health", 405),
        ("GET /expert_stats?top_k=true", 422),
        ("GET /expert_stats?top_k=0", 422),
        ("GET /expert_stats?minutes=nan", 422),
        ("GET /expert_stats?minutes=1e999", 422),
        ("GET /expert_stats?topk=1", 422),
        ("GET /model_info?verbose=1", 422),
        ("GET /generate/", 404),
        ("GET /nowhere/", 404),
        ("POST /generate?temperature=0", 422),
    ],
)
def test_wrong_requests(shared_client: httpx.Client, request_line: str, status: int) -> None:
    method, path = request_line.split()
    response = shared_client.request(method, path, json=GOOD if method == "POST" else None)
    assert response.status_code == status
    check_error(response)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: -5\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000,
    ],
)
def test_what_is_not_http_gets_the_same_shape(shared_client: httpx.Client, head: bytes) -> None:
    url = httpx.URL(shared_client.base_url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(head)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    status, _, rest = answer.partition(b"\r\n")
    wanted = {b"Transfer-Encoding: gzip": b"501", b"X: aaaa": b"431"}
    assert status.split()[1] == next((code for text, code in wanted.items() if text in head), b"400")
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert shared_client.get("/").status_code == 200


def test_an_undeclared_long_body_is_cut_off(shared_client: httpx.Client) -> None:
    def chunks() -> Any:
        for _ in range(10):
            yield b" " * 2**20

    response = shared_client.post("/generate", content=chunks(), headers=JSON)
    assert response.status_code == 413
    assert str(8 * 2**20) in check_error(response)["message"]


def test_messages_name_field_value_and_what_is_allowed(shared_client: httpx.Client) -> None:
    error = check_error(shared_client.post("/generate", json={**GOOD, "top_p": 1.5}))
    assert error["param"] == "top_p"
    for part in ("top_p", "1.5", "1 or less"):
        assert part in error["message"]
    error = check_error(shared_client.post("/batch_generate", json={"prompts": ["a", 7]}))
    assert error["param"] == "prompts[1]"
    image = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image"}, "text"]}]}
    answer = shared_client.post("/v1/messages", json=image)
    assert (answer.status_code, answer.json()["error"]["message"][:22]) == (400, "messages[0].content[0]")
    assert "temprature" in check_error(shared_client.post("/generate", json={**GOOD, "temprature": 1}))["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1e-38), ("temperature", 5e-324), ("top_p", 1e-300), ("min_p", 5e-324), ("top_k", 2**31 - 1),
        ("seed", 2**63 - 1), ("repetition_penalty", 0.01), ("repetition_penalty", 100), ("presence_penalty", -2),
        ("frequency_penalty", 2), ("priority", -(2**31) + 1),
    ],
)  # fmt: skip
def test_numbers_at_the_end_of_their_range_are_taken(shared_client: httpx.Client, name: str, value: float) -> None:
    assert shared_client.post("/generate", json={**GOOD, name: value}).status_code == 200


def test_null_means_the_default(client: httpx.Client, deployment: FakeDeployment) -> None:
    optional = set(client.get("/openapi.json").json()["components"]["schemas"]["GenerateBody"]["properties"])
    optional -= {"prompt"}
    assert optional >= {"temperature", "top_k", "max_new_tokens", "do_sample", "stream", "stop", "seed"}
    assert client.post("/generate", json={"prompt": "a", **dict.fromkeys(optional)}).status_code == 200
    assert deployment.engine.params == [SamplingParams()]
    assert check_error(client.post("/generate", json={"prompt": "a", "temprature": None}))["param"] == "temprature"
    assert check_error(client.post("/generate", json={"prompt": None}))["param"] == "prompt"


def test_a_refused_number_costs_no_tokenizing_and_no_step(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.encode = lambda text: pytest.fail("tokenized")
    check_error(client.post("/generate", json={**GOOD, "top_k": -1}))
    assert deployment.engine.num_submitted == 0


@pytest.mark.parametrize("path", sorted(QUEUED))
def test_nothing_is_read_of_what_an_overload_refuses(
    client: httpx.Client, deployment: FakeDeployment, path: str
) -> None:
    deployment.engine.num_waiting = 10**6
    deployment.encode = lambda text: pytest.fail("tokenized")
    response = client.post(path, content="no JSON", headers={"Content-Type": "application/json"})
    assert response.status_code == (529 if path == "/v1/messages" else OverloadedError.http_status)  # Anthropic's own
    assert "retry-after" in response.headers


def test_a_full_queue_refuses_nothing_that_takes_no_place(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.engine.num_waiting = 10**6
    assert client.post("/detokenize", json={"tokens": [97]}).status_code == 200
    assert client.get("/model_info").status_code == 200
    assert client.get("/generate").status_code == 405
    assert client.post("/weights/plan", json={"mapping": {}}).status_code != OverloadedError.http_status


def test_unexpected_errors_give_an_id_and_no_more(
    client: httpx.Client, deployment: FakeDeployment, caplog: pytest.LogCaptureFixture
) -> None:
    def encode(text: str) -> list[int]:
        raise RuntimeError(f"cannot encode {text}")

    deployment.encode = encode
    with caplog.at_level(logging.INFO, "amalgam.server"):
        response = client.post("/generate", json={"prompt": "my secret"})
    request_id = response.headers["x-request-id"]
    assert response.status_code == 500
    assert request_id in response.json()["error"]["message"]
    assert "RuntimeError" not in response.text
    line = next(record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert request_id in line
    assert "RuntimeError" in line
    assert "\n" not in line
    assert "secret" not in caplog.text


def test_one_log_line_per_request_without_prompts(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "httpx")
    with caplog.at_level(logging.INFO, "amalgam.server"):
        response = client.post("/generate", json={"prompt": "my secret", "max_new_tokens": 1})
        client.get("/x%0AERROR%1B[31m forged?key=secret")
        wait_until(lambda: " 404 " in caplog.text)
    said = [record.getMessage() for record in caplog.records]
    lines = [line for line in said if not line.startswith("GET /ready ")]  # the fixture's may come late
    assert len(lines) == 2
    assert lines[0].startswith("POST /generate 200 ")
    assert response.headers["x-request-id"] in lines[0]
    assert lines[1].startswith("GET /x\\nERROR\\x1b[31m forged 404 ")
    assert "secret" not in caplog.text
