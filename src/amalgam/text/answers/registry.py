"""Which answer formats there are, and which of them a model has.

In: a chat template, names from the settings. Out: an `AnswerFormat`. Formats never import this.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from amalgam.errors import ConfigError, describe
from amalgam.text import answers
from amalgam.text.answers.contract import Tags, ToolFormat
from amalgam.text.answers.format import AnswerFormat

AUTO = "auto"
NO_REASONING = "none"
REASONING_TAGS: Mapping[str, Tags] = {
    "think": Tags("<think>", "</think>"),
    "mistral": Tags("[THINK]", "[/THINK]"),
    "seed": Tags("<seed:think>", "</seed:think>"),
    "gemma": Tags("<|channel>thought", "<channel|>"),
}
_PLAIN, _GENERAL = "plain", "hermes"


@cache
def tool_formats() -> Mapping[str, ToolFormat]:
    """Every format of `text/answers/`, by name; modules without one are helpers."""
    found: dict[str, ToolFormat] = {}
    for module_info in sorted(pkgutil.iter_modules(answers.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{answers.__name__}.{module_info.name}")
        for tool_format in getattr(module, "FORMATS", ()) or ([module.FORMAT] if hasattr(module, "FORMAT") else ()):
            found[tool_format.name] = tool_format
    return found


def check_parsers(tool_parser: str, reasoning_parser: str) -> None:
    """
    Raises:
        ConfigError: a name that is none; the message lists those that are.
    """
    tools, reasoning = (AUTO, *tool_formats()), (AUTO, *REASONING_TAGS, NO_REASONING)
    for key, name, known in (("tool", tool_parser, tools), ("reasoning", reasoning_parser, reasoning)):
        if name not in known:
            raise ConfigError(f"server.{key}_parser is {describe(name)}.", remedy=f"Allowed: {', '.join(known)}.")


def answer_format(
    template: str | None, special_tokens: Mapping[int, str], tool_parser: str = AUTO, reasoning_parser: str = AUTO
) -> AnswerFormat:
    """The format of a model's answers.

    Args:
        template: its chat template, which shows how calls are written that it has made before; None: it has none.
        special_tokens: the tokenizer's, by id.
        tool_parser: a name of `tool_formats`, or "auto".
        reasoning_parser: a name of `REASONING_TAGS`, "none" or "auto". With "none" reasoning stays content; a limit
            of its tokens still holds.

    Raises:
        ConfigError: see `check_parsers`.
    """
    check_parsers(tool_parser, reasoning_parser)
    tool_format = tool_formats()[_recognized(template) if tool_parser == AUTO else tool_parser]
    shown = _tags(template or "")
    tags = shown if reasoning_parser == AUTO else REASONING_TAGS.get(reasoning_parser)
    content_tags = shown if reasoning_parser == NO_REASONING else None
    return AnswerFormat(tool_format, None if tool_format.reasons else tags, special_tokens, content_tags)


def _recognized(template: str | None) -> str:
    if template is None:
        return _PLAIN
    found = [name for name, tool_format in tool_formats().items() if tool_format.recognizes(template)]
    return found[0] if found else _GENERAL


def _tags(template: str) -> Tags | None:
    return next((tags for tags in REASONING_TAGS.values() if tags.start in template or tags.end in template), None)
