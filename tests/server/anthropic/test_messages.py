"""The Messages interface, judged by Anthropic's own client."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from amalgam.engine.generation_config import ModelDefaults
from amalgam.engine.params import SamplingParams, ThinkingLimit
from amalgam.engine.request import FinishReason, Observation, RequestOutput, Usage
from amalgam.server.api.chats import EncodedChat
from amalgam.server.api.common import ToolUse
from amalgam.text.answers.format import AnswerFormat
from amalgam.text.answers.registry import answer_format, tool_formats
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO
from tests.lazy import Lazy
from tests.server.conftest import serving, wait_until, wait_until_ready
from tests.server.fakes import FakeDeployment, FakeEngine, fake_settings

anthropic = Lazy("anthropic")

TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
HI = [{"role": "user", "content": "hi"}]


@dataclass
class ScriptedEngine(FakeEngine):
    """Answers with `answer`, three characters a step."""

    answer: str = "Hello there."
    reason: FinishReason = FinishReason.STOP
    stopped_by: str | None = None
    error: Exception | None = None
    num_cached: int = 0
    num_closed: int = 0
    prompts: list[str] = field(default_factory=list)
    constraints: list[Any] = field(default_factory=list)
    prompt_ids: list[list[int]] = field(default_factory=list)

    @property
    def max_prompt_tokens(self) -> int:
        return 2000

    def check_prompt_length(self, num_tokens: int, num_new_tokens: int = 1) -> None:
        pass

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        observation: Observation,
        constraint: Any = None,
        version: Any = None,
    ) -> AsyncIterator[RequestOutput]:
        self.params.append(params)
        self.prompt_ids.append(list(prompt_ids))
        self.constraints.append(constraint)
        return self._script(prompt_ids)

    async def _script(self, prompt_ids: Sequence[int]) -> AsyncIterator[RequestOutput]:
        try:
            for start in range(0, len(self.answer), 3):
                await asyncio.sleep(self.step_seconds)
                yield RequestOutput(1, self.answer[start : start + 3], (start,))
            usage = Usage(len(prompt_ids), 1, 0.0, 0.0, 0.0, 1, self.num_cached)
            yield RequestOutput(1, "", (9,), self.reason, self.error, usage, stopped_by=self.stopped_by)
        finally:
            self.num_closed += 1


THINK_ID, END_ID = 8192, 8193


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The demo's, and the marks of reasoning are tokens, as in models that were trained to reason."""
    return tokenizer_with(tmp_path_factory.mktemp("thinking"), {"<think>": THINK_ID, "</think>": END_ID})


def tokenizer_with(folder: Path, marks: Mapping[str, int], *, special: bool = False) -> Tokenizer:
    fields = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    added = [
        {**fields["added_tokens"][0], "id": token_id, "content": mark, "special": special}
        for mark, token_id in marks.items()
    ]
    fields["added_tokens"] += added
    (folder / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return Tokenizer.load(folder, None, TEMPLATE)


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedEngine]]:
    engine = ScriptedEngine()
    with serving(fake_settings(port=0), lambda: FakeDeployment(engine, tokenizer_override=tokenizer)) as base_url:
        wait_until_ready(base_url)
        yield base_url, engine


@pytest.fixture
def url(served: tuple[str, ScriptedEngine]) -> str:
    return served[0]


@pytest.fixture
def engine(served: tuple[str, ScriptedEngine]) -> ScriptedEngine:
    ScriptedEngine.__init__(served[1])  # as if it were new
    return served[1]


@pytest.fixture(scope="module")
def client(served: tuple[str, ScriptedEngine]) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served[0], api_key="none", max_retries=0)


def prompt_of(engine: ScriptedEngine, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(engine.prompt_ids[-1], keeps_special_tokens=True)


class TestMessages:
    def test_a_message(self, client: anthropic.Anthropic, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
        engine.num_cached = 3
        message = client.messages.create(model="fake", max_tokens=99, messages=HI, system="Be brief.")
        assert [block.to_dict() for block in message.content] == [
            {"type": "text", "text": "Hello there.", "citations": None}
        ]
        assert (message.role, message.type, message.model) == ("assistant", "message", "fake")
        assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
        usage = message.usage
        assert usage.input_tokens + 3 == len(engine.prompt_ids[0]) and usage.cache_read_input_tokens == 3
        assert usage.output_tokens == 5
        assert prompt_of(engine, tokenizer) == "[system]Be brief.[user]hi[assistant]"

    def test_sampling(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        engine.answer, engine.stopped_by = "1, 2", ", 3"
        message = client.messages.create(
            model="fake", max_tokens=7, messages=HI, stop_sequences=[", 3"],
            metadata={"user_id": "u"}, service_tier="auto", extra_body={"temperature": 0.5, "top_p": 0.8, "top_k": 4},
        )  # fmt: skip
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ", 3")
        [params] = engine.params
        assert (params.max_new_tokens, params.stop, params.temperature, params.top_p, params.top_k) == (
            7, (", 3",), 0.5, 0.8, 4,
        )  # fmt: skip
        assert not params.continues_prompt

    def test_without_a_word_sampling_changes_no_probabilities(
        self, client: anthropic.Anthropic, engine: ScriptedEngine
    ) -> None:
        client.messages.create(model="fake", max_tokens=7, messages=HI)
        params = engine.params[0]
        assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)

    def test_what_the_model_says_of_sampling_holds(self, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
        said = ModelDefaults(from_model={"temperature": 0.5, "top_k": 20})
        open_model = partial(FakeDeployment, engine, tokenizer_override=tokenizer, defaults=said)
        with serving(fake_settings(port=0), open_model) as url:
            wait_until_ready(url)
            httpx.post(
                url + "/v1/messages", json={"model": "fake", "max_tokens": 7, "messages": HI, "top_k": 3}, timeout=60
            )
        params = engine.params[0]
        assert (params.temperature, params.top_p, params.top_k) == (0.5, 1.0, 3)

    def test_the_id_of_a_request(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        found = client.messages.with_raw_response.create(model="fake", max_tokens=7, messages=HI)
        assert found.parse()._request_id == found.headers["x-request-id"] == found.headers["request-id"]
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(model="fake", max_tokens=0, messages=HI)
        assert caught.value.request_id == caught.value.body["request_id"]

    def test_the_end_by_length(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        engine.reason = FinishReason.LENGTH
        assert client.messages.create(model="fake", max_tokens=1, messages=HI).stop_reason == "max_tokens"

    def test_a_prefilled_answer_goes_on(
        self, client: anthropic.Anthropic, engine: ScriptedEngine, tokenizer: Tokenizer
    ) -> None:
        messages = [*HI, {"role": "assistant", "content": "The answer is ("}]
        client.messages.create(model="fake", max_tokens=9, messages=messages)
        assert prompt_of(engine, tokenizer) == "[user]hi[assistant]The answer is ("
        assert engine.params[0].continues_prompt

    def test_blocks_and_a_system_message_within(
        self, client: anthropic.Anthropic, engine: ScriptedEngine, tokenizer: Tokenizer
    ) -> None:
        cached = {"cache_control": {"type": "ephemeral"}}
        client.messages.create(
            model="fake",
            max_tokens=9,
            system=[{"type": "text", "text": "a", **cached}, {"type": "text", "text": "b"}],
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "c", **cached}, {"type": "text", "text": "d"}]},
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"},
                                                  {"type": "text", "text": "e"}]},
                {"role": "system", "content": "f"},
                *HI,
            ],
        )  # fmt: skip
        wanted = "[system]a\nb[user]c\nd[assistant]<think>hm</think>e[system]f[user]hi[assistant]"
        assert prompt_of(engine, tokenizer) == wanted


class TestStreams:
    def test_events_are_as_published(self, url: str, engine: ScriptedEngine) -> None:
        engine.answer = f"<think>\nhm</think>\n\nLook.{CALL}"
        body = {"model": "fake", "max_tokens": 9, "messages": HI, "tools": [WEATHER], "stream": True}
        answer = httpx.post(url + "/v1/messages?beta=true", json=body, timeout=60)
        assert answer.headers["content-type"].startswith("text/event-stream")
        pairs = [chunk.split("\n") for chunk in answer.text.strip().split("\n\n")]
        names = [lines[0].removeprefix("event: ") for lines in pairs]
        events = [json.loads(lines[1].removeprefix("data: ")) for lines in pairs]
        assert names == [fields["type"] for fields in events]
        assert names[:2] == ["message_start", "ping"] and names[-2:] == ["message_delta", "message_stop"]
        started = events[0]["message"]
        assert started["content"] == [] and started["stop_reason"] is None and started["usage"]["output_tokens"] == 0
        blocks = [fields["content_block"]["type"] for fields in events if fields["type"] == "content_block_start"]
        assert blocks == ["thinking", "text", "tool_use"]
        kinds = [fields["delta"]["type"] for fields in events if fields["type"] == "content_block_delta"]
        assert list(dict.fromkeys(kinds)) == ["thinking_delta", "signature_delta", "text_delta", "input_json_delta"]
        indexes = [fields["index"] for fields in events if "index" in fields]
        assert indexes == sorted(indexes) and names.count("content_block_stop") == 3

    def test_the_client_puts_it_together(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        engine.answer = f"<think>\nhm</think>\n\nLook.{CALL}"
        options: Any = {"model": "fake", "max_tokens": 99, "messages": HI, "tools": [WEATHER]}
        with client.messages.stream(**options) as stream:
            assert "".join(stream.text_stream) == "Look."
            streamed = stream.get_final_message()
        whole = client.messages.create(**options)
        for message in (streamed, whole):
            thought, text, call = message.content
            assert (thought.type, text.type, call.type) == ("thinking", "text", "tool_use")
            assert thought.thinking == "hm" and thought.signature and text.text == "Look."
            assert (call.name, call.input) == ("get_weather", {"city": "Zürich"})
            assert message.stop_reason == "tool_use"
        assert streamed.usage.output_tokens == whole.usage.output_tokens

    def test_an_error_in_the_middle(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        engine.reason, engine.error = FinishReason.ERROR, RuntimeError("broken")
        with (
            pytest.raises(anthropic.APIStatusError) as caught,
            client.messages.stream(model="fake", max_tokens=9, messages=HI) as stream,
        ):
            stream.until_done()
        assert caught.value.body["error"]["type"] == "api_error"

    def test_who_leaves_ends_the_request(self, url: str, engine: ScriptedEngine) -> None:
        engine.answer, engine.step_seconds = "abc" * 100_000, 0.001
        body = {"model": "fake", "max_tokens": 9, "messages": HI, "stream": True}
        with httpx.stream("POST", url + "/v1/messages", json=body, timeout=60) as answer:
            next(answer.iter_bytes())
        wait_until(lambda: engine.num_closed == 1)


class TestTools:
    def test_a_conversation_with_calls(
        self, client: anthropic.Anthropic, engine: ScriptedEngine, tokenizer: Tokenizer
    ) -> None:
        engine.answer = CALL
        first = client.messages.create(model="fake", max_tokens=99, messages=HI, tools=[WEATHER])
        [call] = first.content
        assert call.type == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
        engine.answer = "It rains."
        second = client.messages.create(
            model="fake", max_tokens=99, tools=[WEATHER], tool_choice={"type": "auto"},
            messages=[*HI, {"role": "assistant", "content": first.content},
                      {"role": "user", "content": [result, {"type": "text", "text": "so?"}]}],
        )  # fmt: skip
        assert second.stop_reason == "end_turn"
        function = {"name": "get_weather", "description": "Tells the weather", "parameters": WEATHER["input_schema"]}
        prompt = prompt_of(engine, tokenizer)
        assert json.dumps({"type": "function", "function": function}, ensure_ascii=False) in prompt
        assert prompt.endswith('"arguments": {"city": "Zürich"}}[tool]rain[user]so?[assistant]')

    @pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
    def test_a_call_can_be_demanded(
        self, client: anthropic.Anthropic, engine: ScriptedEngine, choice: dict[str, str]
    ) -> None:
        engine.answer = CALL
        tool = {**WEATHER, "strict": True}
        client.messages.create(model="fake", max_tokens=99, messages=HI, tools=[tool], tool_choice=choice)
        assert engine.constraints[0] is not None

    def test_none_offers_no_tools(
        self, client: anthropic.Anthropic, engine: ScriptedEngine, tokenizer: Tokenizer
    ) -> None:
        engine.answer = CALL
        message = client.messages.create(
            model="fake", max_tokens=9, messages=HI, tools=[WEATHER], tool_choice={"type": "none"}
        )
        assert [block.type for block in message.content] == ["text"]
        assert prompt_of(engine, tokenizer) == "[user]hi[assistant]"

    @pytest.mark.parametrize("stream", [False, True])
    def test_one_call_only(self, client: anthropic.Anthropic, engine: ScriptedEngine, stream: bool) -> None:
        engine.answer = f"{CALL}\n{CALL}"
        choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
        options: Any = {
            "model": "fake", "max_tokens": 9, "messages": HI, "tools": [WEATHER], "tool_choice": choice,
        }  # fmt: skip
        if stream:
            with client.messages.stream(**options) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(**options)
        assert [block.type for block in message.content] == ["tool_use"] and message.stop_reason == "tool_use"
        wait_until(lambda: engine.num_closed == 1)

    def test_strict_tools_bind_the_calls_of_an_answer_that_need_not_have_any(
        self, client: anthropic.Anthropic, engine: ScriptedEngine, tokenizer: Tokenizer
    ) -> None:
        form: Any = {"format": {"type": "json_schema", "schema": {"const": {"a": 1}}}}
        asked: list[dict[str, Any]] = [
            {"tools": [{**WEATHER, "strict": True}]},
            {"tools": [WEATHER], "output_config": form},
            {"tools": [WEATHER]},
        ]
        for fields in asked:
            client.messages.create(model="fake", max_tokens=9, messages=HI, **fields)
        strict, formed, free = engine.constraints
        assert free is None

        def allows(constraint: Any, text: str) -> bool:
            token_ids = [*itertools.chain(*tokenizer.encode_by_piece(text, 99, add_special_tokens=False))]
            return bool(constraint.start().num_valid(token_ids) == len(token_ids))

        wrong = CALL.replace('"city"', '"town"')
        assert allows(strict, f"Let me see. {CALL}") and not allows(strict, f"Let me see. {wrong}")
        assert allows(formed, CALL) and allows(formed, '{"a": 1}') and not allows(formed, "Let me see.")

    def test_a_call_that_is_cut_is_text(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        engine.answer, engine.reason = CALL[:60], FinishReason.LENGTH
        message = client.messages.create(model="fake", max_tokens=9, messages=HI, tools=[WEATHER])
        assert message.stop_reason == "max_tokens"
        [block] = message.content
        assert block.type == "text" and block.text.startswith('get_weather({"city": "')


CUT = CALL[: CALL.index("}}")]


@pytest.mark.parametrize(
    ("reason", "stopped_by", "ends"),
    [
        (FinishReason.STOP, "}", ("stop", "incomplete", None, "stop_sequence")),
        (FinishReason.STOP, None, ("stop", "incomplete", None, "end_turn")),
        (FinishReason.LENGTH, None, ("length", "incomplete", "max_output_tokens", "max_tokens")),
        (FinishReason.CONTENT_FILTER, None, ("content_filter", "incomplete", "content_filter", "refusal")),
    ],
)
class TestCalls:
    """That are cut, in each interface: by a stop string, by the model, by a limit, by a filter."""

    @pytest.fixture(autouse=True)
    def _cut(self, engine: ScriptedEngine, reason: FinishReason, stopped_by: str | None) -> None:
        engine.answer, engine.reason, engine.stopped_by = CUT, reason, stopped_by

    def chat(self, url: str, *, stream: bool) -> list[dict[str, Any]]:
        tools = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER["input_schema"]}}]
        body = {"messages": HI, "tools": tools, "stream": stream}
        return answers_of(httpx.post(url + "/v1/chat/completions", json=body, timeout=60))

    def responses(self, url: str, *, stream: bool) -> list[dict[str, Any]]:
        tools = [{"type": "function", "name": "get_weather", "parameters": WEATHER["input_schema"]}]
        body = {"model": "fake", "input": "hi", "tools": tools, "stream": stream}
        return answers_of(httpx.post(url + "/v1/responses", json=body, timeout=60))

    def test_chat(self, url: str, ends: tuple[Any, ...]) -> None:
        [answer] = self.chat(url, stream=False)
        [choice] = answer["choices"]
        assert choice["message"]["content"] == 'get_weather({"city": "Zürich"'
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == ends[0]

    def test_a_stream_of_chat(self, url: str, ends: tuple[Any, ...]) -> None:
        chunks = self.chat(url, stream=True)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == ends[0]

    @pytest.mark.parametrize("stream", [False, True])
    def test_responses(self, url: str, ends: tuple[Any, ...], stream: bool) -> None:
        last = self.responses(url, stream=stream)[-1]
        response = last["response"] if stream else last
        [call] = response["output"]
        assert (call["type"], call["status"]) == ("function_call", "incomplete")
        assert (response["status"], response["incomplete_details"]["reason"]) == ends[1:3]
        if stream:
            assert last["type"] == "response.incomplete"

    @pytest.mark.parametrize("stream", [False, True])
    def test_messages(self, url: str, ends: tuple[Any, ...], stopped_by: str | None, stream: bool) -> None:
        body = {
            "model": "fake", "max_tokens": 99, "messages": HI, "tools": [WEATHER], "stream": stream,
            "stop_sequences": [stopped_by] if stopped_by else [],
        }  # fmt: skip
        answers = answers_of(httpx.post(url + "/v1/messages", json=body, timeout=60))
        if stream:
            assert [answer["delta"]["stop_reason"] for answer in answers if answer["type"] == "message_delta"] == [
                ends[3]
            ]
        else:
            assert answers[0]["stop_reason"] == ends[3]
            assert [block["type"] for block in answers[0]["content"]] == ["text"]

    def test_calls_before_it_stay(self, url: str, engine: ScriptedEngine, ends: tuple[Any, ...]) -> None:
        engine.answer = CALL + CUT
        [answer] = self.chat(url, stream=False)
        [choice] = answer["choices"]
        [call] = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Zürich"}
        assert choice["message"]["content"] == 'get_weather({"city": "Zürich"'
        assert choice["finish_reason"] == ("tool_calls" if ends[0] == "stop" else ends[0])
        [answer] = self.responses(url, stream=False)
        assert [item["status"] for item in answer["output"]] == ["completed", "incomplete"]


def answers_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The answer, or the events of its stream."""
    if response.headers["content-type"] == "application/json":
        return [response.json()]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


class TestThinking:
    def test_the_template_is_told(
        self, client: anthropic.Anthropic, engine: ScriptedEngine, tokenizer: Tokenizer
    ) -> None:
        engine.answer = "hm</think>\nYes."
        for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
            message = client.messages.create(model="fake", max_tokens=2048, messages=HI, thinking=thinking)
            assert prompt_of(engine, tokenizer).endswith("<think>\n")
            assert [block.type for block in message.content] == ["thinking", "text"]
            assert message.usage.output_tokens_details.thinking_tokens > 0
        client.messages.create(model="fake", max_tokens=9, messages=HI, thinking={"type": "disabled"})
        assert prompt_of(engine, tokenizer).endswith("[assistant]")

    def test_a_budget_is_a_limit(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        thinking: Any = {"type": "enabled", "budget_tokens": 1024}
        client.messages.create(model="fake", max_tokens=2048, messages=HI, thinking=thinking)
        client.messages.create(model="fake", max_tokens=2048, messages=HI, thinking={"type": "adaptive"})
        assert [params.thinking for params in engine.params] == [ThinkingLimit(1024, END_ID), None]

    def test_openai_s_interface_has_it_under_two_names(self, url: str, engine: ScriptedEngine) -> None:
        def ask(**fields: Any) -> httpx.Response:
            return httpx.post(url + "/v1/chat/completions", json={"messages": HI, **fields}, timeout=60)

        assert ask(thinking_token_budget=0).status_code == 200
        assert ask(thinking={"type": "enabled", "budget_tokens": 5}).status_code == 200
        limits = [params.thinking for params in engine.params]
        assert limits == [ThinkingLimit(0, END_ID, (THINK_ID,)), ThinkingLimit(5, END_ID)]
        both = ask(thinking_token_budget=0, thinking={"type": "enabled", "budget_tokens": 5})
        assert (both.status_code, both.json()["error"]["param"]) == (400, "thinking.budget_tokens")

    def test_it_holds_where_reasoning_stays_content(self, tokenizer: Tokenizer) -> None:
        form = answer_format(tokenizer.chat_template, tokenizer.special_tokens, reasoning_parser="none")
        chats = [
            EncodedChat([1], None, form, ToolUse(), tokenizer, end) for end in ("[assistant]<think>\n", "[assistant]")
        ]
        limits = [chat.thinking_limit(5, "thinking_token_budget") for chat in chats]
        assert limits == [ThinkingLimit(5, END_ID), ThinkingLimit(5, END_ID, (THINK_ID,))]

    def test_messages_of_gpt_oss_are_limited_by_their_special_tokens(self, tmp_path: Path) -> None:
        marks = {
            mark: 8192 + place for place, mark in enumerate(("<|channel|>", "<|message|>", "<|end|>", "<|start|>"))
        }
        tokenizer = tokenizer_with(tmp_path, marks, special=True)
        form = AnswerFormat(tool_formats()["gpt_oss"], None, tokenizer.special_tokens)
        chat = EncodedChat([1], None, form, ToolUse(), tokenizer, "<|start|>assistant")
        start_ids = tuple(tokenizer.encode("<|channel|>analysis<|message|>"))
        assert {8192, 8193} < set(start_ids)
        assert chat.thinking_limit(7, "thinking_token_budget") == ThinkingLimit(7, 8194, start_ids)

    def test_it_can_be_left_out(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        engine.answer = "hm</think>\nYes."
        thinking: Any = {"type": "adaptive", "display": "omitted"}
        message = client.messages.create(model="fake", max_tokens=9, messages=HI, thinking=thinking)
        thought, text = message.content
        assert thought.type == "thinking" and thought.thinking == "" and thought.signature
        assert text.type == "text" and text.text == "Yes."

    def test_a_schema_for_the_answer(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        form: Any = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
        client.messages.create(model="fake", max_tokens=9, messages=HI, output_config=form)
        assert engine.constraints[0] is not None

    def test_a_schema_binds_what_follows_the_reasoning(
        self, client: anthropic.Anthropic, engine: ScriptedEngine, tokenizer: Tokenizer
    ) -> None:
        engine.answer = "hm</think>\n{}"
        form: Any = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
        client.messages.create(
            model="fake", max_tokens=9, messages=HI, output_config=form, thinking={"type": "adaptive"}
        )
        token_ids = tokenizer.encode(engine.answer)
        assert engine.constraints[0].start().num_valid(token_ids) == len(token_ids)


class TestClients:
    """What Anthropic's own clients send."""

    def test_a_tool_runner(self, client: anthropic.Anthropic, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
        engine.answer = CALL

        def get_weather(city: str) -> str:
            """Tells the weather."""
            engine.answer = "It rains."
            return f"rain in {city}"

        runner = client.beta.messages.tool_runner(
            model="fake", max_tokens=99, messages=HI, tools=[anthropic.beta_tool(get_weather)]
        )
        message = runner.until_done()
        assert message.content[0].to_dict() == {"type": "text", "text": "It rains.", "citations": None}
        assert prompt_of(engine, tokenizer).endswith("[tool]rain in Zürich[assistant]")

    @pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
    def test_nothing_is_stored(self, client: anthropic.Anthropic, thread: dict[str, Any]) -> None:
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(model="fake", max_tokens=9, messages=HI, extra_body={"thread": thread})
        assert caught.value.body["error"]["details"] == {
            "error_code": "thread_unsupported_request", "unsupported": ["thread"],
        }  # fmt: skip

    @pytest.mark.parametrize(
        "fields",
        [
            dict.fromkeys(
                (
                    *("billing_policy", "cache_control", "compaction", "container", "context_management"),
                    *("diagnostics", "fallback_credit_token", "fallbacks", "inference_geo", "mcp_servers"),
                    *("speed", "thread", "user_profile_id", "workspace_id"),
                )
            ),
            {
                "mcp_servers": [],
                "fallbacks": [],
                "inference_geo": "global",
                "diagnostics": {"previous_message_id": None},
            },
            {"output_config": {"effort": None, "format": None, "task_budget": None}},
            {"thinking": {"type": "adaptive", "display": None, "block_binding": {}}},
            {"tools": [{**WEATHER, "input_examples": [], "cache_control": None, "type": None}]},
        ],
    )
    def test_what_asks_for_nothing(
        self, client: anthropic.Anthropic, engine: ScriptedEngine, fields: dict[str, Any]
    ) -> None:
        message = client.messages.create(model="fake", max_tokens=9, messages=HI, extra_body=fields)
        assert message.stop_reason == "end_turn"

    def test_a_call_of_the_model_itself(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        def ask(caller: dict[str, Any]) -> None:
            call: Any = {
                "type": "tool_use", "id": "t1", "name": "get_weather", "input": {}, "caller": caller,
                "toolset_name": None,
            }  # fmt: skip
            result: Any = {"type": "tool_result", "tool_use_id": "t1", "content": "rain", "toolset_name": None}
            messages: Any = [
                *HI, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]},
            ]  # fmt: skip
            client.messages.create(model="fake", max_tokens=9, messages=messages)

        ask({"type": "direct"})
        with pytest.raises(anthropic.BadRequestError) as caught:
            ask({"type": "code_execution_20250825", "tool_id": "x"})
        assert "messages[1].content[0].caller.type" in caught.value.body["error"]["message"]


class TestCounting:
    def test_tokens_of_a_prompt(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        count = client.messages.count_tokens(model="fake", messages=HI, system="x", tools=[WEATHER])
        client.messages.create(model="fake", max_tokens=9, messages=HI, system="x", tools=[WEATHER])
        assert count.input_tokens == len(engine.prompt_ids[0])
        long = [{"role": "user", "content": "word " * 3000}]
        assert client.messages.count_tokens(model="fake", messages=long).input_tokens > engine.max_prompt_tokens


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"max_tokens": 0}, "max_tokens"),
            ({"messages": []}, "messages"),
            ({"messages": HI * 4097}, "messages"),
            ({"messages": [{"role": "user", "content": []}]}, "content"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
            ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
            ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "'document'"),
            ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]}, "'t'"),
            ({"messages": [*HI, {"role": "assistant", "content": []}]}, "messages"),
            ({"extra_body": {"temperature": 1000.0}}, "temperature"),
            ({"stop_sequences": [""]}, "stop_sequences"),
            ({"tools": [WEATHER, WEATHER]}, "get_weather"),
            ({"tools": [{**WEATHER, "description": "a" * 2**18}]}, "tools has more than 262144 characters"),
            ({"tools": [{**WEATHER, "input_schema": {"enum": ["ab"] * 2**17}}]}, "tools has more than"),
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "type"),
            ({"tool_choice": {"type": "any"}}, "tool_choice"),
            ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "nope"}}, "nope"),
            ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "budget_tokens"),
            ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nope"}}}}, "nope"),
            ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format"),
            (
                {
                    "tools": [{**WEATHER, "input_schema": {"properties": {"a": {"not": {}}}}}],
                    "tool_choice": {"type": "any"},
                },
                "tools[0].input_schema, of get_weather",
            ),
            ({"output_config": {"format": {"type": "json_schema", "schema": {"enum": ["a" * 2**17]}}}}, "131072"),
            (
                {
                    "tools": [WEATHER],
                    "tool_choice": {"type": "any"},
                    "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
                },
                "output_config.format",
            ),
            ({"extra_body": {"container": "c"}}, "container"),
            ({"extra_body": {"mcp_servers": [{"type": "url"}]}}, "mcp_servers"),
            ({"extra_body": {"inference_geo": "us"}}, "inference_geo"),
            ({"extra_body": {"output_config": {"task_budget": 5}}}, "output_config.task_budget"),
            ({"extra_body": {"thinking": {"type": "adaptive", "block_binding": 5}}}, "thinking.block_binding"),
            ({"extra_body": {"thread": {"type": "create"}}}, "thread"),
        ],
    )
    def test_what_is_wrong_is_named(self, client: anthropic.Anthropic, changes: dict[str, Any], named: str) -> None:
        options: dict[str, Any] = {"model": "fake", "max_tokens": 9, "messages": HI, **changes}
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(**options)
        assert caught.value.body["type"] == "error"
        assert caught.value.body["error"]["type"] == "invalid_request_error"
        assert named in caught.value.body["error"]["message"]
        assert caught.value.request_id

    @pytest.mark.parametrize(
        ("role", "block", "named"),
        [
            ("user", {"type": "text", "text": "a", "foo": 1}, "content[0].foo' is not a field"),
            ("user", {"type": "text", "text": 5}, "content[0].text is 5."),
            ("user", {"type": "text"}, "content[0].text is required."),
            ("user", {"type": "text", "text": "a", "cache_control": {"type": "x"}}, "content[0].cache_control.type is"),
            ("assistant", {"type": "thinking", "thinking": "a", "foo": 1}, "content[0].foo' is not a field"),
            ("assistant", {"type": "tool_use", "id": "a", "name": "", "input": {}}, "content[0].name is ''."),
            (
                "user",
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "a", "foo": 1}]},
                "content[0].content[0].foo' is not a field",
            ),
        ],
    )
    def test_the_field_of_a_block_is_named(
        self, client: anthropic.Anthropic, role: str, block: dict[str, Any], named: str
    ) -> None:
        messages: Any = [*HI, {"role": role, "content": [block]}]
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(model="fake", max_tokens=9, messages=messages)
        assert f"messages[1].{named}" in caught.value.body["error"]["message"]

    def test_only_its_own_paths_have_its_shape(self, url: str) -> None:
        assert httpx.post(url + "/v1/messages/nothing", timeout=60).json()["type"] == "error"
        answer = httpx.post(url + "/v1/messagesX", timeout=60)
        assert answer.status_code == 404 and answer.json().keys() == {"error"}
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert "request-id" not in answer.headers
        assert httpx.post(url + "/tokenizer", timeout=60).json()["error"].keys() == {"message", "type"}

    @pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
    def test_another_query(self, url: str, engine: ScriptedEngine, path: str) -> None:
        answer = httpx.post(f"{url}{path}?beta=true&stream=true", json={"model": "fake", "messages": HI}, timeout=60)
        assert answer.status_code == 400 and "'stream'" in answer.json()["error"]["message"]

    def test_another_model(self, client: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError) as caught:
            client.messages.create(model="claude", max_tokens=9, messages=HI)
        assert caught.value.body["error"]["type"] == "not_found_error"

    def test_a_prompt_that_is_too_long(self, client: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(model="fake", max_tokens=9, messages=[{"role": "user", "content": "a b " * 9000}])

    def test_overload(self, client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
        engine.num_waiting = 10**6
        with pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.create(model="fake", max_tokens=9, messages=HI)
        assert caught.value.status_code == 529 and caught.value.body["error"]["type"] == "overloaded_error"

    def test_keys(self, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
        settings = fake_settings(port=0, api_keys=("secret-key-of-a-user",))
        with serving(settings, lambda: FakeDeployment(engine, tokenizer_override=tokenizer)) as url:
            wait_until_ready(url)
            wrong = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
            with pytest.raises(anthropic.AuthenticationError) as caught:
                wrong.messages.create(model="fake", max_tokens=9, messages=HI)
            assert caught.value.body["error"]["type"] == "authentication_error"
            for named in ({"api_key": "secret-key-of-a-user"}, {"auth_token": "secret-key-of-a-user"}):
                right = anthropic.Anthropic(base_url=url, max_retries=0, **named)
                assert right.messages.create(model="fake", max_tokens=9, messages=HI).content


def test_the_template_knows_what_the_family_calls_thinking(engine: ScriptedEngine) -> None:
    from amalgam.server.api.anthropic.conversation import chat_prompt
    from amalgam.server.api.anthropic.fields import PromptBody

    def variables(template: str, **fields: Any) -> Any:
        return chat_prompt(PromptBody(model="m", messages=HI, **fields), template).variables

    on = {"type": "enabled", "budget_tokens": 7}
    assert variables("{% if thinking %}", thinking=on) == {"thinking": True}
    assert variables("{{ message.thinking }}", thinking=on) == {}
    assert variables("{{ enable_thinking }}{{ thinking_budget }}", thinking=on) == {
        "enable_thinking": True, "thinking_budget": 7,
    }  # fmt: skip
    hard: Any = {"output_config": {"effort": "max"}}
    assert variables("{{ reasoning_effort }}", **hard) == {"reasoning_effort": "high"}
    assert variables("{{ enable_thinking }}", **hard) == {"enable_thinking": True}
    assert variables("{{ enable_thinking }}", **hard, thinking={"type": "disabled"}) == {"enable_thinking": False}
    assert variables("{{ enable_thinking }}") == {"enable_thinking": False}
    assert variables("", **hard) == {}
