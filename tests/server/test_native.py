"""Generation and what is served, over real HTTP."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest

from amalgam import SamplingParams, __version__
from amalgam.engine.generation_config import ModelDefaults
from tests.server.conftest import serving, wait_until
from tests.server.fakes import FAIL, MAX_SEQ_LENGTH, FakeDeployment, fake_settings

FIGURES = {"prompt_tokens", "generated_tokens", "total_tokens", "finish_reason", "timings", "weight_version"}
TIMINGS = {"queue_seconds", "first_token_seconds", "total_seconds", "tokens_per_second"}


def events(response: httpx.Response) -> list[Any]:
    """The stream's events; the last is the string `[DONE]`."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [json.loads(line) for line in lines[:-1]] + lines[-1:]


def test_root_tells_who_serves_what(client: httpx.Client) -> None:
    answer = client.get("/").json()
    assert answer["status"] == "healthy"
    assert (answer["model"], answer["version"], answer["weight_version"]) == ("fake", __version__, 1)
    assert answer["uptime_seconds"] > 0


def test_generate(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"prompt": "你好", "max_new_tokens": 3}).json()
    assert answer.keys() == FIGURES | {"generated_text"}
    assert answer["generated_text"] == "w0 w1 w2 "
    assert (answer["prompt_tokens"], answer["generated_tokens"], answer["total_tokens"]) == (2, 3, 5)
    assert (answer["finish_reason"], answer["weight_version"]) == ("length", 1)
    assert answer["timings"].keys() == TIMINGS


def test_a_misspelt_field_names_the_one_that_was_meant(client: httpx.Client) -> None:
    def message(answer: httpx.Response) -> str:
        assert answer.status_code == 422
        return str(answer.json()["error"]["message"])

    assert "'max_new_tokens'" in message(client.post("/generate", json={"prompt": "x", "max_tokens": 3}))
    assert "'top_k'" in message(client.get("/expert_stats?topk=3"))
    assert "null" in message(client.post("/generate", json={"prompt": None}))


def test_generate_has_the_promised_defaults(client: httpx.Client) -> None:
    properties = client.get("/openapi.json").json()["components"]["schemas"]["GenerateBody"]["properties"]
    defaults = {name: field.get("default") for name, field in properties.items()}
    promised = {
        "max_new_tokens": 512,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "do_sample": True,
        "stream": False,
    }
    assert promised.items() <= defaults.items()
    assert client.post("/generate", json={"prompt": "x"}).json()["generated_tokens"] == 512


def test_the_models_defaults_hold_and_are_shown(client: httpx.Client, deployment: FakeDeployment) -> None:
    model = SamplingParams(max_new_tokens=3, temperature=0.25, top_k=7, repetition_penalty=1.125)
    deployment.defaults = ModelDefaults(model, {"temperature": 0.25})
    assert client.post("/generate", json={"prompt": "x"}).json()["generated_tokens"] == 3
    client.post("/batch_generate", json={"prompts": ["x"], "top_k": 8})
    client.post("/generate", json={"prompt": "x", "temperature": None, "do_sample": False})
    chat = {"messages": [{"role": "user", "content": "x"}], "temperature": 0.5}
    client.post("/dashboard/chat", json=chat)
    assert deployment.engine.params == [
        model, replace(model, top_k=8), replace(model, do_sample=False),
        replace(model, temperature=0.5, continues_prompt=False),
    ]  # fmt: skip
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("GenerateBody", "BatchGenerateBody"):
        shown = {key: schemas[name]["properties"][key]["default"] for key in ("max_new_tokens", "temperature", "top_p")}
        assert shown == {"max_new_tokens": 3, "temperature": 0.25, "top_p": 0.9}
    assert "<td>0.25</td>" in client.get("/docs").text


def test_every_sampling_field_reaches_the_engine(client: httpx.Client, deployment: FakeDeployment) -> None:
    given: dict[str, Any] = {
        "max_new_tokens": 2, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -1.0, "min_tokens": 1,
        "stop_token_ids": [5, 7], "ignore_eos": True, "priority": -3, "logit_bias": {"9": 1.5, "3": -100},
        "speculate": False,
    }  # fmt: skip
    assert client.post("/generate", json={"prompt": "x", **given}).status_code == 200
    bias = {int(token_id): float(value) for token_id, value in given["logit_bias"].items()}
    assert deployment.engine.params == [SamplingParams(**{**given, "logit_bias": bias})]


@pytest.mark.parametrize("stop", ["a", ["a", "b"], [], None])
def test_stop_is_a_string_or_a_list(client: httpx.Client, stop: Any) -> None:
    assert client.post("/generate", json={"prompt": "x", "max_new_tokens": 1, "stop": stop}).status_code == 200


def test_stream(client: httpx.Client) -> None:
    with client.stream("POST", "/generate", json={"prompt": "hi", "max_new_tokens": 3, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *pieces, last, done = events(response)
    assert pieces == [{"text": "w0 ", "generated_tokens": 1}, {"text": "w1 ", "generated_tokens": 2}]
    assert last.keys() == FIGURES | {"text"}
    assert (last["text"], last["finish_reason"], last["total_tokens"]) == ("w2 ", "length", 5)
    assert last["timings"].keys() == TIMINGS
    assert done == "[DONE]"


def test_events_count_tokens_whose_text_comes_later(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.engine.tokens_per_piece = 2
    with client.stream("POST", "/generate", json={"prompt": "hi", "max_new_tokens": 5, "stream": True}) as response:
        *told, _ = events(response)
    assert [(event["text"], event["generated_tokens"]) for event in told] == [("w1 ", 2), ("w3 ", 4), ("", 5)]


def test_a_stream_that_fails_ends_with_an_error_and_done(client: httpx.Client) -> None:
    with client.stream("POST", "/generate", json={"prompt": FAIL, "stream": True}) as response:
        first, error, done = events(response)
    assert first == {"text": "w0 ", "generated_tokens": 1}
    assert error["error"]["type"] == "internal_error"
    assert done == "[DONE]"


def test_a_stream_that_cannot_start_answers_with_its_status(client: httpx.Client) -> None:
    response = client.post("/generate", json={"prompt": "x" * MAX_SEQ_LENGTH, "stream": True})
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "prompt_too_long"


def test_batch_generate_keeps_the_order(client: httpx.Client) -> None:
    prompts = ["a", "bbb", "cc"]
    answer = client.post("/batch_generate", json={"prompts": prompts, "max_new_tokens": 2}).json()
    assert answer["prompts"] == prompts
    assert answer["generated_texts"] == ["w0 w1 "] * 3
    assert [item["prompt_tokens"] for item in answer["details"]] == [1, 3, 2]
    assert all(item.keys() == FIGURES for item in answer["details"])


def test_batch_prompts_are_in_the_engine_together(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.engine.held_at = 1
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/batch_generate", json={"prompts": ["a"] * 4, "max_new_tokens": 20})
        wait_until(lambda: len(deployment.engine.running) == 4)
        deployment.engine.held_at = None
        assert answer.result().status_code == 200


@pytest.mark.parametrize("max_queue", [1, 2, 3])
def test_a_batch_larger_than_the_queue_is_fed_as_room_comes(
    client: httpx.Client, deployment: FakeDeployment, max_queue: int
) -> None:
    deployment.engine.max_queue = max_queue
    prompts = ["a", "bbb", "cc", "dddd"]
    answer = client.post("/batch_generate", json={"prompts": prompts, "max_new_tokens": 2})
    assert answer.status_code == 200
    assert [item["prompt_tokens"] for item in answer.json()["details"]] == [1, 3, 2, 4]
    assert deployment.engine.max_running == max_queue
    assert deployment.engine.running == set()


def test_a_batch_waits_for_room_that_others_make_but_not_for_its_first(url: str, deployment: FakeDeployment) -> None:
    engine = deployment.engine
    engine.held_at, engine.max_queue = 1, 1
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        other = pool.submit(client.post, "/generate", json={"prompt": "a", "max_new_tokens": 3})
        wait_until(lambda: len(engine.running) == 1)
        refused = client.post("/batch_generate", json={"prompts": ["a", "b"], "max_new_tokens": 3})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded")
        engine.max_queue = 2
        batch = ThreadPoolExecutor(1).submit(
            client.post, "/batch_generate", json={"prompts": ["a", "b", "c"], "max_new_tokens": 3}
        )
        wait_until(lambda: len(engine.running) == 2)
        assert not batch.done() and not other.done()
        engine.held_at = None
        assert (batch.result().status_code, other.result().status_code) == (200, 200)


def test_a_batch_leaves_half_of_the_queue_to_others(deployment: FakeDeployment) -> None:
    settings = fake_settings(port=0).replace(engine={"max_queue": 4})
    engine = deployment.engine
    engine.held_at, engine.max_queue = 1, 4
    with serving(settings, lambda: deployment) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        with ThreadPoolExecutor(3) as pool:
            batch = pool.submit(client.post, "/batch_generate", json={"prompts": ["a"] * 20, "max_new_tokens": 2})
            wait_until(lambda: len(engine.running) == 2)
            others = [pool.submit(client.post, "/generate", json={"prompt": "b", "max_new_tokens": 2}) for _ in "ab"]
            wait_until(lambda: len(engine.running) == 4)
            engine.held_at = None
            assert [answer.result().status_code for answer in (batch, *others)] == [200] * 3


def test_a_client_that_leaves_a_large_batch_submits_no_more(url: str, deployment: FakeDeployment) -> None:
    engine = deployment.engine
    engine.held_at, engine.max_queue = 1, 2
    with closing(HTTPConnection(httpx.URL(url).netloc.decode(), timeout=60)) as connection:
        body = json.dumps({"prompts": ["a", "b", "c", "d"]})
        connection.request("POST", "/batch_generate", body, {"Content-Type": "application/json"})
        wait_until(lambda: len(engine.running) == 2)
    wait_until(lambda: not engine.running)
    assert engine.num_submitted == 2


def test_one_bad_prompt_fails_the_batch_and_frees_the_rest(client: httpx.Client, deployment: FakeDeployment) -> None:
    prompts = ["a", "b", "x" * MAX_SEQ_LENGTH]
    response = client.post("/batch_generate", json={"prompts": prompts})
    assert response.status_code == 413
    message = response.json()["error"]["message"]
    assert message.endswith(". This is prompts[2].") and ".." not in message
    assert deployment.engine.running == set() and deployment.engine.num_submitted == 0


def test_batches_are_bounded(client: httpx.Client) -> None:
    response = client.post("/batch_generate", json={"prompts": ["a"] * 5})
    assert response.status_code == 422
    assert "at most 4" in response.json()["error"]["message"]


def test_requests_run_together(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.engine.held_at = 1
    body = {"prompt": "a", "max_new_tokens": 20}
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(client.post, "/generate", json=body) for _ in range(6)]
        wait_until(lambda: len(deployment.engine.running) == 6)
        deployment.engine.held_at = None
        assert [answer.result().status_code for answer in answers] == [200] * 6


def test_overload_is_refused_with_retry_after(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.engine.max_queue = 0
    response = client.post("/generate", json={"prompt": "a"})
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "overloaded"
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", ["/generate", "/batch_generate"])
def test_a_client_that_leaves_cancels_its_requests(url: str, deployment: FakeDeployment, path: str) -> None:
    deployment.engine.held_at = 1
    prompts = {"prompt": "a"} if path == "/generate" else {"prompts": ["a", "b"]}
    with closing(HTTPConnection(httpx.URL(url).netloc.decode(), timeout=60)) as connection:
        connection.request("POST", path, json.dumps(prompts), {"Content-Type": "application/json"})
        wait_until(lambda: len(deployment.engine.running) == len(next(iter(prompts.values()))))
    wait_until(lambda: not deployment.engine.running)


def test_a_client_that_leaves_a_stream_cancels_it(url: str, deployment: FakeDeployment) -> None:
    deployment.engine.held_at = 1
    body = {"prompt": "a", "stream": True}
    with httpx.Client(base_url=url, timeout=60) as client, client.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()  # dropped, it would close the connection
        assert next(lines)
        assert deployment.engine.running
    wait_until(lambda: not deployment.engine.running)


def test_model_info(client: httpx.Client, deployment: FakeDeployment) -> None:
    assert client.get("/model_info").json() == deployment.model_info()


def test_docs_list_every_endpoint_and_fetch_nothing(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for path in client.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in page.text
    for field in ("max_new_tokens", "repetition_penalty", "weight_mapping", "minutes"):
        assert f"<code>{field}</code>" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "<script" not in page.text


def test_health_answers_while_prompts_are_encoded(client: httpx.Client, deployment: FakeDeployment) -> None:
    has_begun, blocked = threading.Event(), threading.Event()

    def encode(text: str) -> list[int]:
        has_begun.set()
        blocked.wait(100)  # longer than the client waits
        return [1]

    deployment.encode = encode
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(client.post, "/generate", json={"prompt": "a", "max_new_tokens": 1}) for _ in range(8)]
        assert has_begun.wait(60)
        assert client.get("/health").status_code == 200
        blocked.set()
        assert [answer.result().status_code for answer in answers] == [200] * 8
