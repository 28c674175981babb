"""Answers are taken apart as the families write them, however their text is cut into pieces."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import orjson
import pytest

from amalgam.errors import ConfigError
from amalgam.text.answers.contract import AnswerDelta, ContentDelta, ReasoningDelta, ToolCallDelta
from amalgam.text.answers.format import AnswerFormat
from amalgam.text.answers.registry import REASONING_TAGS, answer_format, tool_formats
from tests.cases import each_case
from tests.errors import raises


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


TOOLS = [
    tool("get_weather", city={"type": "string"}, days={"type": "integer"}),
    tool("note", text={"type": "string"}, tags={"type": "array", "items": {"type": "string"}}),
    tool("now"),
]
WEATHER = ("get_weather", {"city": "Zürich", "days": 3})
NOTE = ("note", {"text": 'a "b"\n{c} </d>', "tags": ["x", "y]"]})
VALUES = {"flag": True, "none": None, "n": -1.5, "deep": {"a": [{"b": 'x,}]"\\'}, []], "empty": {}}, "s": ""}
THOUGHT = "I need\n\nthe weather."


def as_json(arguments: object) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def hermes(name: str, arguments: object) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {as_json(arguments)}}}\n</tool_call>'


def typed(value: object) -> str:
    return value if isinstance(value, str) else as_json(value)


def qwen_xml(name: str, arguments: dict[str, Any]) -> str:
    values = "".join(f"<parameter={key}>\n{typed(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def seed(name: str, arguments: dict[str, Any]) -> str:
    values = "".join(f"<parameter={key}>{typed(value)}</parameter>\n" for key, value in arguments.items())
    return f"<seed:tool_call>\n<function={name}>\n{values}</function>\n</seed:tool_call>"


def granite(*calls: tuple[str, Any]) -> str:
    return "<|tool_call|>" + as_json([{"name": name, "arguments": arguments} for name, arguments in calls])


def glm(name: str, arguments: dict[str, Any]) -> str:
    values = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{typed(value)}</arg_value>\n" for key, value in arguments.items()
    )
    return f"<tool_call>{name}\n{values}</tool_call>"


def mistral(*calls: tuple[str, Any]) -> str:
    return "[TOOL_CALLS]" + as_json([{"name": name, "arguments": arguments} for name, arguments in calls])


def mistral_new(name: str, arguments: object) -> str:
    return f"[TOOL_CALLS]{name}[ARGS]{as_json(arguments)}"


def llama(name: str, arguments: object) -> str:
    return f'{{"name": "{name}", "parameters": {as_json(arguments)}}}'


def deepseek(*calls: tuple[str, Any]) -> str:
    each = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{as_json(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{each}<｜tool▁calls▁end｜>"


def deepseek_v31(*calls: tuple[str, Any]) -> str:
    each = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{as_json(arguments)}<｜tool▁call▁end｜>" for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{each}<｜tool▁calls▁end｜>"


def minimax(*calls: tuple[str, dict[str, Any]]) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        values = "".join(f'<parameter name="{key}">{typed(value)}</parameter>\n' for key, value in arguments.items())
        return f'<invoke name="{name}">\n{values}</invoke>'

    each = "\n".join(one(*call) for call in calls)
    return f"<minimax:tool_call>\n{each}\n</minimax:tool_call>"


def kimi(*calls: tuple[str, Any]) -> str:
    each = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{as_json(arguments)}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{each}<|tool_calls_section_end|>"


def gemma(*calls: tuple[str, dict[str, Any]]) -> str:
    def value(argument: object) -> str:
        if isinstance(argument, str):
            return f'<|"|>{argument}<|"|>'
        if isinstance(argument, dict):
            return "{" + ",".join(f"{key}:{value(item)}" for key, item in argument.items()) + "}"
        if isinstance(argument, list):
            return f"[{','.join(map(value, argument))}]"
        return as_json(argument)

    return "".join(f"<|tool_call>call:{name}{value(arguments)}<tool_call|>" for name, arguments in calls)


def hunyuan(*calls: tuple[str, Any]) -> str:
    return f"<tool_calls>{as_json([{'name': name, 'arguments': arguments} for name, arguments in calls])}</tool_calls>"


def pythonic(*calls: tuple[str, dict[str, Any]]) -> str:
    def one(name: str, arguments: dict[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={as_json(value)}' for key, value in arguments.items())})"

    return f"[{', '.join(one(*call) for call in calls)}]"


def harmony(name: str, arguments: object) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{as_json(arguments)}"


START = "<|end|><|start|>assistant"
LFM2_OTHER = "<|tool_call_start|>[print(a=1)]<|tool_call_end|>"
# format, what the model writes, content, reasoning, calls
ANSWERS: dict[str, tuple[str, str, str, str, list[tuple[str, Any]]]] = {
    "plain": ("plain", "2 < 3 <tool_call> {", "2 < 3 <tool_call> {", "", []),
    "hermes": ("hermes", hermes(*WEATHER), "", "", [WEATHER]),
    "hermes text": ("hermes", "a < b, <tool, {}\n", "a < b, <tool, {}\n", "", []),
    "hermes two": (
        "hermes", f"<think>\n{THOUGHT}\n</think>\n\nLet me look.\n\n{hermes(*WEATHER)}\n{hermes(*NOTE)}\n",
        "Let me look.", THOUGHT, [WEATHER, NOTE],
    ),
    "hermes other order": (
        "hermes", '<tool_call>{"arguments": {"city": "A"}, "id": 3, "name": "f"}</tool_call>', "", "",
        [("f", {"city": "A"})],
    ),
    "hermes arguments in a string": (
        "hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", "", [("f", {"a": 1})],
    ),
    "hermes none": ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", "", [("now", {})]),
    "hermes whole arguments": (
        "hermes", '<tool_call>{"name": "now", "arguments": {}, oops}</tool_call>', "}</tool_call>", "", [("now", {})],
    ),
    "hermes unfinished tag": ("hermes", 'x<tool_call>{"name": "get', 'x<tool_call>{"name": "get', "", []),
    "hermes no JSON": ("hermes", "x <tool_call>\nf()</tool_call> y", "x <tool_call>\nf()</tool_call> y", "", []),
    "hermes then text": ("hermes", f"{hermes(*WEATHER)}\n\nDone.", "Done.", "", [WEATHER]),
    "hermes without its end": ("hermes", hermes(*WEATHER)[:-12], "", "", [WEATHER]),
    "no thoughts": ("hermes", "<think>\n\n</think>\n\nHi", "Hi", "", []),
    "only thoughts": ("hermes", f"<think>\n{THOUGHT}", "", THOUGHT, []),
    "qwen_xml": ("qwen_xml", qwen_xml(*WEATHER), "", "", [WEATHER]),
    "qwen_xml two": ("qwen_xml", f"Now:\n{qwen_xml(*NOTE)}\n{qwen_xml('now', {})}", "Now:", "", [NOTE, ("now", {})]),
    "qwen_xml broken": ("qwen_xml", "<tool_call>\n{1}\n</tool_call>", "<tool_call>\n{1}\n</tool_call>", "", []),
    "seed": (
        "seed_think", f"<seed:think>{THOUGHT}</seed:think>{seed(*WEATHER)}{seed(*NOTE)}", "", THOUGHT, [WEATHER, NOTE],
    ),
    "seed broken": ("seed", "<seed:tool_call>\nf()", "<seed:tool_call>\nf()", "", []),
    "granite": ("granite", granite(WEATHER, NOTE), "", "", [WEATHER, NOTE]),
    "granite with an end": ("granite", f"So: {granite(WEATHER)}<|/tool_call|>", "So:", "", [WEATHER]),
    "granite broken": ("granite", "<|tool_call|>[1]", "<|tool_call|>[1]", "", []),
    "glm": ("glm", f"<think>{THOUGHT}</think>\n{glm(*WEATHER)}", "", THOUGHT, [WEATHER]),
    "glm two": ("glm", f"Go.{glm(*NOTE)}{glm('now', {})}", "Go.", "", [NOTE, ("now", {})]),
    "glm on one line": (
        "glm", "<tool_call>now<arg_key>a</arg_key><arg_value>b</arg_value></tool_call>", "", "", [("now", {"a": "b"})],
    ),
    "glm broken": ("glm", "<tool_call>not a name", "<tool_call>not a name", "", []),
    "mistral": ("mistral", mistral(WEATHER, NOTE), "", "", [WEATHER, NOTE]),
    "mistral new": ("mistral", f"Hm.{mistral_new(*WEATHER)}{mistral_new(*NOTE)}", "Hm.", "", [WEATHER, NOTE]),
    "mistral with id": ("mistral", '[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{"a": 1}', "", "", [("f", {"a": 1})]),
    "mistral thinks": ("mistral_think", f"[THINK]{THOUGHT}[/THINK]Yes.", "Yes.", THOUGHT, []),
    "mistral broken": ("mistral", "[TOOL_CALLS][1, 2]", "[TOOL_CALLS][1, 2]", "", []),
    "llama": ("llama", llama(*WEATHER), "", "", [WEATHER]),
    "llama tag": ("llama", f"<|python_tag|>{llama(*WEATHER)}; {llama(*NOTE)}", "", "", [WEATHER, NOTE]),
    "llama JSON": ("llama", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', "", []),
    "llama text": ("llama", "Sure {x}.", "Sure {x}.", "", []),
    "llama function": ("llama", f"<function=note>{as_json(NOTE[1])}</function>", "", "", [NOTE]),
    "llama typed": (
        "llama", '{"type": "function", "name": "now", "parameters": {}}', "", "", [("now", {})],
    ),
    "deepseek": ("deepseek", f"{THOUGHT}\n</think>\n\nOk.{deepseek(WEATHER, NOTE)}", "Ok.", THOUGHT, [WEATHER, NOTE]),
    "deepseek new": ("deepseek_v31", deepseek_v31(WEATHER, NOTE), "", "", [WEATHER, NOTE]),
    "llama 4": ("llama", f"<|python_start|>{llama(*WEATHER)}<|python_end|>", "", "", [WEATHER]),
    "llama 4 code": ("llama", "<|python_start|>1<|python_end|>", "<|python_start|>1<|python_end|>", "", []),
    "pythonic": ("pythonic", pythonic(WEATHER, ("now", {})), "", "", [WEATHER, ("now", {})]),
    "pythonic marks": ("pythonic", f"Hm.<|python_start|>{pythonic(NOTE)}<|python_end|>", "Hm.", "", [NOTE]),
    "pythonic literals": (
        "pythonic", "[note(text='it\\'s', tags=[True, None, -1.5, {'a': (1,)}])]", "", "",
        [("note", {"text": "it's", "tags": [True, None, -1.5, {"a": [1]}]})],
    ),
    "lfm2": (
        "lfm2", f"Hm.<|tool_call_start|>{pythonic(WEATHER, NOTE)}<|tool_call_end|>", "Hm.", "", [WEATHER, NOTE],
    ),
    "lfm2 list": ("lfm2", "[now()] is a call.", "[now()] is a call.", "", []),
    "lfm2 other": (
        "lfm2", LFM2_OTHER, LFM2_OTHER, "", [],
    ),
    "pythonic list": ("pythonic", "[1, 2] and [now]", "[1, 2] and [now]", "", []),
    "pythonic code": ("pythonic", "[now(x=open('f'))]", "[now(x=open('f'))]", "", []),
    "pythonic other": ("pythonic", "[print(a=1)]", "[print(a=1)]", "", []),
    "pythonic keywords": (
        "pythonic", "[now(from='f(a=1)', class = null, in={'b(': true})]", "", "",
        [("now", {"from": "f(a=1)", "class": None, "in": {"b(": True}})],
    ),
    **{
        f"pythonic {value}": ("pythonic", f"[now({value})]", f"[now({value})]", "", [])
        for value in (
            "x=...", "x={1,2}", "x=b'a'", "x=1j", "x={[1]}", "x={{}: 1}", "x={b'a': 1}", "x={**{'a': 1}}", "x=1, x=2",
            "**{'a': 1}", "*[1]", "1", "x=1e999", "x=-'a'", "x=f'{1}'", "x=now()",
        )
    },
    "minimax": ("minimax", f"<think>{THOUGHT}</think>\n{minimax(WEATHER, NOTE)}", "", THOUGHT, [WEATHER, NOTE]),
    "minimax without its block": ("minimax", '<invoke name="now"></invoke>', "", "", [("now", {})]),
    "minimax broken": ("minimax", "<minimax:tool_call>\n{1}", "<minimax:tool_call>\n{1}", "", []),
    "kimi": ("kimi", f"Go.{kimi(WEATHER, NOTE)}", "Go.", "", [WEATHER, NOTE]),
    "kimi broken": ("kimi", "a<|tool_call_begin|>functions.f:0 {}", "a<|tool_call_begin|>functions.f:0 {}", "", []),
    "gemma": (
        "gemma_think", f"<|channel>thought\n{THOUGHT}<channel|>{gemma(WEATHER, NOTE)}", "", THOUGHT, [WEATHER, NOTE],
    ),
    "gemma values": (
        "gemma", "Go." + gemma(("now", VALUES)) + gemma(("now", {})), "Go.", "", [("now", VALUES), ("now", {})],
    ),
    "gemma as JSON": (
        "gemma", '<|tool_call> call:now{ "a": "b", <|"|>c:d<|"|>: [1, 2,], e: None, f: Rome }\n<tool_call|> Done.',
        "Done.", "", [("now", {"a": "b", "c:d": [1, 2], "e": None, "f": "Rome"})],
    ),
    "gemma without its end": ("gemma", gemma(WEATHER)[:-12], "", "", [WEATHER]),
    "gemma broken": ("gemma", "a<|tool_call>get_weather{}", "a<|tool_call>get_weather{}", "", []),
    "gemma no name": ("gemma", "<|tool_call>call:a b{}<tool_call|>", "<|tool_call>call:a b{}<tool_call|>", "", []),
    "hunyuan": ("hunyuan", hunyuan(WEATHER, NOTE), "", "", [WEATHER, NOTE]),
    "hunyuan frame": (
        "hunyuan", f"<think>\n{THOUGHT}\n</think>\n<answer>\nYes: <answer> </answer>.\n</answer>",
        "Yes: <answer> </answer>.", THOUGHT, [],
    ),
    "hunyuan call in a frame": (
        "hunyuan", f"<think>\n\n</think>\n<answer>\nHm.\n{hunyuan(WEATHER)}\n</answer>\n", "Hm.", "", [WEATHER],
    ),
    "hunyuan call behind a frame": (
        "hunyuan", f"<answer>\nHm.\n</answer>\n{hunyuan(WEATHER)}", "Hm.", "", [WEATHER],
    ),
    "hunyuan no frame": ("hunyuan", "Hm <answer>a</answer>", "Hm <answer>a</answer>", "", []),
    "hunyuan frame left open": ("hunyuan", "<answer>a </answer", "a </answer", "", []),
    "hunyuan broken": ("hunyuan", "<tool_calls>[3]</tool_calls>", "<tool_calls>[3]</tool_calls>", "", []),
    "deepseek broken": (
        "deepseek", "a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>x",
        "a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>x", "", [],
    ),
    "gpt_oss": (
        "gpt_oss", f"<|channel|>analysis<|message|>{THOUGHT}{START}<|channel|>final<|message|>2 < 3.", "2 < 3.",
        THOUGHT, [],
    ),
    "gpt_oss call": (
        "gpt_oss", f"<|channel|>analysis<|message|>{THOUGHT}{START}{harmony(*WEATHER)}", "", THOUGHT, [WEATHER],
    ),
    "gpt_oss recipient first": (
        "gpt_oss", f"<|channel|>commentary<|message|>Look.{START} to=functions.now"
        "<|channel|>commentary json<|message|>{}",
        "Look.", "", [("now", {})],
    ),
    "gpt_oss without an end": (
        "gpt_oss", f"<|channel|>analysis<|message|>{THOUGHT}<|start|>assistant<|channel|>final<|message|>Yes.", "Yes.",
        THOUGHT, [],
    ),
    "gpt_oss without channels": ("gpt_oss", '{"a": 1}', '{"a": 1}', "", []),
}  # fmt: skip


def made(name: str) -> AnswerFormat:
    tool_format = tool_formats()[name.removesuffix("_think")]
    kinds = {"mistral_think": "mistral", "seed_think": "seed", "gemma_think": "gemma"}
    tags = REASONING_TAGS[kinds.get(name, "think")]
    return AnswerFormat(tool_format, None if tool_format.reasons else tags)


def put_together(deltas: Sequence[AnswerDelta]) -> tuple[str, str, list[tuple[str, str]]]:
    calls: list[list[str]] = []
    ids: dict[int, str] = {}
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.index == len(calls):
                assert delta.name is not None
                calls.append([delta.name, ""])
            else:
                assert delta.name is None and delta.index == len(calls) - 1
            calls[delta.index][1] += delta.arguments
            assert ids.setdefault(delta.index, delta.id) == delta.id
    assert len(set(ids.values())) == len(ids)
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    return content, reasoning, [(name, arguments) for name, arguments in calls]


def taken_apart(
    made_format: AnswerFormat, pieces: Sequence[str], **options: Any
) -> tuple[str, str, list[tuple[str, str]]]:
    parser = made_format.parser(TOOLS, **options)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return put_together(deltas + parser.finish())


def options_of(case: str) -> dict[str, Any]:
    return {"prompt_end": "<｜Assistant｜><think>\n"} if case == "deepseek" else {}


def test_an_answer_is_taken_apart() -> None:
    with each_case() as tried:
        for case, (name, text, content, reasoning, calls) in ANSWERS.items():
            with tried(case):
                found = taken_apart(made(name), [text], **options_of(case))
                assert found[:2] == (content, reasoning)
                assert [(called, json.loads(arguments)) for called, arguments in found[2]] == calls


@pytest.mark.parametrize("case", ANSWERS)
def test_however_it_is_cut_it_is_the_same(case: str) -> None:
    name, text, *_ = ANSWERS[case]
    options, chance = options_of(case), random.Random(case)
    for source in (text, text[: len(text) // 2], text[:-3], text + text):
        whole = taken_apart(made(name), [source], **options)
        assert taken_apart(made(name), list(source), **options) == whole
        for _ in range(20):
            cuts = sorted(chance.choices(range(len(source) + 1), k=chance.randint(1, 12)))
            pieces = [source[start:end] for start, end in zip([0, *cuts], [*cuts, len(source)], strict=True)]
            assert taken_apart(made(name), pieces, **options) == whole


@pytest.mark.parametrize("name", [name for name in tool_formats() if name != "plain"])
def test_noise_is_never_lost(name: str) -> None:
    """Where no call comes of a text, all of it is content."""
    chance = random.Random(name)
    bits = [*tool_formats()[name].marks, *'abc{}[]":, \n\\', "name", '"name": "f"', '"arguments": {', "to=functions.f"]
    for _ in range(300):
        text = "".join(chance.choices(bits, k=chance.randint(1, 30)))
        whole = taken_apart(made(name), [text])
        assert taken_apart(made(name), list(text)) == whole
        if not whole[2] and name != "gpt_oss" and not text.lstrip().startswith("<answer>"):  # whose marks are no text
            assert "".join(whole[0].split()) == "".join(text.split())


@pytest.mark.parametrize("case", ["hermes", "mistral new", "llama", "deepseek", "gpt_oss call"])
def test_arguments_come_as_they_are_written(case: str) -> None:
    name, text, *_ = ANSWERS[case]
    parser = made(name).parser(TOOLS, **options_of(case))
    start = text.index("Zür")
    deltas = parser.push(text[: start + 2])
    assert deltas[-1].arguments.endswith("Zü") if isinstance(deltas[-1], ToolCallDelta) else False


def test_content_does_not_wait_for_tags_that_cannot_come() -> None:
    parser = made("hermes").parser(TOOLS)
    assert parser.push("a <to") == [ContentDelta("a")]
    assert parser.push("wer") == [ContentDelta(" <tower")]


def test_what_breaks_within_arguments_goes_on_as_it_is() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": ]}</tool_call>b'
    assert taken_apart(made("hermes"), [text]) == ("b", "", [("f", '{"a": ]}')])


NO_SCHEMAS: list[Any] = [
    [1], {"type": 5}, {"type": [{}]}, {"type": {}}, {"anyOf": 3}, {"anyOf": [{"type": {}}]}, {"enum": 7},
]  # fmt: skip


@pytest.mark.parametrize("properties", [[1], 5, *({"a": value} for value in NO_SCHEMAS)])
@pytest.mark.parametrize("name", ["qwen_xml", "glm"])
def test_where_a_schema_says_nothing_arguments_are_texts(name: str, properties: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    parser = made(name).parser(tools)
    text = qwen_xml("f", {"a": "1"}) if name == "qwen_xml" else glm("f", {"a": "1"})
    assert put_together([*parser.push(text), *parser.finish()])[2] == [("f", '{"a": "1"}')]


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "[NaN]"])
def test_arguments_are_json_whatever_the_model_writes(value: str) -> None:
    parser = made("glm").parser([tool("f", a={"type": "number"})])
    deltas = parser.push(f"<tool_call>f<arg_key>a</arg_key><arg_value>{value}</arg_value></tool_call>")
    assert put_together(deltas)[2] == [("f", as_json({"a": value}))]


def test_names_of_tools_need_be_no_names_of_python() -> None:
    parser = made("pythonic").parser([tool("get-weather"), tool("3d.view")])
    text = "[get-weather(from-date='2 (a=1)', $x=1), 3d.view()]"
    calls = put_together([*parser.push(text), *parser.finish()])[2]
    assert calls == [("get-weather", as_json({"from-date": "2 (a=1)", "$x": 1})), ("3d.view", "{}")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pythonic", r"""[f(a="\ud83d")]"""),
        ("glm", r"""<tool_call>f<arg_key>a</arg_key><arg_value>"\ud83d"</arg_value></tool_call>"""),
        ("hermes", r"""<tool_call>{"arguments": {"a": "\ud83d"}, "name": "f"}</tool_call>"""),
        ("hermes", r"""<tool_call>{"name": "\ud83d", "arguments": {}}</tool_call>"""),
    ],
)
def test_half_a_character_stays_escaped(name: str, text: str) -> None:
    parser = made(name).parser([tool("f", a={"type": "object"})])
    content, _, calls = put_together([*parser.push(text), *parser.finish()])
    assert orjson.dumps([content, calls])
    assert [json.loads(arguments) for _, arguments in calls] == [{"a": "\ud83d"}] or content == text


def test_without_tools_an_answer_has_no_frame_either() -> None:
    parser = made("hunyuan").parser()
    text = f"<think>x</think>\n<answer>\n{hunyuan(WEATHER)}\n</answer>"
    assert put_together([*parser.push(text), *parser.finish()]) == (hunyuan(WEATHER), "x", [])


def test_without_tools_nothing_is_a_call() -> None:
    parser = made("hermes").parser()
    text = f"<think>x</think>{hermes(*WEATHER)}"
    assert put_together([*parser.push(text), *parser.finish()]) == (hermes(*WEATHER), "x", [])


def test_reasoning_can_stay_in_the_content() -> None:
    assert taken_apart(made("hermes"), ["<think>x</think>y"], reasoning=False)[:2] == ("<think>x</think>y", "")


def test_the_prompt_may_open_reasoning() -> None:
    assert taken_apart(made("hermes"), ["x</think>y"], prompt_end="assistant\n<think>\n")[:2] == ("y", "x")
    assert taken_apart(made("hermes"), ["x"], prompt_end="<think>\n\n</think>\n\n")[:2] == ("x", "")


def test_ids_of_calls() -> None:
    ids = {
        name: next(delta.id for delta in made(name).parser(TOOLS).push(text) if isinstance(delta, ToolCallDelta))
        for name, text in (("hermes", hermes(*WEATHER)), ("mistral", mistral(WEATHER)), ("kimi", kimi(WEATHER)))
    }
    assert ids["kimi"] == "functions.get_weather:0"  # as its template shows it to the model again
    assert re.fullmatch(r"call_\w{20,}", ids["hermes"])
    assert re.fullmatch(r"[A-Za-z0-9]{9}", ids["mistral"])


def test_ids_of_kimis_calls_are_the_models() -> None:
    text = (
        kimi(WEATHER, NOTE, ("now", {}), ("now", {}))
        .replace(":1<", ":7<")
        .replace("now:2", "now")
        .replace("w:3", "w:2")
    )
    deltas = made("kimi").parser(TOOLS).push(text)
    ids = [delta.id for delta in deltas if isinstance(delta, ToolCallDelta) and delta.name is not None]
    assert ids == [f"functions.{name}" for name in ("get_weather:0", "note:7", "now:2", "now:3")]


@pytest.mark.parametrize(
    ("template", "name", "tags"),
    [
        ("<tool_call>\n{'name': <function-name>}\n</tool_call> <think>", "hermes", "think"),
        ("<tool_call><function=f><parameter=p>", "qwen_xml", None),
        ("<tool_call>{n}<arg_key>k</arg_key> </think>", "glm", "think"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ("<|start_header_id|> <|python_tag|>", "llama", None),
        ("<｜tool▁calls▁begin｜> ```json </think>", "deepseek", "think"),
        ("<｜tool▁calls▁begin｜> </think>", "deepseek_v31", "think"),
        ("<|start|><|channel|>analysis<|message|>", "gpt_oss", None),
        ('<|header_start|> {"name": n, "parameters": p}', "llama", None),
        ("<|header_start|> [func_name1(params_name1=params_value1)]", "pythonic", None),
        ("List of tools: <|tool_list_start|>[", "lfm2", None),
        ("<minimax:tool_call><invoke </think>", "minimax", "think"),
        ("<|tool_calls_section_begin|><|tool_call_begin|>", "kimi", None),
        ("<tool_calls>[{}]</tool_calls><think>", "hunyuan", "think"),
        ("<|im_start|>{{ content }}<|im_end|>", "hermes", None),
        (None, "plain", None),
    ],
)
def test_a_template_tells_the_format(template: str | None, name: str, tags: str | None) -> None:
    found = answer_format(template, {})
    assert found.name == name
    assert found.tags == (REASONING_TAGS[tags] if tags else None)


def test_settings_name_the_format() -> None:
    assert answer_format("<tool_call>", {}, "llama", "none").name == "llama"
    with raises(ConfigError, "server.tool_parser", "'lama'", "llama", "hermes", "auto"):
        answer_format(None, {}, "lama")
    with raises(ConfigError, "server.reasoning_parser", "think", "none", "auto"):
        answer_format(None, {}, "auto", "x")


def test_reasoning_that_stays_content_is_still_known() -> None:
    left = answer_format("<tool_call> <think>", {}, reasoning_parser="none")
    assert (left.tags, left.thought) == (None, REASONING_TAGS["think"])
    assert left.opens_reasoning("[assistant]<think>\n")
    parser = left.parser(prompt_end="<think>")
    assert [*parser.push("hm</think>Yes."), *parser.finish()] == [ContentDelta("hm</think>Yes.")]


def test_special_tokens_are_kept_where_a_format_has_some() -> None:
    template = "[TOOL_CALLS]"
    assert answer_format(template, {5: "[TOOL_CALLS]"}).keeps_special_tokens
    assert not answer_format(template, {5: "</s>"}).keeps_special_tokens
