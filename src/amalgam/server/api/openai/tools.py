"""Tools of a request: which are offered, and which the answer has to call.

In: a request's JSON. Out: the tools that the model is shown, and what is asked of its answer. Must never know: how a
model writes calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from amalgam.errors import RequestError, UnsupportedError, describe
from amalgam.server.api.common import ToolUse, check_tools_length
from amalgam.server.api.openai.refusing import CACHE_CONTROL, OpenAIBody
from amalgam.server.http.body import Body

MAX_TOOLS = 128  # as OpenAI has it

SCHEMA_PLACE = "tools[{}].function.parameters"  # of the tool with that index, in a chat's request

FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]

ToolChoice = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}},
                            "required": ["name"],
                            "additionalProperties": False,
                        },
                    },
                    "required": ["type", "function"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class FunctionFields(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of the arguments; null: none are taken."""
    strict: bool | None = None
    """True: arguments always follow the schema, in the formats of Hermes and Qwen, and GLM. Where tool_choice demands a
    call they do so anyway.
    """


def tool_use(functions: Sequence[FunctionFields], choice: Any, schema_place: str, *, is_parallel: bool) -> ToolUse:
    """
    Args:
        choice: as either endpoint has it: a word, `{"type": "function", …}` with the name inside or beside it, or
            `{"type": "allowed_tools", …}`.
        schema_place: where the request has the schema of the tool with the index `{}`.

    Raises:
        RequestError: it is none of these, or names a tool that is not there; the tools are too long.
        UnsupportedError: it is for another kind of tool.
    """
    check_tools_length(functions)
    names = [function.name for function in functions]
    schema_places = {name: schema_place.format(index) for index, name in enumerate(names)}
    if len(set(names)) < len(names):
        raise RequestError("Two tools have the same name.", remedy="Give each its own.", param="tools")
    if not functions:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice is given without tools.", remedy="Give tools.", param="tool_choice")
        return ToolUse()
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        is_known = isinstance(allowed, dict) and {*allowed, *choice} <= {"type", "allowed_tools", "mode", "tools"}
        mode, listed = (allowed.get("mode"), allowed.get("tools")) if is_known else (None, None)
        if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
            raise _wrong_choice(choice)
        chosen = {_name_in(item, names) for item in listed}
        functions, choice = [function for function in functions if function.name in chosen], mode
    if choice == "none":
        return ToolUse()
    tools = [{"type": "function", "function": function.model_dump(exclude_none=True)} for function in functions]
    if choice in (None, "auto"):
        is_strict = any(function.strict for function in functions)
        return ToolUse(tools, schema_places, is_parallel=is_parallel, is_strict=is_strict)
    if choice == "required":
        return ToolUse(tools, schema_places, is_required=True, is_parallel=is_parallel)
    name = _name_in(choice, names)
    return ToolUse(tools, schema_places, is_required=True, name=name, is_parallel=False)


def _name_in(value: Any, names: Sequence[str]) -> str:
    """The tool's name in `{"type": "function", "function": {"name"}}` or `{"type": "function", "name"}`."""
    if not isinstance(value, dict):
        raise _wrong_choice(value)
    if (kind := value.get("type")) != "function":
        if isinstance(kind, str):
            raise UnsupportedError(
                f"tool_choice has the type {describe(kind)}.", remedy="Allowed: function.", param="tool_choice"
            )
        raise _wrong_choice(value)
    rest = {key: item for key, item in value.items() if key != "type"}
    inner = rest.get("function", rest)
    if not isinstance(inner, dict) or set(inner) != {"name"} or ("function" in rest and len(rest) > 1):
        raise _wrong_choice(value)
    name = inner["name"]
    if not isinstance(name, str) or name not in names:
        raise RequestError(
            f"tool_choice names {describe(name)}.", remedy=f"Allowed: {', '.join(names)}.", param="tool_choice"
        )
    return name


def _wrong_choice(choice: Any) -> RequestError:
    return RequestError(
        f"tool_choice is {describe(choice)}.",
        remedy="Allowed: 'none', 'auto', 'required', a function by name, or allowed_tools.",
        param="tool_choice",
    )


class FunctionTool(OpenAIBody):
    """A tool as chat completions have it."""

    refused = CACHE_CONTROL

    type: Literal["function"]
    function: FunctionFields
