"""Which field an error is about, and what is told of it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.openai.conftest import MAX_TOKENS

CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"
USER: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
LONG = "sea " * 9000
UNKNOWN = 10**6  # no token of the vocabulary
NOT: dict[str, Any] = {"not": {"type": "integer"}}
HUGE = {"enum": ["a" * 2**17]}


def schema_of(path: str, schema: Any) -> dict[str, Any]:
    if path == RESPONSES:
        return {"input": "a", "text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return {**(USER if path == CHAT else {"prompt": "a"}), "response_format": form}


def tools_of(path: str, *schemas: Any, **fields: Any) -> dict[str, Any]:
    functions = [{"name": f"tool_{index}", "parameters": schema} for index, schema in enumerate(schemas)]
    if path == RESPONSES:
        return {"input": "a", "tools": [{"type": "function", **function} for function in functions], **fields}
    return {**USER, "tools": [{"type": "function", "function": function} for function in functions], **fields}


GOOD = {"type": "object", "properties": {"a": {"type": "integer"}}}
BAD = {"type": "object", "properties": {"a": NOT}}
CASES: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
    (EMBEDDINGS, {"input": ""}, "input"),
    (COMPLETIONS, {"prompt": LONG}, "prompt"),
    (EMBEDDINGS, {"input": LONG}, "input"),
    (CHAT, {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    (RESPONSES, {"input": LONG}, "input"),
    *[(path, {**given, "logit_bias": {str(UNKNOWN): 1}}, "logit_bias")
      for path, given in ((COMPLETIONS, {"prompt": "a"}), (CHAT, USER), (RESPONSES, {"input": "a"}))],
    (CHAT, {**USER, "stop_token_ids": [UNKNOWN]}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    (CHAT, {**USER, "max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    (RESPONSES, {"input": "a", "max_output_tokens": 3, "min_tokens": 4}, "min_tokens"),
    (COMPLETIONS, {"prompt": [5] * MAX_TOKENS, "max_tokens": 1}, "prompt"),
    (COMPLETIONS, {"prompt": [5] * (MAX_TOKENS + 1), "max_tokens": 0, "echo": True}, "prompt"),
    (EMBEDDINGS, {"input": [5] * (MAX_TOKENS + 1)}, "input"),
    (EMBEDDINGS, {"input": [[5], [5, UNKNOWN]]}, "input"),
    *[(path, schema_of(path, schema), "response_format") for path in (COMPLETIONS, CHAT) for schema in (NOT, HUGE)],
    *[(RESPONSES, schema_of(RESPONSES, schema), "text.format") for schema in (NOT, HUGE)],
    (RESPONSES, schema_of(RESPONSES, {}) | tools_of(RESPONSES, GOOD, tool_choice="required"), "text.format"),
    *[(path, {**given, "structured_outputs": {"regex": "("}}, "structured_outputs.regex")
      for path, given in ((COMPLETIONS, {"prompt": "a"}), (CHAT, USER))],
    (CHAT, {**USER, "structured_outputs": {"regex": "a" * (2**17 + 1)}}, "structured_outputs.regex"),
    (CHAT, {**USER, "structured_outputs": {"json": HUGE}}, "structured_outputs.json"),
    (CHAT, {**USER, "guided_regex": "("}, "guided_regex"),
    (CHAT, {**USER, "guided_choice": ["a", ""]}, "guided_choice"),
    (CHAT, {**USER, "guided_grammar": "start: ("}, "guided_grammar"),
    (CHAT, {**USER, "guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
    (CHAT, tools_of(CHAT, GOOD, BAD, tool_choice="required"), "tools[1].function.parameters"),
    (RESPONSES, tools_of(RESPONSES, BAD, tool_choice="required"), "tools[0].parameters"),
    (CHAT, tools_of(CHAT, BAD) | schema_of(CHAT, GOOD), "tools[0].function.parameters"),
    (CHAT, tools_of(CHAT, GOOD) | schema_of(CHAT, NOT), "response_format"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), CASES)
def test_the_field_is_named(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    answer = http.post(path, json={"model": "demo", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (EMBEDDINGS, {}),
        (COMPLETIONS, {"max_tokens": 0, "echo": True}),
        (COMPLETIONS, {"max_tokens": 0, "prompt_logprobs": 0}),
    ],
)
@pytest.mark.parametrize("is_text", [False, True])
def test_a_prompt_that_no_token_follows_may_be_as_long_as_the_model_takes(
    http: httpx.Client, path: str, fields: dict[str, Any], is_text: bool
) -> None:
    token_ids = http.post("/tokenize", json={"prompt": LONG}).json()["tokens"][:MAX_TOKENS]
    prompt: Any = token_ids
    if is_text:
        prompt = http.post("/detokenize", json={"tokens": token_ids}).json()["prompt"]
        assert http.post("/tokenize", json={"prompt": prompt}).json()["count"] == MAX_TOKENS
    answer = http.post(path, json={"input" if path == EMBEDDINGS else "prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == MAX_TOKENS


def test_how_many_prompts_there_may_be_and_what_says_so(http: httpx.Client) -> None:
    told = {
        path: http.post(path, json={name: ["a"] * 2049}).json()["error"]["message"]
        for path, name in ((EMBEDDINGS, "input"), (COMPLETIONS, "prompt"))
    }
    assert "at most 2048." in told[EMBEDDINGS] and "server." not in told[EMBEDDINGS]
    assert "256 (server.max_batch_prompts)" in told[COMPLETIONS]


def test_a_tool_that_cannot_be_followed_is_named_without_the_rules_around_it(http: httpx.Client) -> None:
    body = tools_of(CHAT, GOOD, BAD, tool_choice="required")
    message = http.post(CHAT, json=body).json()["error"]["message"]
    assert "tools[1].function.parameters" in message and "tool_1" in message and "not" in message
    assert "start:" not in message and "call_" not in message


def test_tools_that_are_too_much_together(http: httpx.Client) -> None:
    many = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 9999991}}}
    error = http.post(CHAT, json=tools_of(CHAT, many, tool_choice="required")).json()["error"]
    assert error["param"] == "tools" and "start:" not in error["message"]


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": [{"role": "user", "content": LONG}]})])
def test_a_context_that_is_too_long_has_openai_s_code(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert http.post(path, json=body).json()["error"]["code"] == "context_length_exceeded"
