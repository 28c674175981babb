"""`/v1/responses`, by OpenAI's client: every event is one of its types."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.lazy import Lazy

openai = Lazy("openai")

TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def respond(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(
        **{"model": "demo", "input": "Tell me of the sea.", "max_output_tokens": 12, **fields}
    )


def test_a_response_is_the_chat_completion(client: openai.OpenAI) -> None:
    response = respond(client, instructions="Be brief.", temperature=0, metadata={"a": "b"})
    chat = client.chat.completions.create(
        model="demo", temperature=0, max_completion_tokens=12,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of the sea."}],
    )  # fmt: skip
    assert response.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.store, response.metadata, response.previous_response_id) == (False, {"a": "b"}, None)
    assert respond(client, store=True).store is False
    assert respond(client, reasoning={"effort": "high"}).reasoning.effort is None  # this model cannot be told


def test_events_put_together_are_the_response(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 0, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    whole = respond(client, **fields)
    events = list(respond(client, stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-1].response.output_text
    assert sum(len(event.logprobs) for event in deltas) == len(whole.output[0].content[0].logprobs) > 0
    assert events[-1].response.usage == whole.usage
    assert events[2].item.content == []


def test_the_stream_helper_of_the_client_takes_it(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="demo", input="Weather?", tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
        max_output_tokens=80, temperature=0,
    ) as stream:  # fmt: skip
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    [call] = [item for item in final.output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")


def test_a_conversation_goes_on_with_its_own_items(client: openai.OpenAI) -> None:
    first = respond(client, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=80)
    call = first.output[-1]
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        *[item.model_dump() for item in first.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sun."},
    ]
    second = respond(client, input=items, tools=[TOOL])
    more = [*items, *[item.model_dump() for item in second.output], {"role": "user", "content": "?"}]
    third = respond(client, input=more, tools=[TOOL])
    assert third.usage.input_tokens > second.usage.input_tokens > first.usage.input_tokens


def test_text_formats(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    text: Any = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    response = respond(client, text=text, max_output_tokens=100)
    if response.status == "completed":
        assert json.loads(response.output_text) == {"a": 1}
    assert response.text.format.schema_ == schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"n": 2}, "n"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user", "content": "x", "foo": 1}]}, "input[0].foo"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "foo": 1}]}]},
            "input[0].content[0].foo",
        ),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b"}]}, "input[0].arguments"),
    ],
)
def test_what_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="demo", input="x", extra_body=fields)
    assert caught.value.param == param
