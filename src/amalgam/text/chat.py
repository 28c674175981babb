"""Chat messages → one text, by the Jinja template that a checkpoint brings along.

In: templates, a `ChatPrompt`. Out: the prompt's text. Must never know: token ids, files, HTTP.

Templates see what transformers gives them (its documentation "Writing a chat template"): fields that are null are left
out, reasoning has all the names that templates know it by, the arguments of calls are objects. What a template cannot
show is shown in a way that it can: tools become a system message where it knows of none, and a content in parts becomes
one text where it takes no parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from amalgam.errors import RequestError, describe
from amalgam.text.marking import Marks, SpecialTokenFinder
from amalgam.text.rendering import TemplateError, render

DEFAULT, TOOL_USE = "default", "tool_use"
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)  # no variables
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAKES_PARTS = re.compile(r"\bfor\s+\w+\s+in\s+[\w.\[\]'\"]*\bcontent\b")


@dataclass(frozen=True)
class ChatPrompt:
    """What a chat template makes a prompt of.

    Attributes:
        messages: the conversation, oldest first, each as OpenAI's interface has it: `role`, `content` (a string, or a
            list of `{"type": "text", "text": …}`), `name`, `tool_calls`, `tool_call_id`, `reasoning_content`.
        tools: `{"type": "function", "function": {"name", "description", "parameters"}}`. None: none are offered.
        documents: `{"title", "text"}`, for templates that quote them.
        variables: what else the template may refer to, such as `enable_thinking`.
        add_generation_prompt: end with the beginning of the assistant's answer.
        continue_final_message: end within the last message, so that the answer goes on with it.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class ChatTemplates:
    """The templates of one model. Any thread may use them.

    Args:
        sources: Jinja, by name.
        variables: what templates may refer to beside the messages, such as `bos_token`.
        sorts_tools: the keys of tools are put in order, as Kimi's tokenizer does it.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str], *, sorts_tools: bool = False) -> None:
        self._sources = dict(sources)
        self._variables = dict(variables)
        self._sorts_tools = sorts_tools

    @property
    def names(self) -> list[str]:
        return sorted(self._sources)

    def source(self, *, has_tools: bool = False) -> str | None:
        """The template that is used; None if there is none."""
        chosen = self._sources.get(TOOL_USE) if has_tools else None
        return chosen or self._sources.get(DEFAULT)

    def render(self, prompt: ChatPrompt, special_tokens: SpecialTokenFinder | None = None) -> tuple[str, str]:
        """The text of a conversation.

        Args:
            special_tokens: those that stay text where a message has them.

        Returns:
            The text, and the mark that stands in it wherever a special token must not begin; empty: it has none.

        Raises:
            RequestError: the prompt asks for what there is not.
            TemplateError: what is wrong with the template, or with the messages in its eyes.
        """
        source = self.source(has_tools=prompt.tools is not None)
        assert source is not None
        _check(prompt)
        marks = Marks(prompt, source, special_tokens)
        attempts = _attempts(prompt, source)
        first_error: TemplateError | None = None
        for attempt in attempts:
            try:
                return self._render(source, attempt, marks), marks.mark
            except TemplateError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _render(self, source: str, prompt: ChatPrompt, marks: Marks) -> str:
        messages = [marks.in_message(message) for message in prompt.messages]
        end = ""
        if prompt.continue_final_message:
            messages[-1], end = _with_end(messages[-1], marks.end)
        tools = _in_order(prompt.tools) if self._sorts_tools else prompt.tools
        text = render(
            source,
            {
                **self._variables,
                **marks.in_value(dict(prompt.variables)),
                "messages": messages,
                "tools": marks.in_value(tools),
                "documents": marks.in_value(prompt.documents),
                "add_generation_prompt": prompt.add_generation_prompt,
            },
            marks.mark,
        )
        return _up_to_end(text, marks.end, end) if prompt.continue_final_message else text


def _in_order(value: Any) -> Any:
    """The same value, its keys sorted at every depth."""
    if isinstance(value, Mapping):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(item) for item in value] if isinstance(value, list | tuple) else value


def _check(prompt: ChatPrompt) -> None:
    if named := sorted(RESERVED & prompt.variables.keys()):
        raise RequestError(
            f"The template's variables have {describe(named[0])}.", remedy="That is no variable; use the field."
        )
    if prompt.continue_final_message and prompt.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt are both true.", remedy="Choose one of them."
        )


def _attempts(prompt: ChatPrompt, source: str) -> Iterator[ChatPrompt]:
    """The prompt as templates want it; most of them first.

    Some want arguments of calls as the text that the model wrote, and a content even where it is empty.
    """
    tools = prompt.tools
    if tools is not None and not re.search(r"\btools\b", source):
        prompt = replace(prompt, messages=_with_tools(prompt.messages, tools), tools=None)
    takes_parts = _TAKES_PARTS.search(source) is not None
    yield replace(prompt, messages=[_for_template(message, takes_parts) for message in prompt.messages])
    if any(message.get("tool_calls") for message in prompt.messages):
        as_text = [_with_text_arguments(message) for message in prompt.messages]
        yield replace(prompt, messages=[_for_template(message, takes_parts, parses=False) for message in as_text])


def _for_template(message: Mapping[str, Any], takes_parts: bool, *, parses: bool = True) -> dict[str, Any]:
    found = {name: value for name, value in message.items() if value is not None}
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    if reasoning is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    content = found.get("content")
    if content is not None and not isinstance(content, str) and not takes_parts:
        found["content"] = "\n".join(part["text"] for part in content)
    if parses and "tool_calls" in found:
        found["tool_calls"] = [_with_arguments(call, _parsed) for call in found["tool_calls"]]
    return found


def _with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return {**message, "content": message.get("content") or "",
            "tool_calls": [_with_arguments(call, _written) for call in calls]}  # fmt: skip


def _with_arguments(call: Mapping[str, Any], change: Any) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": change(function["arguments"])}}


def _parsed(arguments: Any) -> Any:
    """Arguments as an object, if they are one."""
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return found if isinstance(found, dict) else arguments
    return arguments


def _written(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_end(message: dict[str, Any], end: str) -> tuple[dict[str, Any], str]:
    """A message that ends with a mark, and what stands before that; as transformers has it."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": f"{content}{end} "}, content
    if content:
        parts = [dict(part) for part in content]
        last = parts[-1]["text"]
        parts[-1]["text"] = f"{last}{end} "
        return {**message, "content": parts}, last
    raise RequestError(
        "continue_final_message is true, and the last message has no content.", remedy="Give it a text to go on with."
    )


def _up_to_end(text: str, end: str, content: str) -> str:
    place = text.rfind(end)
    if place < 0 or content.strip() not in text:
        raise RequestError(
            "continue_final_message is true, and the chat template changes or drops the last message.",
            remedy="Send it without, or a last message that the template shows as it is.",
        )
    before = text[:place]
    return before if text.startswith(f"{end} ", place) else before.rstrip()  # the template takes spaces away


_DESCRIPTION = """You can call functions. For each call write a JSON object with the function's name and its arguments
between tags, and nothing after it:
<tool_call>
{"name": "the function's name", "arguments": {"an argument's name": "its value"}}
</tool_call>
The functions, as JSON schemas:
"""


def _with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation that has its tools, calls and results as text, in the way of Hermes' models."""
    lines = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
    about = _DESCRIPTION + "\n".join(lines) if tools else ""
    found = [_as_text(message) for message in messages]
    if about and found[0]["role"] in ("system", "developer"):
        found[0] = {**found[0], "content": f"{_text_of(found[0])}\n\n{about}"}
    elif about:
        found.insert(0, {"role": "system", "content": about})
    return found


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text_of(message)}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    lines = [_text_of(message)] if message.get("content") else []
    for call in calls:
        function = call["function"]
        written = json.dumps(
            {"name": function["name"], "arguments": _parsed(function["arguments"])}, ensure_ascii=False
        )
        lines.append(f"<tool_call>\n{written}\n</tool_call>")
    return {**{name: value for name, value in message.items() if name != "tool_calls"}, "content": "\n".join(lines)}


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
