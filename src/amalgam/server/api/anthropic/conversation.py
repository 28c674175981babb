"""A request of Anthropic's interface → what the chat template, the parser and the engine take.

In: checked fields. Out: a `ChatPrompt`, tools, sampling parameters. Must never know: answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amalgam.engine.params import SamplingParams
from amalgam.errors import RequestError, describe
from amalgam.server.api.anthropic.fields import (
    AssistantMessage,
    MessagesBody,
    NamedTool,
    NoTool,
    PromptBody,
    TextBlock,
    ThinkingBlock,
    ThinkingDisabled,
    ThinkingEnabled,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)
from amalgam.server.api.common import ToolUse, check_tools_length
from amalgam.server.api.variables import template_variables
from amalgam.text.chat import ChatPrompt


def chat_prompt(body: PromptBody, template: str | None) -> ChatPrompt:
    """
    Args:
        template: the model's chat template.

    Raises:
        RequestError: blocks that do not belong together.
        UnsupportedError: what the model cannot be told.
    """
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _joined(body.system)})
    called: set[str] = set()
    for index, message in enumerate(body.messages):
        if isinstance(message, UserMessage):
            messages += _of_user(message, called, index)
        elif isinstance(message, AssistantMessage):
            found = _of_assistant(message)
            called |= {call["id"] for call in found.get("tool_calls") or ()}
            messages.append(found)
        else:
            messages.append({"role": "system", "content": _joined(message.content)})
    continues = isinstance(body.messages[-1], AssistantMessage)
    if continues and not messages[-1]["content"]:
        raise RequestError(
            "The last of messages is the assistant's and has no text to go on with.",
            remedy="End with a message of the user; results of tools are one.",
            param="messages",
        )
    tools = tool_use(body).tools
    return ChatPrompt(
        messages,
        tools or None,
        None,
        _variables(body, template),
        add_generation_prompt=not continues,
        continue_final_message=continues,
    )


def tool_use(body: PromptBody) -> ToolUse:
    """
    Raises:
        RequestError: tool_choice names none of the tools, or there are none; the tools are too long.
    """
    check_tools_length(body.tools)
    choice = body.tool_choice
    if isinstance(choice, NoTool):
        return ToolUse()
    names = [tool.name for tool in body.tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(
            f"tools has {describe(twice)} twice.", remedy="Give each tool a name of its own.", param="tools"
        )
    is_required = isinstance(choice, NamedTool) or choice.type == "any"
    if is_required and not names:
        raise RequestError(
            f"tool_choice is {describe(choice.type)}, and there are no tools.",
            remedy="Give tools.",
            param="tool_choice",
        )
    if isinstance(choice, NamedTool) and choice.name not in names:
        raise RequestError(
            f"tool_choice names {describe(choice.name)}.",
            remedy=f"Tools of this request: {', '.join(names) or 'none'}.",
            param="tool_choice.name",
        )
    for index, tool in enumerate(body.tools):
        if tool.input_schema.get("type", "object") != "object":
            raise RequestError(
                f"tools[{index}].input_schema.type is {describe(tool.input_schema['type'])}.",
                remedy="Allowed: 'object'.",
                param=f"tools[{index}].input_schema",
            )
    tools = tuple(
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
        }
        for tool in body.tools
    )
    name = choice.name if isinstance(choice, NamedTool) else None
    is_strict = not is_required and any(tool.strict for tool in body.tools)
    schema_places = {name: f"tools[{index}].input_schema" for index, name in enumerate(names)}
    is_parallel = not choice.disable_parallel_tool_use
    return ToolUse(tools, schema_places, is_required, name, is_parallel, is_strict)


def sampling_params(body: MessagesBody, defaults: SamplingParams, *, keeps_special_tokens: bool) -> SamplingParams:
    """What the body says, and `defaults` where it says nothing.

    Raises:
        RequestError: a value is out of range.
    """
    thinking = body.thinking
    if isinstance(thinking, ThinkingEnabled) and thinking.budget_tokens >= body.max_tokens:
        raise RequestError(
            f"thinking.budget_tokens is {thinking.budget_tokens}, and max_tokens is {body.max_tokens}.",
            remedy="Leave some of max_tokens to the answer.",
            param="thinking.budget_tokens",
        )
    given: dict[str, Any] = {
        name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(body, name)) is not None
    }
    if body.stop_sequences:
        given["stop"] = tuple(body.stop_sequences)
    return SamplingParams(
        max_new_tokens=body.max_tokens,
        continues_prompt=isinstance(body.messages[-1], AssistantMessage),
        keeps_special_tokens=keeps_special_tokens,
        **given,
    ).over(defaults)


def _joined(blocks: Sequence[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)


def _of_user(message: UserMessage, called: set[str], index: int) -> list[dict[str, Any]]:
    """Results of tools are messages of their own; what a user says in one message stays together."""
    found: list[dict[str, Any]] = []
    for place, block in enumerate(message.content):
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in called:
                raise RequestError(
                    f"messages[{index}].content[{place}].tool_use_id is {describe(block.tool_use_id)}.",
                    remedy="Give the id of a tool_use block of an earlier message.",
                    param=f"messages[{index}].content[{place}].tool_use_id",
                )
            text = _joined(block.content)
            text = f"Error: {text}" if block.is_error else text
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
        elif found and found[-1]["role"] == "user":
            found[-1]["content"] += f"\n{block.text}"
        else:
            found.append({"role": "user", "content": block.text})
    return found


def _of_assistant(message: AssistantMessage) -> dict[str, Any]:
    texts = [block.text for block in message.content if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in message.content
        if isinstance(block, ToolUseBlock)
    ]
    found: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        found["reasoning_content"] = "\n".join(thoughts)
    if calls:
        found["tool_calls"] = calls
    return found


def _variables(body: PromptBody, template: str | None) -> dict[str, Any]:
    """Nothing about thinking turns it off, unless an effort is given, for which the template may have no other word."""
    effort = body.output_config.effort
    is_said = "thinking" in body.model_fields_set or effort is None
    variables = template_variables(
        template,
        effort=effort,
        thinks=not isinstance(body.thinking, ThinkingDisabled) if is_said else None,
    )
    if isinstance(body.thinking, ThinkingEnabled) and "thinking_budget" in (template or ""):
        variables["thinking_budget"] = body.thinking.budget_tokens
    return variables
