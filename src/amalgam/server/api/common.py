"""What the interfaces have in common: limits of fields, and what is sampled by where a request does not say.

Must never know: the shape of any interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field

from amalgam.base.strict_json import is_longer
from amalgam.engine.request import SamplingParams
from amalgam.errors import RequestError
from amalgam.server.service import Service

MAX_INT = 2**31 - 1
MAX_MESSAGES = 4096
MAX_TOOLS_CHARS = 2**18
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # as OpenAI and Anthropic document them

StopString = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class ToolUse:
    """What a request wants of tools.

    Attributes:
        tools: those that the model is shown, each `{"type": "function", "function": {…}}`.
        is_required: the answer has to call one.
        name: the one to be called; None: any.
        is_parallel: whether an answer may hold several calls.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    is_required: bool = False
    name: str | None = None
    is_parallel: bool = True


def as_list(value: Any) -> Any:
    """One text is a list of one."""
    return [value] if isinstance(value, str) else value


def check_tools_length(tools: Sequence[BaseModel]) -> None:
    """Tools are short: what writes them into a prompt takes long for each of their characters.

    Raises:
        RequestError: their JSON is too long.
    """
    if is_longer([list(tool.__dict__.values()) for tool in tools], MAX_TOOLS_CHARS):
        raise RequestError(
            f"tools has more than {MAX_TOOLS_CHARS} characters in all.",
            remedy="Offer fewer tools, or shorten their descriptions and schemas.",
            param="tools",
        )


def neutral_defaults(service: Service) -> SamplingParams:
    """What the model says in its `generation_config.json`, and else no change of the model's probabilities."""
    return SamplingParams(**{**NEUTRAL, **service.deployment.defaults.from_model})
