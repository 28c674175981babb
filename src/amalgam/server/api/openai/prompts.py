"""Prompts of `/v1/completions` and `/v1/embeddings`: one text, several, token ids, several lists of them.

In: JSON of any kind. Out: a list of prompts. Must never know: chats, sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from amalgam.errors import PromptTooLongError, RequestError, describe
from amalgam.server.encoding import TextPrompt
from amalgam.server.service import Service

Prompts = Annotated[
    Any,
    Field(...),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                },
            ]
        }
    ),
]

TokenIds = list[int]


@dataclass(frozen=True)
class EncodedPrompts:
    """The token ids of each prompt, and the text that they were made of; None: they came as token ids."""

    token_ids: list[TokenIds]
    texts: list[str | None]


async def encode_prompts(
    service: Service,
    name: str,
    value: Any,
    max_prompts: int,
    *,
    add_special_tokens: bool = True,
    is_answered: bool = True,
) -> EncodedPrompts:
    """
    Args:
        name: of the field.
        is_answered: see `Service.encode`.
        add_special_tokens: those that the tokenizer puts around a text; token ids are taken as they are.

    Raises:
        RequestError: it is none of the four kinds, or has too many prompts.
        OverloadedError, PromptTooLongError, ContentFilteredError: see `Service.encode`.
    """
    prompts = _as_prompts(service, name, value, max_prompts)
    texts = [TextPrompt(prompt, add_special_tokens) for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await service.encode_texts(texts, name, is_answered=is_answered))  # of none, tells of overload too
    tokenizer, filters = service.deployment.tokenizer, service.filters
    token_ids: list[TokenIds] = []
    shown: list[str | None] = []
    for prompt in prompts:
        ids: TokenIds
        text: str | None
        if isinstance(prompt, str):
            ids, text = next(encoded)
        else:
            ids, text = prompt, None
            if filters is not None:
                ids = await filters.token_ids(tokenizer, prompt, name, is_answered=is_answered)
        token_ids.append(ids)
        shown.append(text)
    return EncodedPrompts(token_ids, shown)


def _as_prompts(service: Service, name: str, value: Any, max_prompts: int) -> Sequence[str | TokenIds]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _wrong(name, value)
    if type(value[0]) is int:
        return [_token_ids(service, name, value)]
    if len(value) > max_prompts:
        raise RequestError(
            f"{name} has {len(value)} entries.",
            remedy=f"Allowed: at most server.max_batch_prompts, {max_prompts}.",
            param=name,
        )
    if all(isinstance(item, str) for item in value):
        return value
    return [_token_ids(service, f"{name}[{index}]", item) for index, item in enumerate(value)]


def _token_ids(service: Service, name: str, value: Any) -> TokenIds:
    if not isinstance(value, list) or not value:
        raise _wrong(name, value)
    deployment = service.deployment
    if len(value) > deployment.engine.max_prompt_tokens:  # before anything that takes time in its length
        raise PromptTooLongError(
            f"{name} has {len(value)} tokens.",
            remedy=f"Allowed: at most {deployment.engine.max_prompt_tokens}, so that one more fits.",
            param=name.partition("[")[0],
        )
    vocab_size = deployment.tokenizer.vocab_size
    for index, token_id in enumerate(value):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name}[{index}] is {describe(token_id)}.",
                remedy=f"Allowed: a token id from 0 to {vocab_size - 1}.",
                param=name,
            )
    return value


def _wrong(name: str, value: Any) -> RequestError:
    shown = describe(value) if not isinstance(value, list) else f"a list of {len(value)} items"
    return RequestError(
        f"{name} is {shown}.",
        remedy="Give a text, a list of texts, a list of token ids or a list of such lists, none of them empty.",
        param=name.partition("[")[0],
    )
