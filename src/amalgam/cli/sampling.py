"""The flags of `generate` and `chat` that say how to sample, and the same as text that is typed in."""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from amalgam.engine.generation_config import ModelDefaults
from amalgam.engine.params import SamplingParams
from amalgam.errors import RequestError

if TYPE_CHECKING:
    from amalgam.text.grammar import Grammar

# What is not given is as the model's generation_config.json has it, and only then as it says here.
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Most tokens to generate. [default: the model's, or 512; for generate 128]")
]
Temperature = Annotated[float | None, typer.Option(help="0: greedy. [default: the model's, or 0.7]")]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the smallest set of tokens with this total probability. [default: the model's, or 0.9]"
    ),
]
TopK = Annotated[
    int | None, typer.Option(help="Sample from this many most probable tokens; 0: all. [default: the model's, or 50]")
]
MinP = Annotated[
    float | None, typer.Option(help="Only tokens with at least this probability, relative to the most probable one.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling: the same seed gives the same text.")]
Stop = Annotated[list[str], typer.Option(help="Stop before this text. Repeatable.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: tokens seen before become less probable.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Above 0: tokens of the answer become less probable.")]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="As --presence-penalty, for each time that the token occurs.")
]
MinTokens = Annotated[int | None, typer.Option(help="Fewest tokens to generate.")]
JsonSchema = Annotated[Path | None, typer.Option(help="Answer with JSON of the schema in this file.")]
Regex = Annotated[str | None, typer.Option(help="Answer with a text that matches this regular expression.")]

_HOW_TO_SAMPLE = ("temperature", "top_p", "top_k", "min_p")
_FIXED = (  # how a chat works, and not how it sounds
    "ignore_eos", "continues_prompt", "logprobs", "stop_token_ids", "logit_bias", "prompt_logprobs", "priority",
    "thinking",
)  # fmt: skip
_NONE = ("none", "null", "off")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def chosen(**given: Any) -> SamplingParams:
    """Parameters of which those that are None were not given.

    Raises:
        RequestError: a value is out of range.
    """
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def grammar_of(json_schema: Path | None, regex: str | None) -> Grammar | None:
    """What answers must follow.

    Raises:
        RequestError: both are given, the file cannot be read, or what is given is malformed.
    """
    from amalgam.text.grammar import Grammar, check_grammar

    if json_schema is None:
        if regex is None:
            return None
        grammar = Grammar("regex", regex)
    elif regex is None:
        grammar = Grammar("json_schema", _read(json_schema))
    else:
        raise RequestError("--json-schema and --regex exclude each other.", remedy="Give one of them.")
    check_grammar(grammar)
    return grammar


def _read(json_schema: Path) -> str:
    try:
        return json_schema.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{str(json_schema)!r} cannot be read: {error}.", remedy="Give a file of JSON.") from None


def completed(params: SamplingParams, defaults: ModelDefaults, max_new_tokens: int) -> SamplingParams:
    """`params` with the model's defaults for what was not given.

    Args:
        max_new_tokens: where neither says it.
    """
    ours = (
        defaults.params
        if "max_new_tokens" in defaults.from_model
        else replace(defaults.params, max_new_tokens=max_new_tokens)
    )
    return params.over(ours)


def changed(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """`params` with one of them as `text` says.

    Raises:
        RequestError: there is none of that name, or `text` is none of its values.
    """
    name = name.replace("-", "_")
    types = {key: kind for key, kind in get_type_hints(SamplingParams).items() if key in names()}
    if name not in types:
        close = get_close_matches(name, types, n=1)
        raise RequestError(
            f"There is no {name!r} to set.",
            remedy=f"Did you mean {close[0]}?" if close else f"There are {', '.join(names())}.",
        )
    value = _value(name, text, types[name])
    changes: dict[str, Any] = {"do_sample": True} if name in _HOW_TO_SAMPLE else {}  # who says how wants to
    return replace(params, **changes | {name: value})


def names() -> tuple[str, ...]:
    """What can be set."""
    return tuple(field.name for field in fields(SamplingParams) if field.name not in _FIXED)


def described(params: SamplingParams) -> dict[str, str]:
    """Name → value as it can be typed in."""
    return {name: _text(getattr(params, name)) for name in names()}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _value(name: str, text: str, kind: Any) -> Any:
    kinds = get_args(kind) or (kind,)
    lowered = text.lower()
    if (NoneType in kinds or kind == tuple[str, ...]) and lowered in _NONE:
        return None if NoneType in kinds else ()
    try:
        if kind == tuple[str, ...]:
            return (text.replace("\\n", "\n"),)
        if bool in kinds:
            return _BOOLEANS[lowered]
        return int(text) if int in kinds else float(text)
    except (ValueError, KeyError):
        expected = "true or false" if bool in kinds else "an integer" if int in kinds else "a number"
        more = " or none" if NoneType in kinds else ""
        raise RequestError(f"{name} is {text!r}.", remedy=f"Expected {expected}{more}.") from None
