"""Grammars take exactly the calls that the families write, with arguments that fit the tool's schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from amalgam.errors import RequestError, UnsupportedError
from amalgam.text.answers.contract import ToolCallDelta
from amalgam.text.answers.format import AnswerFormat
from amalgam.text.answers.registry import REASONING_TAGS, tool_formats
from amalgam.text.grammar import Grammar
from tests.conftest import DEMO
from tests.errors import raises
from tests.text.answers import test_answers as written
from tests.text.answers.test_answers import NOTE, TOOLS, WEATHER, made, tool

CALLS = {
    "hermes": (written.hermes(*WEATHER), written.hermes(*NOTE)),
    "qwen_xml": (written.qwen_xml(*WEATHER), written.qwen_xml(*NOTE)),
    "seed": (written.seed(*WEATHER), written.seed(*NOTE)),
    "granite": (written.granite(WEATHER), written.granite(NOTE)),
    "glm": (written.glm(*WEATHER), written.glm(*NOTE)),
    "mistral": (written.mistral(WEATHER), written.mistral(NOTE)),
    "llama": (written.llama(*WEATHER), written.llama(*NOTE)),
    "deepseek": (written.deepseek(WEATHER), written.deepseek(NOTE)),
    "deepseek_v31": (written.deepseek_v31(WEATHER), written.deepseek_v31(NOTE)),
    "minimax": (written.minimax(WEATHER), written.minimax(NOTE)),
    "kimi": (written.kimi(WEATHER), written.kimi(NOTE)),
    "gemma": (written.gemma(WEATHER), written.gemma(NOTE)),
    "hunyuan": (written.hunyuan(WEATHER), written.hunyuan(NOTE)),
    "pythonic": (written.pythonic(WEATHER), written.pythonic(NOTE)),
    "lfm2": tuple(f"<|tool_call_start|>{written.pythonic(call)}<|tool_call_end|>" for call in (WEATHER, NOTE)),
    "gpt_oss": (written.harmony(*WEATHER) + "<|call|>", written.harmony(*NOTE) + "<|call|>"),
}


@pytest.fixture(scope="module", params=["text", "special"])
def backend(request: Any) -> Any:
    """A tokenizer for which marks are mere text, and one for which they are special tokens."""
    backend = Backend.from_file(str(DEMO / "tokenizer.json"))
    if request.param == "special":
        marks = {mark for tool_format in tool_formats().values() for mark in tool_format.marks}
        backend.add_special_tokens([AddedToken(mark, special=True) for mark in sorted({*marks, "<think>", "</think>"})])
    return backend


def specials(backend: Any) -> dict[int, str]:
    return {
        token_id: token.content
        for token_id, token in backend.get_added_tokens_decoder().items()
        if token.special and not token.content.startswith("<|im")
    }


def takes(backend: Any, source: str, text: str) -> bool:
    matcher = LLMatcher(_for_llguidance(len(specials(backend)), backend.to_str), source)
    assert not matcher.get_error()
    ids = backend.encode(text, add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


_made: dict[int, LLTokenizer] = {}


def _for_llguidance(key: int, written: Callable[[], str]) -> LLTokenizer:
    if key not in _made:
        _made[key] = LLTokenizer(written())
    return _made[key]


def bound(name: str, backend: Any) -> AnswerFormat:
    found = made(name)
    return AnswerFormat(found.tool_format, found.tags, specials(backend))


@pytest.mark.parametrize("name", CALLS)
def test_calls_and_nothing_else(backend: Any, name: str) -> None:
    weather, note = CALLS[name]
    if name == "mistral" and "[ARGS]" in specials(backend).values():
        weather, note = written.mistral_new(*WEATHER), written.mistral_new(*NOTE)
    any_call, one = (bound(name, backend).grammar(TOOLS, choice).source for choice in (None, "note"))
    assert takes(backend, any_call, weather) and takes(backend, any_call, note) and takes(backend, one, note)
    for source, text in ((one, weather), (any_call, "hello"), (any_call, weather.replace("3", "x")), (any_call, "")):
        assert not takes(backend, source, text)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "gpt_oss"])
def test_reasoning_may_come_first(backend: Any, name: str) -> None:
    made_format = bound(name, backend)
    call = CALLS[name][0]
    if name == "mistral" and "[ARGS]" in specials(backend).values():
        call = written.mistral_new(*WEATHER)
    opened = made_format.grammar(TOOLS, prompt_end="<think>\n").source
    assert takes(backend, opened, f"hm </thin\n</think>\n\n{call}")
    assert not takes(backend, opened, call)
    not_opened = made_format.grammar(TOOLS).source
    assert takes(backend, not_opened, f"<think>hm</think>\n{call}")
    assert not takes(backend, not_opened, f"hm</think>\n{call}")


def test_gpt_oss_reasons_in_a_channel(backend: Any) -> None:
    source = bound("gpt_oss", backend).grammar(TOOLS).source
    before = f"<|channel|>analysis<|message|>hm{written.START}"
    assert takes(backend, source, before + CALLS["gpt_oss"][0])


def test_one_call_or_several(backend: Any) -> None:
    two = "\n".join(CALLS["hermes"])
    made_format = bound("hermes", backend)
    assert takes(backend, made_format.grammar(TOOLS).source, two)
    assert not takes(backend, made_format.grammar(TOOLS, parallel=False).source, two)


def test_values_as_text_are_of_the_declared_type(backend: Any) -> None:
    tools = [tool("f", unit={"enum": ["C", "F"]}, n={"type": ["integer", "null"]})]
    tools[0]["function"]["parameters"]["required"] = ["unit"]
    source = bound("qwen_xml", backend).grammar(tools).source
    assert takes(backend, source, written.qwen_xml("f", {"unit": "C"}))
    assert takes(backend, source, written.qwen_xml("f", {"unit": "F", "n": 3}))
    assert not takes(backend, source, written.qwen_xml("f", {"unit": "K"}))
    assert not takes(backend, source, written.qwen_xml("f", {"n": 3}))


def test_gemmas_values_fit_their_schemas(backend: Any) -> None:
    tools = [
        tool(
            "f",
            unit={"enum": ["C", "F"]},
            n={"type": ["integer", "null"]},
            at={
                "type": "object",
                "properties": {"x": {"type": "number"}, "y": {"$ref": "#/$defs/y"}},
                "required": ["x"],
            },
            any={},
        )
    ]
    parameters = tools[0]["function"]["parameters"]
    parameters |= {"required": ["n"], "$defs": {"y": {"type": "array", "items": {"type": "boolean"}}}}
    source = bound("gemma", backend).grammar(tools).source
    for arguments in (
        {"n": 3},
        {"unit": "C", "n": None},
        {"n": 1, "at": {"x": 0.5}},
        {"unit": "F", "n": 1, "at": {"x": 1, "y": [True, False]}, "any": {"a": ["b", 1, {}]}},
        {"n": 1, "any": "text"},
    ):
        assert takes(backend, source, written.gemma(("f", arguments))), arguments
    for arguments in (
        {},
        {"n": "3"},
        {"unit": "K", "n": 1},
        {"n": 1, "unit": "C"},
        {"n": 1, "at": {"y": []}},
        {"n": 1, "z": 1},
    ):
        assert not takes(backend, source, written.gemma(("f", arguments))), arguments


def test_gemmas_schemas_may_refer_to_themselves(backend: Any) -> None:
    """One rule for each schema: a tree has two branches, each of which has two, and so on."""
    branch = {"$ref": "#/$defs/tree"}
    tree = {"type": "object", "properties": {"n": {"type": "integer"}, "left": branch, "right": branch}}
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "integer"}]}
    tools = [tool("f", at=branch, any={"$ref": "#/$defs/loop"})]
    tools[0]["function"]["parameters"] |= {"required": [], "$defs": {"tree": tree, "loop": loop}}
    source = bound("gemma", backend).grammar(tools).source
    assert len(source) < 10_000
    for arguments in ({"at": {"left": {"n": 1, "right": {"n": 2}}}}, {"any": 3}):
        assert takes(backend, source, written.gemma(("f", arguments))), arguments
    assert not takes(backend, source, written.gemma(("f", {"at": {"left": {"n": "1"}}})))


def test_gemmas_thoughts_begin_with_a_token(backend: Any) -> None:
    tags = REASONING_TAGS["gemma"]
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|channel>", "<channel|>")])
    made_format = AnswerFormat(made("gemma").tool_format, tags, specials(backend))
    call = CALLS["gemma"][0]
    for text in ("Hi.", f"<|channel>thought\nhm<channel|>{call}", f"Look:{call}", call):
        assert takes(backend, made_format.free_grammar(TOOLS).source, text), text
    assert not takes(backend, made_format.free_grammar(TOOLS).source, call.replace("3", "x"))
    assert takes(backend, made_format.grammar(TOOLS).source, f"<|channel>thought\nhm<channel|>{call}")


def test_a_tool_without_parameters_takes_none(backend: Any) -> None:
    bare = [{"type": "function", "function": {"name": 'say "hi"'}}]
    source = bound("hermes", backend).grammar(bare).source
    assert takes(backend, source, '<tool_call>\n{"name": "say \\"hi\\"", "arguments": {}}\n</tool_call>')
    assert not takes(backend, source, '<tool_call>\n{"name": "say \\"hi\\"", "arguments": {"a": 1}}\n</tool_call>')


def test_an_unknown_tool_is_refused() -> None:
    with raises(RequestError, "tool_choice", "'nope'", "get_weather"):
        made("hermes").grammar(TOOLS, "nope")
    with raises(RequestError, "server.tool_parser"):
        made("plain").grammar(TOOLS)


@pytest.mark.parametrize("parameters", [{"properties": [1]}, {"properties": {"a": {}}, "required": 5}])
@pytest.mark.parametrize("name", ["qwen_xml", "glm"])
def test_parameters_that_are_no_schema_are_refused(name: str, parameters: dict[str, Any]) -> None:
    with raises(RequestError, "f", "properties") as caught:
        made(name).grammar([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert caught.value.param == "tools"  # type: ignore[attr-defined]


MARKED = [name for name in CALLS if made(name).marks_calls]


@pytest.mark.parametrize("name", MARKED)
def test_text_is_free_and_calls_fit_their_schemas(backend: Any, name: str) -> None:
    answers, (weather, note) = bound(name, backend), CALLS[name]
    free = answers.free_grammar(TOOLS).source
    for text in (
        "",
        "hello",
        "a <tool",
        weather,
        f"Let me see.\n{weather}",
        f"{weather}\n{note}",
        f"{note} That is it.",
    ):
        assert takes(backend, free, text), text
    wrong = weather.replace("3", "x")
    for text in (
        wrong,
        f"Hello.\n{wrong}",
        f"{note}\n{wrong}",
        answers.tool_format.opening,
        weather.replace("get_weather", "other"),
    ):
        assert not takes(backend, free, text), text


@pytest.mark.parametrize("name", MARKED)
def test_a_single_call_ends_a_free_answer(backend: Any, name: str) -> None:
    source = bound(name, backend).free_grammar(TOOLS, parallel=False).source
    weather, note = CALLS[name]
    assert (
        takes(backend, source, "Hello.") and takes(backend, source, f"Hello.\n{weather}") and takes(backend, source, "")
    )
    assert not takes(backend, source, f"{weather}\n{note}")


def test_reasoning_is_free_before_free_text(backend: Any) -> None:
    source = bound("hermes", backend).free_grammar(TOOLS, prompt_end="<think>\n").source
    weather = CALLS["hermes"][0]
    assert takes(backend, source, f"hm</think>\n\nHello.\n{weather}") and takes(backend, source, "hm</think>Hello.")
    assert not takes(backend, source, f"hm</think>\n\nHello.\n{weather.replace('3', 'x')}")


@pytest.mark.parametrize("name", MARKED)
def test_a_thought_may_speak_of_calls(backend: Any, name: str) -> None:
    """Whether or not its tags are tokens: where the mark of a call is one, a thought does not have it."""
    answers, weather = bound(name, backend), CALLS[name][0]
    mark = answers.tool_format.opening
    spoken = "a call" if mark in answers.special_tokens.values() else f"a {mark} or so"
    thought, wrong = f"<think>\nI need {spoken}.\n</think>\n\n", weather.replace("3", "x")
    for parallel in (True, False):
        source = answers.free_grammar(TOOLS, parallel=parallel).source
        for text in (f"{thought}Hello.", f"{thought}{weather}", f"{thought}Hello.\n{weather}", weather, "a <thi"):
            assert takes(backend, source, text), text
        for text in (f"{thought}{wrong}", f"{thought}Hello.\n{wrong}", wrong):
            assert not takes(backend, source, text), text
        assert takes(backend, source, f"{thought}{weather}\nHello.") == parallel


def test_calls_that_are_read_without_their_opening_are_bound_too(backend: Any) -> None:
    answers, (weather, _) = bound("qwen_xml", backend), CALLS["qwen_xml"]
    short = weather.removeprefix("<tool_call>").lstrip()
    parser = answers.parser(TOOLS)
    assert any(isinstance(delta, ToolCallDelta) for delta in (*parser.push(short), *parser.finish()))
    source = answers.free_grammar(TOOLS).source
    assert takes(backend, source, weather) and takes(backend, source, "a <function of x")
    for text in (short, f"Hello.\n{short}", f"{short}\n{weather}", f"{weather}\n{short}"):
        assert not takes(backend, source, text), text


@pytest.mark.parametrize("name", sorted(CALLS.keys() - set(MARKED)))
def test_calls_without_a_mark_are_not_found_in_free_text(name: str) -> None:
    with raises(UnsupportedError, name):
        made(name).free_grammar(TOOLS)


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("prompt_end", ["", "<think>\n"])
def test_an_answer_has_the_form_or_calls(backend: Any, name: str, prompt_end: str) -> None:
    form = Grammar.of_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    source = bound(name, backend).form_or_calls(form, TOOLS, prompt_end=prompt_end).source
    before = "hm</think>\n" if prompt_end else ""
    for text in ('{"a": 1}', *CALLS[name]):
        assert takes(backend, source, before + text), text
    for text in ("hello", '{"a": "b"}', CALLS[name][0].replace("3", "x"), '{"a": 1}' + CALLS[name][0]):
        assert not takes(backend, source, before + text), text


def test_a_form_that_is_no_rule_goes_with_no_tools() -> None:
    with raises(UnsupportedError, "regex"):
        made("hermes").form_or_calls(Grammar("regex", "a+"), TOOLS)
