"""The fields that several of OpenAI's endpoints share, OpenAI's own and those that vLLM added to them.

In: a request's JSON. Out: sampling parameters, a grammar, what is to be observed. Must never know: prompts, answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, WithJsonSchema, model_validator

from amalgam.engine.params import (
    MAX_LOGPROBS,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
    SamplingParams,
)
from amalgam.engine.request import Observation
from amalgam.errors import RequestError, about, describe
from amalgam.server.api.common import MAX_INT, CommonSampling, Form, WeightsField, neutral_defaults
from amalgam.server.api.openai.refusing import OpenAIBody
from amalgam.server.api.refusing import Refused
from amalgam.server.http.body import Body
from amalgam.server.service import Service
from amalgam.text.grammar import Grammar

MAX_SAMPLES = 128  # as OpenAI has it

# Checked by `compile_grammar`, not here.
JSONSchema = Annotated[Any, WithJsonSchema({"type": "object", "description": "A JSON schema"})]


class StreamOptions(OpenAIBody):
    place = "stream_options."
    refused = {  # noqa: RUF012
        "include_obfuscation": Refused("Events are not padded.", (False,))
    }

    include_usage: bool = False
    """End with one more event that has the token counts and no choices."""
    continuous_usage_stats: bool = False
    """With `include_usage`: counts in every event."""


class JSONSchemaFormat(Body):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    schema_: JSONSchema = Field(alias="schema", default_factory=dict)
    strict: bool = False
    """The answer follows the schema either way."""
    description: str | None = None


class ResponseFormat(OpenAIBody):
    place = "response_format."

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type 'json_schema', and only there")
        return self

    def form(self) -> Form | None:
        if self.json_schema is not None:
            return Form.of_schema(self.json_schema.schema_, "response_format")
        return Form(Grammar("json_object"), "response_format") if self.type == "json_object" else None


class StructuredOutputs(OpenAIBody):
    """What the answer must look like, as vLLM has it; one of them."""

    place = "structured_outputs."
    refused = {
        name: Refused("The grammars of llguidance have it as it is.", (False,))
        for name in ("disable_fallback", "disable_any_whitespace", "disable_additional_properties")
    } | {
        "whitespace_pattern": Refused("Use grammar to say where white space may stand."),
        "structural_tag": Refused("Use grammar."),
    }

    json_: JSONSchema = Field(alias="json", default=None)
    """A JSON schema, as an object or as text."""
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1, fail_fast=True)
    """The answer is one of these."""
    grammar_: str | None = Field(alias="grammar", default=None)
    """A grammar in the Lark syntax of llguidance."""
    json_object: bool | None = None

    def form(self) -> Form | None:
        return _one_form(
            self.place,
            {
                "json": self.json_,
                "regex": self.regex,
                "choice": self.choice,
                "grammar": self.grammar_,
                "json_object": self.json_object or None,
            },
        )


def _one_form(place: str, given: Mapping[str, Any]) -> Form | None:
    """
    Args:
        place: what the names of the fields begin with.
        given: kind of the form → what the field of that name says.

    Raises:
        RequestError: there are several, or it is too long.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        names = [place + kind for kind in named]
        raise RequestError(f"{' and '.join(names)} are given together.", remedy="Give one of them.", param=names[0])
    for kind, value in named.items():
        with about(place + kind):
            return Form(_grammar(kind, value), place + kind)
    return None


def _grammar(kind: str, value: Any) -> Grammar:
    """
    Raises:
        RequestError: it is too long.
    """
    if kind == "json":
        return Grammar("json_schema", value) if isinstance(value, str) else Grammar.of_schema(value)
    if kind == "choice":
        return Grammar.of_choices(value)
    if kind == "json_object":
        return Grammar("json_object")
    return Grammar("lark" if kind == "grammar" else "regex", value)


class ModelField(OpenAIBody):
    model: str | None = Field(default=None, max_length=512)
    """The served model's name, as `GET /v1/models` lists it."""
    user: str | None = None
    """Nothing is made of it but this: while a candidate for the weights is tried, equal ones get the same weights."""

    def check_model(self, service: Service) -> str:
        """The name that the answer bears.

        Raises:
            ModelNotFoundError: another model is asked for.
        """
        return service.check_model(self.model)


class SamplerFields(CommonSampling, ModelField, WeightsField):
    """How to sample. The defaults are those of the model's `generation_config.json`, and else OpenAI's."""

    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    """Divides the logits; 0 is greedy. OpenAI's default is 1."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability. OpenAI's default is 1."""
    seed: int | None = Field(default=None, ge=-MAX_SEED - 1, le=MAX_SEED)
    """The same seed gives the same answer."""
    stream: bool = False
    """Answer with server-sent events as the text comes, ended with `data: [DONE]`."""
    # vLLM's
    top_k: int | None = Field(default=None, ge=-1, le=MAX_INT)
    """Sample from this many of the likeliest tokens; 0 or -1: no limit."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Leave out tokens less likely than this share of the likeliest one."""
    repetition_penalty: float | None = Field(default=None, ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)
    """Above 1: tokens that have appeared, in the prompt too, become less likely."""
    skip_special_tokens: bool = True
    """False: special tokens have text."""
    # Our own
    domain: str | None = Field(default=None, min_length=1, max_length=64)
    """A label under which the expert statistics count this request apart."""

    def observation(self, *, wants_trace: bool = False) -> Observation:
        return Observation(self.domain, wants_trace)

    def sampling_params(self, service: Service, **more: Any) -> SamplingParams:
        """What the body says, and where it says nothing what the model says, and else what OpenAI's interface says."""
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        if self.top_k == -1:
            given["top_k"] = 0
        if self.seed is not None:
            given["seed"] = self.seed % (MAX_SEED + 1)
        return SamplingParams(
            keeps_special_tokens=not self.skip_special_tokens,
            **self.given(CommonSampling),
            **given,
            **more,
        ).over(neutral_defaults(service))


class SamplingFields(SamplerFields):
    """What completions and chats add to it."""

    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    """Choices for each prompt. With a seed, sample i has seed + i."""
    stream_options: StreamOptions | None = None
    include_stop_str_in_output: bool = False
    """The answer ends with the stop string that ended it."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Log-probabilities of the prompt's tokens, and of so many likeliest ones at each place."""
    return_token_ids: bool = False
    """Answer with the token ids of prompt and choices."""
    return_tokens_as_token_ids: bool = False
    """Tokens of log-probabilities are spelt `token_id:7`."""
    guided_json: JSONSchema = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(default=None, min_length=1, fail_fast=True)
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    """`{"type": "text" | "json_object" | "json_schema"}`."""
    routed_experts: bool = False
    """Each choice has the experts that each token was routed to: `[tokens - 1, layers, top_k]`, a .npy in base64."""

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def with_usage_always(self) -> bool:
        return self.with_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check(self, service: Service) -> None:
        """
        Raises:
            RequestError: a combination that cannot be served.
        """
        if self.n > service.settings.engine.max_queue:
            limit = service.settings.engine.max_queue
            raise RequestError(f"n is {self.n}.", remedy=f"Allowed: at most engine.max_queue, {limit}.", param="n")
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options is given without stream.", remedy="Set stream to true.", param="stream_options"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs is given with stream true.", remedy="Ask for one of them.", param="prompt_logprobs"
            )

    def form(self) -> Form | None:
        """What the answer has to look like; None: anything.

        Raises:
            RequestError: there are several, or it is too long.
        """
        guided = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        forms = (
            _one_form("guided_", guided),
            None if self.structured_outputs is None else self.structured_outputs.form(),
            None if self.response_format is None else self.response_format.form(),
        )
        found = [form for form in forms if form is not None]
        if len(found) > 1:
            names = [form.field for form in found]
            raise RequestError(
                f"{' and '.join(names)} are given together.", remedy="Give one of them.", param=names[-1]
            )
        return found[0] if found else None


def check_together(what: str, given: Mapping[str, Any]) -> None:
    """
    Raises:
        RequestError: several of the fields, which mean the same, are given with different values.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{name} is {describe(value)}" for name, value in values.items())
        raise RequestError(f"{listed}.", remedy=f"Both say {what}; give one.", param=list(values)[-1])
