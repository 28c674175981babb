"""Open WebUI's calls, as its public source has them (routers/openai.py, routers/tasks.py, utils/payload.py), and fields
that clients add to a request without being asked."""

from __future__ import annotations

import base64
import json
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.lazy import Lazy
from tests.server.openai.conftest import DEMO

openai = Lazy("openai")

HEADERS = {
    "Authorization": "Bearer sk-0p3n-w3bu1",
    "Content-Type": "application/json",
    "X-OpenWebUI-User-Name": "Ada%20Lovelace",
    "X-OpenWebUI-User-Id": "8b2f6f0e-6d4e-4b8e-9f1c-0f6f3b6c1d11",
    "X-OpenWebUI-User-Email": "ada@example.org",
    "X-OpenWebUI-User-Role": "user",
    "X-OpenWebUI-Chat-Id": "0b1c2d3e-1111-2222-3333-444455556666",
}
# Sent at the settings that it comes with, or with those of "Advanced params" that go to OpenAI-compatible servers.
CHAT: dict[str, Any] = {
    "model": "demo",
    "messages": [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": [{"type": "text", "text": "What is new?"}]},
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
}
PARAMETERS: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "max_tokens": 8,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "seed": 42,
    "stop": ["###"],
    "logit_bias": {"5": -100},
    "reasoning_effort": "none",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_current_time",
            "description": "Get the current time.",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": []},
        },
    }
]
TITLE = """### Task:
Generate a concise, 3-5 word title with an emoji summarizing the chat history.
### Output:
JSON format: { "title": "your concise title here" }
### Chat History:
<chat_history>
USER: Hello
ASSISTANT: Hi!
</chat_history>"""


def chunks(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, read as Open WebUI reads them: lines that begin with `data: `."""
    with http.stream("POST", "/v1/chat/completions", json=body, headers=HEADERS) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_it_lists_the_models(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers=HEADERS).json()
    assert [model["id"] for model in answer["data"]] == ["demo", "gpt-demo"]
    assert answer["object"] == "list"
    assert all(model["owned_by"] for model in answer["data"])


@pytest.mark.parametrize("parameters", [{"max_tokens": 4}, PARAMETERS], ids=["as it comes", "advanced params"])
def test_it_chats_in_a_stream_that_ends_with_usage(http: httpx.Client, parameters: dict[str, Any]) -> None:
    *answer, last = chunks(http, CHAT | parameters)
    assert all(chunk["choices"][0]["index"] == 0 for chunk in answer)
    assert answer[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] > 0


def test_it_offers_tools_and_sends_back_what_they_gave(http: httpx.Client) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_current_time", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    assert chunks(http, CHAT | {"messages": messages, "tools": TOOLS, "max_tokens": 4})


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_it_asks_for_titles_tags_and_questions(http: httpx.Client, limit: str) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": TITLE}], "stream": False, limit: 100}
    answer = http.post("/v1/chat/completions", json=body, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    assert isinstance(answer.json()["choices"][0]["message"]["content"], str)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"user": "abc-123", "stream": False, "n": 1, "stop": None, "logprobs": None}, id="nulls and ones"),
        pytest.param(
            {"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": False}, id="the same said twice"
        ),
        pytest.param({"enable_thinking": True}, id="a switch"),
        pytest.param({"thinking": {"type": "disabled"}}, id="a switch with a type"),
        pytest.param(
            {"presence_penalty": 0, "frequency_penalty": 0, "top_p": 1, "temperature": 0.5},
            id="numbers without a point",
        ),
        pytest.param({"stream": True, "stream_options": {"include_usage": True}, "tools": []}, id="no tools"),
        pytest.param({"parallel_tool_calls": False, "prompt_cache_key": "thread"}, id="a key for the cache"),
        pytest.param({"service_tier": "auto", "store": False, "metadata": {}}, id="what asks for nothing"),
        pytest.param({"tool_choice": "auto", "response_format": {"type": "text"}}, id="the defaults"),
        pytest.param({"messages": [{"type": "text", "role": "user", "content": "Hello"}]}, id="messages of lm_eval"),
        pytest.param({"messages": [{"type": "message", "role": "user", "content": "Hello"}]}, id="items as messages"),
    ],
)
def test_what_other_clients_add_is_no_error(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2} | fields
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


def test_a_message_of_another_type_is_refused_by_name(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [{"type": "image", "role": "user", "content": "Hi"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "type"
    assert answer.json()["error"]["code"] == "unsupported_parameter"


def test_marks_of_prompt_caching_ask_for_nothing(http: httpx.Client) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    marked = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief.", **mark}]},
            {"role": "assistant", "content": ""},  # of an answer that was stopped
            {"role": "user", "content": "Hello", **mark},
        ],
        "tools": [{**TOOLS[0], **mark}],
        "max_tokens": 2,
    }
    assert http.post("/v1/chat/completions", json=marked).status_code == 200


def test_what_codex_and_claude_code_say_of_themselves_is_no_error(http: httpx.Client) -> None:
    codex = {"model": "demo", "input": "Hello", "store": False, "include": [], "client_metadata": {"x-codex-id": "1"}}
    assert http.post("/v1/responses", json=codex | {"max_output_tokens": 2}).status_code == 200
    edit = {"type": "clear_thinking_20251015", "keep": "all"}
    messages = {
        "model": "demo",
        "max_tokens": 2,
        "messages": [{"role": "user", "content": "Hello"}],
        "thinking": {"type": "adaptive"},
        "metadata": {"user_id": "1"},
    }
    answer = http.post("/v1/messages?beta=true", json=messages | {"context_management": {"edits": [edit]}})
    assert answer.status_code == 200, answer.text
    cleared = {"edits": [edit | {"keep": {"type": "thinking_turns", "value": 1}}]}
    assert http.post("/v1/messages", json=messages | {"context_management": cleared}).status_code == 400


def test_thinking_is_switched_by_one_word(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "enable_thinking": True, "max_tokens": 2}
    answer = http.post("/v1/chat/completions", json=body | {"thinking": {"type": "disabled"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "thinking.type"
    answer = http.post("/v1/chat/completions", json=body | {"thinking": {"type": "enabled", "budget_tokens": 9}})
    assert answer.status_code == 200  # this model does not reason: that is no longer than it may


@cache
def hidden_states(token_ids: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`[tokens, hidden]`: the final norm's outputs, by transformers."""
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.inference_mode():
        states: torch.Tensor = model(torch.tensor([token_ids])).last_hidden_state[0]
    return states.double().numpy()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_the_hidden_states_of_transformers(http: httpx.Client, pooling: str, normalize: bool) -> None:
    texts = ["A dark night", "It was raining, and nobody was there"]
    ids = [tuple(http.post("/tokenize", json={"prompt": text}).json()["tokens"]) for text in texts]
    body = {"model": "demo", "input": texts, "pooling": pooling, "normalize": normalize}
    numbers = http.post("/v1/embeddings", json=body).json()
    coded = http.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    assert (
        numbers["usage"] == coded["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    )
    for index, token_ids in enumerate(ids):
        states = hidden_states(token_ids)
        expected = states.mean(axis=0) if pooling == "mean" else states[-1]
        if normalize:
            expected = expected / np.linalg.norm(expected)
        vector = np.array(numbers["data"][index]["embedding"])
        np.testing.assert_allclose(vector, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        same = np.frombuffer(base64.b64decode(coded["data"][index]["embedding"]), "<f4")
        np.testing.assert_array_equal(same, vector.astype(np.float32))
        assert numbers["data"][index]["index"] == index


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}], ids=["as it comes", "float"])
def test_openai_s_client_embeds(client: openai.OpenAI, http: httpx.Client, encoding: dict[str, Any]) -> None:
    texts = ["A dark night", "It was raining, and nobody was there"]
    answer = client.embeddings.create(model="demo", input=texts, **encoding)
    expected = http.post("/v1/embeddings", json={"input": texts}).json()
    assert (answer.model, answer.object, answer.usage.model_dump()) == ("demo", "list", expected["usage"])
    assert [item.index for item in answer.data] == [0, 1]
    for item, same in zip(answer.data, expected["data"], strict=True):
        np.testing.assert_allclose(item.embedding, same["embedding"], rtol=1e-6)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input=texts)


def test_it_embeds_documents(http: httpx.Client) -> None:
    body = {"input": ["passage one", "passage two"], "model": "demo"}
    answer = http.post("/v1/embeddings", json=body, headers=HEADERS).json()
    assert [len(item["embedding"]) for item in answer["data"]] == [256, 256]
