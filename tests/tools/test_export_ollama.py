"""`amalgam export --to ollama`: the Modelfile, by its published grammar, and templates as Go renders them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from amalgam.config.settings import Settings
from amalgam.text.chat import ChatPrompt, ChatTemplates
from amalgam.text.rendering import TemplateError
from amalgam.tools.export.exporting import export_model
from amalgam.tools.export.llama_cpp.templates import STYLES, Message, Style, style_of
from tests import ollama_templates

DEMO = Path(__file__).parents[2] / "models" / "demo"
RENDERED = json.loads(ollama_templates.DATA.read_text(encoding="utf-8"))
# Modelfile's grammar: comments, and instructions whose value is one word, in quotes, or in three of them.
_VALUE = r'"""(?P<long>.*?)"""|"(?P<quoted>[^"\n]*)"|(?P<bare>[^\n]+)'
_LINE = re.compile(rf"#[^\n]*\n|\n|(?P<name>FROM|TEMPLATE|SYSTEM|PARAMETER(?: \w+)) (?:{_VALUE})\n", re.S)
_KNOWN = {"num_ctx", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "num_predict", "stop"}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nI am it.<|im_end|>\n{% endif %}" + CHATML
GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}"
    "{% if loop.first %}{{ first }}{% endif %}{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_WITHOUT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + GEMMA
CASES = {
    "ChatML": (CHATML, "ChatML", None),
    "with a system message of its own": (WITH_DEFAULT, "ChatML", "I am it."),
    "Gemma": (GEMMA, "Gemma", None),
    "Gemma without system messages": (GEMMA_WITHOUT, "Gemma", None),
}


def found(template: str, begin: str = "<bos>") -> Style | None:
    templates = ChatTemplates({"default": template}, {"bos_token": begin})

    def render(messages: Sequence[Message]) -> str:
        try:
            return templates.render(ChatPrompt([dict(message) for message in messages]))[0]
        except TemplateError as error:
            raise ValueError from error

    return style_of(render, begin)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_go_renders_what_the_style_says(style: Style) -> None:
    assert RENDERED[style.name]["go"] == style.go(), "changed: python -m tests.ollama_templates"
    assert RENDERED[style.name]["texts"] == ollama_templates.texts(style)


@pytest.mark.parametrize("case", CASES)
def test_a_style_is_known_by_what_its_template_writes(case: str) -> None:
    template, name, default = CASES[case]
    style = found(template)
    assert style is not None
    assert (style.name, style.default) == (name, default)


def test_a_token_that_a_conversation_begins_with_may_be_that_of_a_message() -> None:
    style = found(WITH_DEFAULT, "<|im_start|>")
    assert style is not None and style.default == "I am it."


def test_a_template_of_its_own() -> None:
    assert found(CHATML.replace("<|im_end|>", "<|im_over|>")) is None


def parsed(text: str) -> list[tuple[str, str]]:
    """Instructions and values of a Modelfile; every character belongs to one, to a comment, or to an empty line."""
    position, lines = 0, []
    while position < len(text):
        line = _LINE.match(text, position)
        assert line is not None, text[position : position + 80]
        if line["name"]:
            lines.append(
                (line["name"], next(value for value in line.group("long", "quoted", "bare") if value is not None))
            )
        position = line.end()
    return lines


def test_the_demo(tmp_path: Path) -> None:
    report = export_model(Settings(model={"base_path": str(DEMO)}), "ollama", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    assert report.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    lines = parsed((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))
    assert lines[0] == ("FROM", "./model.gguf")
    assert dict(lines)["TEMPLATE"] == RENDERED["ChatML"]["go"]
    parameters = [(name.removeprefix("PARAMETER "), value) for name, value in lines if name.startswith("PARAMETER")]
    assert {name for name, _ in parameters} <= _KNOWN
    assert {value for name, value in parameters if name == "stop"} == {"<|endoftext|>", "<|im_end|>"}
    assert dict(parameters)["temperature"] == "0.7" and dict(parameters)["num_ctx"] == "4096"
