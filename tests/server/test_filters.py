"""Filters behind every interface: nothing leaves that they do not let pass, and figures stay right."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from amalgam.config.settings import Settings
from amalgam.engine.request import FinishReason, RequestOutput, TokenLogprobs, Usage
from amalgam.errors import ConfigError, PromptTooLongError
from amalgam.server import create_app
from amalgam.server.api.openai.documents import ChatAnswer, CompletionAnswer
from amalgam.server.service import Service
from amalgam.text.filters.contract import Finding
from tests.errors import raises
from tests.server.fakes import FakeDeployment, FakeEngine, FakeStream, fake_settings, fake_trace

WORD = {"name": "word", "words": ["forbidden"], "action": "block"}
MAIL = {"name": "mail", "pii": ["email"], "action": "redact"}


class Vocabulary(dict[int, str]):
    """Characters, and pieces of answers as tokens of their own."""

    def __missing__(self, token_id: int) -> str:
        return chr(token_id)

    def id_of(self, piece: str) -> int:
        token_id = 0x110000 + len(self)
        self[token_id] = piece
        return token_id


@dataclass
class WrittenEngine(FakeEngine):
    """Answers with a text that the test has written, cut into tokens, several of them a step.

    Attributes:
        prompts: texts that were computed.
    """

    answer: str = ""
    seed: int = 0
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    prompts: list[str] = field(default_factory=list)
    num_cancelled: int = 0

    def check_prompt_length(self, num_tokens: int, num_new_tokens: int = 1) -> None:
        pass

    def stream(self, prompt_ids: Sequence[int], *arguments: Any, **fields: Any) -> FakeStream:
        self.prompts.append("".join(self.vocabulary[token_id] for token_id in prompt_ids))
        return WrittenStream(self, super().stream(prompt_ids, *arguments, **fields))

    async def outputs_of(
        self, request_id: int, prompt_ids: Any, params: Any, observation: Any, version_id: int
    ) -> AsyncGenerator[RequestOutput]:
        try:
            generator = random.Random(self.seed)
            rest, num_new = self.answer, 0
            while rest or not num_new:
                pieces = []
                for _ in range(generator.randint(1, 2)):
                    size = generator.randint(1, 4)
                    pieces.append(rest[:size])
                    rest = rest[size:]
                ids = tuple(self.vocabulary.id_of(piece) for piece in pieces)
                num_new += len(ids)
                cancelled_as = self.cancelled.get(request_id)
                usage = Usage(len(prompt_ids), num_new, 0.0, 0.0, 0.0, version_id)
                reason = cancelled_as or (None if rest else FinishReason.STOP)
                likely = tuple((token_id, -1.0) for token_id in (ids[0], self.vocabulary.id_of("forbidden")))
                logprobs = tuple(TokenLogprobs(-0.5, likely) for _ in ids) if params.logprobs is not None else ()
                trace = fake_trace(len(prompt_ids) + num_new - 1) if reason and observation.wants_trace else None
                text = "" if cancelled_as else "".join(pieces)
                output = RequestOutput(request_id, text, ids, reason, None, usage if reason else None, trace, logprobs)
                if reason:
                    self.meter.add_finished(output)
                yield output
                if cancelled_as:
                    return
        finally:
            self.end(request_id)

    cancelled: dict[int, FinishReason] = field(default_factory=dict)


class WrittenStream(FakeStream):
    def __init__(self, engine: WrittenEngine, stream: FakeStream) -> None:
        super().__init__(engine, stream.request_id, stream.outputs)
        self._written = engine

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self._written.num_cancelled += 1
        self._written.cancelled[self.request_id] = reason


@dataclass
class Setup:
    """A server with filters in front of a written answer."""

    engine: WrittenEngine
    service: Service
    call: Callable[..., httpx.Response]

    def counts(self) -> dict[tuple[str, str, str], int]:
        assert self.service.filters is not None
        return {key: count for key, count in self.service.filters.counts.items() if count}


def server(
    answer: str, *rules: dict[str, Any], seed: int = 0, deployment: FakeDeployment | None = None, **filters: Any
) -> Setup:
    engine = WrittenEngine(answer=answer, seed=seed)
    deployment = deployment or FakeDeployment()
    deployment.engine = engine
    words = engine.vocabulary
    deployment.tokenizer_override = SimpleNamespace(
        **{
            **vars(deployment.tokenizer),
            "texts": words,
            "has_text": lambda token_id: True,
            "token_text": words.__getitem__,
            "token_bytes": lambda token_id: words[token_id].encode(),
            "decode": lambda token_ids, **_: "".join(words[token_id] for token_id in token_ids),
            "prompt_end": lambda token_ids: "".join(words[token_id] for token_id in token_ids),
        }
    )
    settings: Settings = fake_settings().replace(filters={"rules": rules, **filters})
    service = Service(settings, lambda: deployment)  # type: ignore[arg-type,return-value] # the fake's part of it
    app = create_app(service)

    def call(path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                if not service.has_loaded:
                    service.start()
                while not service.has_loaded:  # noqa: ASYNC110 – a thread tells
                    await asyncio.sleep(0.001)
                return await (client.get(path) if body is None else client.post(path, json=body))

        return asyncio.run(ask())

    return Setup(engine, service, call)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = (line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: "))
    return [json.loads(line) for line in lines if line != "[DONE]"]


MESSAGES = [{"role": "user", "content": "Hello"}]


def native(setup: Setup, stream: bool) -> tuple[str, str, int]:
    response = setup.call("/generate", {"prompt": "Hello", "stream": stream})
    parts = events(response) if stream else [response.json()]
    text = "".join(part.get("text", part.get("generated_text", "")) for part in parts)
    return text, parts[-1]["finish_reason"], parts[-1]["generated_tokens"]


def completions(setup: Setup, stream: bool) -> tuple[str, str, int]:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    response = setup.call("/v1/completions", {"prompt": "Hello", "stream": stream, **options})
    parts = events(response) if stream else [response.json()]
    choices = [choice for part in parts for choice in part["choices"]]
    text = "".join(choice["text"] for choice in choices)
    return text, choices[-1]["finish_reason"], parts[-1]["usage"]["completion_tokens"]


def chat(setup: Setup, stream: bool) -> tuple[str, str, int]:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    response = setup.call("/v1/chat/completions", {"messages": MESSAGES, "stream": stream, **options})
    parts = events(response) if stream else [response.json()]
    choices = [choice for part in parts for choice in part["choices"]]
    text = "".join(choice["delta" if stream else "message"].get("content") or "" for choice in choices)
    return text, choices[-1]["finish_reason"], parts[-1]["usage"]["completion_tokens"]


def responses(setup: Setup, stream: bool) -> tuple[str, str, int]:
    response = setup.call("/v1/responses", {"input": "Hello", "stream": stream})
    last = events(response)[-1]["response"] if stream else response.json()
    text = "".join(part["text"] for item in last["output"] for part in item["content"])
    reason = "stop" if last["status"] == "completed" else last["incomplete_details"]["reason"]
    return text, reason, last["usage"]["output_tokens"]


def anthropic(setup: Setup, stream: bool) -> tuple[str, str, int]:
    response = setup.call("/v1/messages", {"model": "fake", "messages": MESSAGES, "max_tokens": 99, "stream": stream})
    if not stream:
        message = response.json()
        text = "".join(block["text"] for block in message["content"])
        reason, num_tokens = message["stop_reason"], message["usage"]["output_tokens"]
    else:
        told = events(response)
        text = "".join(part["delta"].get("text", "") for part in told if part["type"] == "content_block_delta")
        [last] = [part for part in told if part["type"] == "message_delta"]
        reason, num_tokens = last["delta"]["stop_reason"], last["usage"]["output_tokens"]
    return text, {"refusal": "content_filter", "end_turn": "stop"}[reason], num_tokens


INTERFACES = [native, completions, chat, responses, anthropic]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", INTERFACES)
def test_every_interface_gives_what_has_passed_and_says_so(ask: Callable[..., Any], stream: bool) -> None:
    answer = "Write to a@b.com about the forbidden thing, and then go on with something else"
    for seed in range(2):
        setup = server(answer, WORD, MAIL, seed=seed)
        text, reason, num_tokens = ask(setup, stream)
        assert (text.rstrip(), reason) == ("Write to [EMAIL] about the", "content_filter")
        assert num_tokens > 0 and setup.engine.num_cancelled == 1 and not setup.engine.running
        assert setup.engine.meter.read().finished == {FinishReason.CONTENT_FILTER: 1}
        assert setup.counts() == {("word", "answers", "block"): 1, ("mail", "answers", "redact"): 1}
        allowed = server("Write to a@b.com", WORD, MAIL, seed=seed)
        text, reason, num_tokens = ask(allowed, stream)
        plain = ask(server("Write to a@b.com", seed=seed), stream)
        assert (text, reason, num_tokens) == ("Write to [EMAIL]", "stop", plain[2])


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        ("/v1/completions", {"prompt": "Hello"}, CompletionAnswer),
        ("/v1/chat/completions", {"messages": MESSAGES}, ChatAnswer),
    ],
)
def test_a_blocked_answer_is_of_the_shape_that_is_described(path: str, body: dict[str, Any], shape: Any) -> None:
    answer = server("about the forbidden thing, and then go on", WORD).call(path, body).json()
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    TypeAdapter(shape).validate_python(answer)


def test_no_event_has_more_of_a_text_than_has_passed() -> None:
    for seed in range(8):
        setup = server("xx forbidde n, x forbiddx, not forbidden yy", WORD, seed=seed)
        parts = events(setup.call("/v1/completions", {"prompt": "Hello", "stream": True, "return_token_ids": True}))
        text = "".join(choice["text"] for part in parts for choice in part["choices"])
        assert text == "xx forbidde n, x forbiddx, not "
        told = [token_id for part in parts for choice in part["choices"] for token_id in choice.get("token_ids", ())]
        spelt = "".join(setup.engine.vocabulary[token_id] for token_id in told)
        assert text.startswith(spelt) and len(text) - len(spelt) < 8


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_and_log_probabilities_tell_nothing_of_what_was_replaced(stream: bool) -> None:
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "stream": stream}
    for seed in range(6):
        setup = server("Ask secret@place.com, or others", MAIL, WORD, seed=seed)
        parts = [setup.call("/v1/chat/completions", body)]
        parts = events(parts[0]) if stream else [parts[0].json()]
        choices = [choice for part in parts for choice in part["choices"]]
        entries = [entry for choice in choices for entry in (choice["logprobs"] or {}).get("content", ())]
        ids = [token_id for choice in choices for token_id in choice.get("token_ids", ())]
        spelt = "".join(entry["token"] for entry in entries)
        assert spelt == "".join(setup.engine.vocabulary[token_id] for token_id in ids)
        assert spelt.startswith("As") and spelt.endswith("others")
        assert not any(part in spelt for part in ("ecre", "lace", "@"))
        named = {other["token"] for entry in entries for other in entry["top_logprobs"]}
        assert "forbidden" not in named and named
        assert not any("secret" in json.dumps(part) for part in parts)


def test_routed_experts_are_told_of_whole_answers_only() -> None:
    body = {"prompt": "Hello", "routed_experts": True}
    assert "routed_experts" in server("fine", MAIL).call("/generate", body).json()
    assert "routed_experts" not in server("a@b.com", MAIL).call("/generate", body).json()


def test_an_echo_and_its_answer_are_one_text() -> None:
    setup = server("idden fruit", WORD)
    choice = setup.call("/v1/completions", {"prompt": "forb", "echo": True, "n": 2}).json()["choices"]
    assert [(item["text"], item["finish_reason"]) for item in choice] == [("forb", "content_filter")] * 2
    setup = server("!", MAIL)
    choice = setup.call("/v1/completions", {"prompt": "I am a@b.com", "echo": True}).json()["choices"]
    assert choice[0]["text"] == "I am [EMAIL]!" and setup.engine.prompts == ["I am [EMAIL]"]


def test_a_stop_string_is_not_shown_where_it_would_complete_something() -> None:
    """`include_stop_str_in_output` adds it behind what the engine gives."""
    setup = server("forbid", WORD)
    original = setup.engine.outputs_of

    async def stopped(*arguments: Any) -> AsyncGenerator[RequestOutput]:
        async for output in original(*arguments):
            yield output._replace(stopped_by="den") if output.is_finished else output

    setup.engine.outputs_of = stopped  # type: ignore[method-assign]
    body = {"prompt": "x ", "stop": "den", "include_stop_str_in_output": True}
    choice = setup.call("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("forbid", None)


def test_prompts_are_replaced_before_they_are_computed() -> None:
    setup = server("ok", MAIL)
    setup.call("/generate", {"prompt": "I am a@b.com"})
    setup.call("/v1/completions", {"prompt": ["I am c@d.com", "or e@f.com"]})
    setup.call("/v1/chat/completions", {"messages": [{"role": "user", "content": "me@x.com"}]})
    setup.call(
        "/v1/messages", {"model": "fake", "messages": [{"role": "user", "content": "me@x.com"}], "max_tokens": 9}
    )
    setup.call("/batch_generate", {"prompts": ["a@b.com"]})
    assert setup.engine.prompts == ["I am [EMAIL]", "I am [EMAIL]", "or [EMAIL]", "[EMAIL]", "[EMAIL]", "[EMAIL]"]
    assert setup.call("/tokenize", {"prompt": "a@b.com"}).json()["count"] == len("a@b.com")


PROMPTED = [
    ("/generate", {"prompt": "a forbidden one"}),
    ("/batch_generate", {"prompts": ["fine", "a forbidden one"]}),
    ("/v1/completions", {"prompt": "a forbidden one"}),
    ("/v1/completions", {"prompt": [ord(char) for char in "a forbidden one"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a forbidden one"}]}),
    ("/v1/responses", {"input": "a forbidden one"}),
    ("/v1/messages", {"model": "fake", "messages": [{"role": "user", "content": "forbidden"}], "max_tokens": 9}),
    ("/v1/messages/count_tokens", {"model": "fake", "messages": [{"role": "user", "content": "forbidden"}]}),
    ("/v1/embeddings", {"input": "a forbidden one"}),
    ("/summarize", {"text": "a forbidden one", "chunk_tokens": 20, "overlap_tokens": 2, "max_summary_tokens": 8}),
    ("/experts/trace", {"text": "a forbidden one"}),
]  # fmt: skip
NEVER_ANSWERED = ("/v1/messages/count_tokens", "/v1/embeddings", "/summarize", "/experts/trace")


@pytest.mark.parametrize(("path", "body"), PROMPTED)
def test_a_blocked_prompt_is_an_error_or_a_refusal(path: str, body: dict[str, Any]) -> None:
    setup = server("ok", WORD)
    response = setup.call(path, body)
    assert response.status_code == 400 and setup.engine.prompts == [] and "word" in response.text
    code = response.json()["error"].get("code") or response.json()["error"]["type"]
    assert code in ("content_filtered", "content_filter", "invalid_request_error")
    assert setup.service.refusals["content_filtered"] == 1
    setup = server("ok", WORD, blocked_prompt="refusal", refusal="I would rather not.")
    response = setup.call(path, body)
    if path in NEVER_ANSWERED:
        assert response.status_code == 400
        return
    assert response.status_code == 200 and "I would rather not." in response.text
    assert "content_filter" in response.text or '"stop_reason":"refusal"' in response.text
    assert setup.engine.prompts == (["fine"] if path == "/batch_generate" else [])
    if path != "/batch_generate":
        streamed = setup.call(path, {**body, "stream": True})
        assert "I would rather not." in streamed.text and setup.engine.prompts == []


def test_tokens_whose_text_would_be_replaced_are_refused() -> None:
    response = server("ok", MAIL).call("/v1/completions", {"prompt": [ord(char) for char in "a@b.com"]})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "content_filter")


@dataclass
class Hooked:
    """A hook that tests may break."""

    fault: str = ""
    max_chars: int = 16
    texts: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def find(self, text: str, where: str) -> Any:
        self.texts.append(text)
        if self.fault == "raises":
            raise ValueError(text)
        if self.fault == "hangs":
            self.released.wait(60)
        if self.fault == "nonsense":
            return [(0, 1)]
        place = text.find("hooked")
        return [Finding(place, place + len("hooked"), "HOOK")] if place >= 0 else []


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hooked]:
    hook = Hooked()
    monkeypatch.setattr("amalgam.text.filters.rules.load_plugins_named", lambda group: {"mine": lambda options: hook})
    yield hook
    hook.released.set()


HOOK = {"name": "own", "hook": "mine", "where": ["answers"]}


@pytest.mark.parametrize("ask", INTERFACES)
def test_hooks_of_other_packages_find_in_answers(hook: Hooked, ask: Callable[..., Any]) -> None:
    for stream in (False, True):
        text, reason, _ = ask(server("a long text about what is hooked, and then goes on", HOOK), stream)
        assert (text, reason) == ("a long text about what is [HOOK], and then goes on", "stop")
    assert ask(server("what is hooked", {**HOOK, "action": "block"}), True)[:2] == ("what is ", "content_filter")


@pytest.mark.parametrize("fault", ["raises", "hangs", "nonsense"])
def test_a_hook_that_fails_lets_nothing_pass(hook: Hooked, fault: str) -> None:
    hook.fault = fault
    for where in ("answers", "prompts"):
        setup = server("a text of the model", {**HOOK, "where": [where]}, hook_seconds=0.05, hook_threads=1)
        response = setup.call("/generate", {"prompt": "Hello"})
        assert response.status_code == 500 and "model" not in response.text
        assert response.json()["error"]["type"] == "filter_failed" and "'own'" in response.json()["error"]["message"]
        [last] = events(setup.call("/generate", {"prompt": "Hello", "stream": True}))[-1:] or [{}]
        assert last.get("error", {}).get("type", "filter_failed") == "filter_failed"
        assert setup.counts() == {("own", where, "failed"): 2} and not setup.engine.running


def test_hooks_that_are_not_there_or_no_hooks_are_faults_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(ConfigError, "own"):
        server("x", {**HOOK, "hook": "nobody-offers-this"})
    monkeypatch.setattr("amalgam.text.filters.rules.load_plugins_named", lambda group: {"mine": lambda options: 7})
    with raises(ConfigError, "own"):
        server("x", HOOK)
    monkeypatch.setattr("amalgam.text.filters.rules.load_plugins_named", lambda group: {"mine": lambda options: 1 / 0})
    with raises(ConfigError, "own"):
        server("x", HOOK)


def test_a_prompt_that_cannot_fit_is_refused_before_filters_read_it() -> None:
    class Refusing(FakeDeployment):
        def _encode_by_piece(self, text: str, max_tokens: int, **_: Any) -> Iterator[list[int]]:
            raise PromptTooLongError("It is too long.")

    setup = server("x", MAIL, deployment=Refusing())
    assert setup.call("/generate", {"prompt": "a@b.com " * 10_000}).status_code == 413
    assert setup.counts() == {}


def test_figures_and_examples_for_the_admin() -> None:
    setup = server("a@b.com", MAIL, WORD)
    setup.call("/generate", {"prompt": "c@d.com"})
    told = setup.call("/filters").json()
    assert told["blocked_prompt"] == "error"
    first = told["filters"][0]
    assert (first["name"], first["looks_for"], first["action"]) == ("mail", "pii", "redact")
    assert first["found"] == {"answers": {"redact": 1}, "logs": {"redact": 0}, "prompts": {"redact": 1}}
    assert first["where"] == ["answers", "logs", "prompts"]
    example = setup.call("/filters/check", {"text": "x@y.com is forbidden"}).json()
    assert (example["text"], example["blocked_by"]) == ("[EMAIL] is ", "word")
    assert example["found"] == [{"filter": "mail", "start": 0, "end": 7, "replacement": "[EMAIL]"}]
    metrics = setup.call("/metrics").text
    assert 'amalgam_filtered_total{action="redact",filter="mail",where="answers"} 1.0' in metrics
    assert 'amalgam_filtered_total{action="block",filter="word",where="prompts"} 0.0' in metrics
    none = server("x")
    assert (
        none.call("/filters").json()["filters"] == [] and none.call("/filters/check", {"text": "x"}).status_code == 422
    )


def logging_prompts(setup: Setup) -> Setup:
    settings = setup.service.settings
    setup.service.settings = settings.replace(server={**settings.server.model_dump(), "log_prompts": True})
    return setup


def test_prompts_in_the_log_are_redacted(caplog: pytest.LogCaptureFixture) -> None:
    setup = logging_prompts(server("ok", {**MAIL, "where": ["logs"]}, {**WORD, "where": ["logs"]}))
    with caplog.at_level("INFO", "amalgam.server"):
        setup.call("/generate", {"prompt": "I am a@b.com, forbidden"})
        setup.call("/v1/chat/completions", {"messages": [{"role": "user", "content": "me@x.com"}]})
    assert "I am [EMAIL], [REMOVED]" in caplog.text
    assert not any(part in caplog.text for part in ("a@b.com", "me@x.com", "forbidden"))
    assert setup.engine.prompts == ["I am a@b.com, forbidden", "me@x.com"]


@pytest.mark.parametrize("where", [None, ["prompts"], ["answers"]])
def test_what_may_not_be_in_prompts_is_not_in_the_log(
    where: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of a prompt that is refused, and with a rule that says nothing of logs."""
    rules = [{**rule, **({} if where is None else {"where": where})} for rule in (MAIL, WORD)]
    setup = logging_prompts(server("ok", *rules))
    with caplog.at_level("INFO", "amalgam.server"):
        setup.call("/generate", {"prompt": "I am a@b.com"})
        refused = setup.call("/generate", {"prompt": "I am c@d.com, forbidden"})
    is_kept = where == ["answers"]
    assert refused.status_code == (200 if is_kept else 400)
    assert ("I am [EMAIL], [REMOVED]" in caplog.text) != is_kept
    assert all((part in caplog.text) == is_kept for part in ("a@b.com", "c@d.com", "forbidden"))


def test_hooks_do_not_look_at_the_log(hook: Hooked, caplog: pytest.LogCaptureFixture) -> None:
    setup = logging_prompts(server("ok", {**HOOK, "where": ["prompts"]}, MAIL))
    with caplog.at_level("INFO", "amalgam.server"):
        setup.call("/generate", {"prompt": "hooked: a@b.com"})
    assert "hooked: [EMAIL]" in caplog.text and setup.engine.prompts == ["[HOOK]: [EMAIL]"]
    assert hook.texts == ["hooked: a@b.com"]


def test_words_of_the_interface_are_no_text() -> None:
    rule = {"name": "roles", "words": ["user", "function", "text", "get"], "action": "block"}
    message = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    setup = server("ok", rule)
    assert setup.call("/v1/chat/completions", {"messages": [message]}).status_code == 200
    tool["function"]["name"] = "get"  # type: ignore[index]
    blocked = setup.call("/v1/chat/completions", {"messages": [message], "tools": [tool]})
    assert blocked.json()["error"]["code"] == "content_filter"


def test_a_token_tells_nothing_that_stands_behind_a_stop_string() -> None:
    setup = server("", WORD)
    engine = setup.engine

    async def stopped(*arguments: Any) -> AsyncGenerator[RequestOutput]:
        ids = (engine.vocabulary.id_of("fine"), engine.vocabulary.id_of(" forbidden"))
        usage = Usage(1, 2, 0.0, 0.0, 0.0, 1)
        yield RequestOutput(1, "fine", ids, FinishReason.STOP, None, usage, stopped_by=" ")
        engine.end(1)

    engine.outputs_of = stopped  # type: ignore[method-assign]
    answer = setup.call("/v1/completions", {"prompt": "x", "stop": " ", "return_token_ids": True}).json()
    assert [engine.vocabulary[token_id] for token_id in answer["choices"][0]["token_ids"]] == ["fine"]
    assert answer["usage"]["completion_tokens"] == 2
