"""Prompts of `/v1/completions` and `/v1/embeddings`: one text, several, token ids, several lists of them.

In: JSON of any kind. Out: a list of prompts. Must never know: chats, sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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

MAX_INLINE_IDS = 4096  # that the event loop checks itself: what a thread costs is more than it saves


@dataclass(frozen=True)
class PromptLimit:
    """How many prompts a request may have, and by which setting; empty: by none."""

    num_prompts: int
    setting: str = ""


@dataclass(frozen=True)
class EncodedPrompts:
    """The token ids of each prompt, and the text that they were made of; None: they came as token ids."""

    token_ids: list[TokenIds]
    texts: list[str | None]


async def encode_prompts(
    service: Service,
    name: str,
    value: Any,
    limit: PromptLimit,
    *,
    add_special_tokens: bool = True,
    is_answered: bool = True,
    num_new_tokens: int = 1,
) -> EncodedPrompts:
    """
    Args:
        name: of the field.
        is_answered: see `Service.encode`.
        add_special_tokens: those that the tokenizer puts around a text; token ids are taken as they are.
        num_new_tokens: that there must be room for behind a prompt: 0 or 1.

    Raises:
        RequestError: it is none of the four kinds, or has too many prompts.
        OverloadedError, PromptTooLongError, ContentFilteredError: see `Service.encode`.
    """
    prompts = _as_prompts(name, value, limit)
    max_tokens = service.deployment.engine.max_prompt_tokens + 1 - num_new_tokens
    await _check_token_ids(service, name, prompts, max_tokens)
    texts = [TextPrompt(prompt, add_special_tokens) for prompt in prompts if isinstance(prompt, str)]
    # Of none, too: it tells of overload.
    encoded = iter(await service.encode_texts(texts, name, max_tokens, is_answered=is_answered))
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


def _as_prompts(name: str, value: Any, limit: PromptLimit) -> Sequence[str | TokenIds]:
    """Texts, or lists of what should be token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _wrong(name, value)
    if type(value[0]) is int:
        return [value]
    if len(value) > limit.num_prompts:
        setting = f" ({limit.setting})" if limit.setting else ""
        raise RequestError(
            f"{name} has {len(value)} entries.", remedy=f"Allowed: at most {limit.num_prompts}{setting}.", param=name
        )
    if all(isinstance(item, str) for item in value):
        return value
    for index, item in enumerate(value):
        if not isinstance(item, list) or not item:
            raise _wrong(f"{name}[{index}]", item)
    return value


async def _check_token_ids(service: Service, name: str, prompts: Sequence[str | TokenIds], max_tokens: int) -> None:
    """Many of them in turns, as texts are encoded: a body of megabytes takes long.

    Raises:
        PromptTooLongError, RequestError: see `encode_prompts`.
    """
    vocab_size = service.deployment.tokenizer.vocab_size
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        place = name if len(prompts) == 1 else f"{name}[{index}]"
        if len(prompt) > max_tokens:  # before anything that takes time in its length
            raise PromptTooLongError(
                f"{place} has {len(prompt)} tokens.", remedy=f"Allowed: at most {max_tokens}.", param=name
            )
        check = partial(_check_ids, name, place, prompt, vocab_size)
        if len(prompts) == 1 and len(prompt) <= MAX_INLINE_IDS:
            check()
        else:
            await service.encoder.turn(check)


def _check_ids(name: str, place: str, token_ids: TokenIds, vocab_size: int) -> None:
    for index, token_id in enumerate(token_ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{place}[{index}] is {describe(token_id)}.",
                remedy=f"Allowed: a token id from 0 to {vocab_size - 1}.",
                param=name,
            )


def _wrong(name: str, value: Any) -> RequestError:
    shown = describe(value) if not isinstance(value, list) else f"a list of {len(value)} items"
    return RequestError(
        f"{name} is {shown}.",
        remedy="Give a text, a list of texts, a list of token ids or a list of such lists, none of them empty.",
        param=name.partition("[")[0],
    )
