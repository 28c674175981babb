"""What the interfaces have in common: fields and their limits, and what is sampled by where a request does not say.

Must never know: the shape of any interface.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from amalgam.base.strict_json import is_longer
from amalgam.engine.params import (
    MAX_BIASED_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_PENALTY,
    MAX_PRIORITY,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from amalgam.errors import RequestError, about
from amalgam.server.http.body import Body, limited
from amalgam.server.service import Service
from amalgam.text.grammar import Grammar

MAX_INT = 2**31 - 1
MAX_MESSAGES = 4096
MAX_PARTS = 4096  # of one message
MAX_CALLS = 256  # in one message
MAX_TOOLS_CHARS = 2**18
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # as OpenAI and Anthropic document them

StopString = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]


def as_list(value: Any) -> Any:
    """One text is a list of one."""
    return [value] if isinstance(value, str) else value


def _as_number(value: Any) -> Any:
    """A key of a JSON object, which is always text."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,10}", value) else value


AskedWeights = Annotated[str, Field(min_length=1, max_length=64)] | Annotated[int, Field(ge=1, le=2**53)]


class WeightsField(Body):
    """Of requests that are answered with weights of their choice."""

    weights: AskedWeights | None = None
    """Named weights, or the id of a weight version that is kept, as `GET /weights` lists them. null: the current ones.
    """


class CommonSampling(Body):
    """The fields of sampling that mean the same, and are left alone by the same default, in several interfaces."""

    stop: Annotated[
        list[StopString],
        Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
        BeforeValidator(as_list, json_schema_input_type=str | list[StopString] | None),
    ] = Field(default_factory=list)
    """Where to end: a string or several. The answer does not hold it. It may contain special tokens, `<|im_end|>`."""
    presence_penalty: float = Field(default=SamplingParams.presence_penalty, ge=-MAX_PENALTY, le=MAX_PENALTY)
    """Taken from the logit of each token that the answer has already."""
    frequency_penalty: float = Field(default=SamplingParams.frequency_penalty, ge=-MAX_PENALTY, le=MAX_PENALTY)
    """The same, once for each time that the answer has it."""
    logit_bias: Annotated[
        dict[
            Annotated[TokenId, BeforeValidator(_as_number)],
            Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)],
        ],
        Field(max_length=MAX_BIASED_TOKENS),
        limited(MAX_BIASED_TOKENS),
    ] = Field(default_factory=dict)
    """Token id → what is added to its logit."""
    min_tokens: int = Field(default=SamplingParams.min_tokens, ge=0, le=MAX_INT)
    """The answer does not end before it has so many tokens."""
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)
    """Tokens that end the answer."""
    ignore_eos: bool = SamplingParams.ignore_eos
    """Go on behind an end-of-sequence token."""
    priority: int = Field(default=SamplingParams.priority, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Of waiting requests the lowest is taken first, and of equal ones the first."""
    speculate: bool = SamplingParams.speculate
    """False: no tokens are guessed ahead for this request. Changes no answer."""

    def given(self, fields: type[Body]) -> dict[str, Any]:
        """Those of `fields` that the request has: of the others the model's defaults hold."""
        return {name: getattr(self, name) for name in fields.model_fields if name in self.model_fields_set}


@dataclass(frozen=True)
class Form:
    """What the content of an answer has to look like, and the field of the request that says so."""

    grammar: Grammar
    field: str

    @classmethod
    def of_schema(cls, schema: Any, field: str) -> Form:
        """
        Raises:
            RequestError: it is too long.
        """
        with about(field):
            return cls(Grammar.of_schema(schema), field)


@dataclass(frozen=True)
class ToolUse:
    """What a request wants of tools.

    Attributes:
        tools: those that the model is shown, each `{"type": "function", "function": {…}}`.
        schema_places: name of a tool → where in the request the schema of its arguments stands.
        is_required: the answer has to call one.
        name: the one to be called; None: any.
        is_parallel: whether an answer may hold several calls.
        is_strict: calls fit the tools' schemas where the answer need not have any, too.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    schema_places: Mapping[str, str] = field(default_factory=dict)
    is_required: bool = False
    name: str | None = None
    is_parallel: bool = True
    is_strict: bool = False


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
