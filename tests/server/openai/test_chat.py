"""`/v1/chat/completions`, by OpenAI's client and by LangChain's."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import httpx
import pytest

from tests.lazy import Lazy

openai = Lazy("openai")

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of the sea."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "additionalProperties": False}},
}
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"enum": ["Ann", "Bo"]}},
    "required": ["age", "name"],
    "additionalProperties": False,
}


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "demo", "messages": MESSAGES, "max_completion_tokens": 12, **fields}
    )


def test_a_chat_is_what_the_template_makes_of_it(client: openai.OpenAI, http: httpx.Client) -> None:
    token_ids = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    same = client.completions.create(
        model="demo", prompt=token_ids, max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
    )
    completion = ask(client, temperature=0, logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True})
    [choice] = completion.choices
    assert completion.object == "chat.completion"
    assert choice.token_ids == same.choices[0].token_ids  # type: ignore[attr-defined]
    assert choice.message.role == "assistant"
    assert choice.message.content == same.choices[0].text.lstrip()
    assert completion.prompt_token_ids == token_ids
    content = choice.logprobs.content
    assert len(content) == completion.usage.completion_tokens
    assert all(bytes(entry.bytes).decode(errors="ignore") in entry.token for entry in content)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    assert 0 < completion.usage.prompt_tokens_details.cached_tokens < len(token_ids)  # the same prompt was there before


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole(client: openai.OpenAI, n: int) -> None:
    whole = ask(client, n=n, seed=5, logprobs=True)
    chunks = list(ask(client, n=n, seed=5, logprobs=True, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert all(item.delta.role is None for item in mine[1:])
        assert "".join(item.delta.content or "" for item in mine) == choice.message.content
        assert [item.finish_reason for item in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        parts = [entry for item in mine if item.logprobs for entry in item.logprobs.content]
        assert parts == choice.logprobs.content


def test_the_stream_helper_of_the_client_takes_it(client: openai.OpenAI) -> None:
    choice = {"guided_choice": ["yes", "no"]}
    with client.chat.completions.stream(model="demo", messages=MESSAGES, seed=1, extra_body=choice) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert kinds >= {"content.delta", "content.done"}
    assert final.choices[0].message.content in ("yes", "no")


def test_the_asynchronous_client(demo_url: str, client: openai.OpenAI) -> None:
    async def chat() -> str:
        async with openai.AsyncOpenAI(base_url=demo_url + "/v1", api_key="none", max_retries=0) as other:
            stream = await other.chat.completions.create(
                model="demo", messages=MESSAGES, max_completion_tokens=8, seed=1, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(chat()) == ask(client, max_completion_tokens=8, seed=1).choices[0].message.content


def test_json_by_schema(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for choice in ask(client, response_format=schema, n=3, max_completion_tokens=100, frequency_penalty=2).choices:
        assert choice.message.content.lstrip().startswith("{")
        if choice.finish_reason == "stop":  # a model this small may write spaces without end
            person = json.loads(choice.message.content)
            assert person.keys() == {"age", "name"} and person["name"] in ("Ann", "Bo")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("is_stream", [False, True])
def test_calls_that_are_asked_for(client: openai.OpenAI, choice: Any, is_stream: bool) -> None:
    fields: dict[str, Any] = {
        "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_completion_tokens": 100,
        "seed": 2,
    }  # fmt: skip
    reason = "tool_calls" if choice == "required" else "stop"
    if is_stream:
        chunks = [chunk.choices[0] for chunk in ask(client, stream=True, **fields)]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert {call.index for call in calls} == {0}
        assert calls[0].id and calls[0].type == "function" and calls[0].function.name == "get_weather"
        assert all(call.id is None and call.function.name is None for call in calls[1:])
        arguments, last = "".join(call.function.arguments for call in calls), chunks[-1].finish_reason
    else:
        [answer] = ask(client, **fields).choices
        [call] = answer.message.tool_calls
        assert answer.message.content is None
        assert call.function.name == "get_weather"
        arguments, last = call.function.arguments, answer.finish_reason
    parsed = json.loads(arguments)
    assert parsed["city"] in ("Paris", "Rome") and 1 <= parsed["days"] <= 9
    assert last == reason


def test_no_calls_where_none_are_wanted(client: openai.OpenAI, http: httpx.Client) -> None:
    plain = ask(client, temperature=0)
    without = ask(client, temperature=0, tools=[WEATHER, TIME], tool_choice="none")
    assert without.choices[0].message == plain.choices[0].message
    assert without.usage.prompt_tokens == plain.usage.prompt_tokens
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]},
    }
    message = ask(client, tools=[WEATHER, TIME], tool_choice=allowed, max_completion_tokens=60).choices[0].message
    assert {call.function.name for call in message.tool_calls} == {"get_time"}


def test_a_conversation_with_tools_goes_on(client: openai.OpenAI) -> None:
    message = ask(
        client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_completion_tokens=100
    ).choices[0].message  # fmt: skip
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": [{"type": "text", "text": "Sun."}]}
    again = ask(client, messages=[*MESSAGES, message, result], tools=[WEATHER])
    assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_a_message_is_continued(client: openai.OpenAI, http: httpx.Client) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "The sea is"}]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    tokens = http.post("/tokenize", json={"messages": begun, **fields}).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text.endswith("The sea is")
    completion = ask(client, messages=begun, extra_body=fields, temperature=0, max_completion_tokens=3)
    assert completion.usage.prompt_tokens == len(tokens)


def test_what_is_accepted_and_asks_for_nothing(client: openai.OpenAI) -> None:
    completion = ask(
        client, user="u", store=False, metadata={"a": "b"}, service_tier="auto", prompt_cache_key="k",
        safety_identifier="s", modalities=["text"], verbosity="medium", logit_bias={}, presence_penalty=0, stop=None,
        functions=openai.omit, response_format={"type": "text"}, reasoning_effort="none",
    )  # fmt: skip
    assert completion.metadata == {"a": "b"}
    assert completion.service_tier == "default"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"store": True}, "store"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "messages"),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "messages[1].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"n": 0}, "n"),
    ({"temprature": 1}, "temprature"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"continue_final_message": True}, "continue_final_message"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[f"{item[1]}-{index}" for index, item in enumerate(REFUSED)])
def test_what_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=MESSAGES, extra_body=fields)
    assert caught.value.param == param
    assert param.partition("[")[0] in caught.value.message or "message" in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_errors_have_openais_shape(client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(client, messages=[{"role": "user", "content": "night " * 4000}])
    assert too_long.value.code == "context_length_exceeded"
    for method, path, status in (("GET", "/v1/chat/completions", 405), ("POST", "/v1/nowhere", 404)):
        response = http.request(method, path, json={} if method == "POST" else None)
        assert response.status_code == status
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert http.get("/nowhere").json()["error"].keys() == {"type", "message"}
    stream = http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True, "n": 10_000})
    assert stream.status_code == 400


class TestLangChain:
    @pytest.fixture
    def model(self, demo_url: str) -> Any:
        from langchain_openai import ChatOpenAI
        from pydantic import SecretStr

        return ChatOpenAI(
            model="demo", base_url=demo_url + "/v1", api_key=SecretStr("none"), max_completion_tokens=100,
            max_retries=0, seed=2, stream_usage=True,
        )  # fmt: skip

    def test_invoke_and_stream(self, model: Any) -> None:
        answer = model.invoke("Tell me of the sea.")
        assert answer.content
        assert answer.usage_metadata["output_tokens"] > 0
        assert "".join(chunk.content for chunk in model.stream("Tell me of the sea.")) == answer.content

    def test_bind_tools(self, model: Any) -> None:
        def get_weather(city: Literal["Paris", "Rome"]) -> str:
            """The weather of a city."""
            return city

        answer = model.bind_tools([get_weather], tool_choice="get_weather").invoke("The weather in Rome?")
        assert [call["name"] for call in answer.tool_calls][:1] == ["get_weather"]

    @pytest.mark.parametrize("method", ["json_schema", "function_calling"])
    def test_structured_output(self, model: Any, method: str) -> None:
        schema = {**PERSON, "title": "Person", "description": "Somebody"}
        structured = model.with_structured_output(schema, method=method, include_raw=True)
        answer = structured.invoke("Who is there?")
        if answer["parsing_error"] is None and answer["parsed"] is not None:
            assert answer["parsed"].keys() == {"age", "name"}
        else:
            assert answer["raw"].response_metadata["finish_reason"] == "length"
