"""Which field an error is about, and what is told of it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

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
