"""Tokens in answers: how they are spelt, their log-probabilities, their routed experts; the two legacy and chat shapes.

In: token ids and `TokenLogprobs`. Out: JSON. Must never know: requests, text that is shown.
"""

from __future__ import annotations

import codecs
import io
from base64 import b64encode
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from amalgam.engine.request import TokenLogprobs
from amalgam.server.interface import Tokenizer
from amalgam.text.tokenizer import UNDECODABLE

if TYPE_CHECKING:
    from amalgam.models.routing import RoutingTrace


class TokenNames:
    """How the tokens of one answer are spelt; a token that is part of a character by its bytes.

    Args:
        as_ids: spell them `token_id:7`.
    """

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, str] = {}

    def bytes_of(self, token_id: int) -> bytes:
        if (found := self._bytes.get(token_id)) is None:
            found = self._bytes[token_id] = self._tokenizer.token_bytes(token_id)
        return found

    def __getitem__(self, token_id: int) -> str:
        if (name := self._names.get(token_id)) is None:
            name = self._names[token_id] = f"token_id:{token_id}" if self._as_ids else self._spell(token_id)
        return name

    def _spell(self, token_id: int) -> str:
        text = self._tokenizer.token_text(token_id)
        if UNDECODABLE not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes_of(token_id))

    def has_text(self, token_id: int) -> bool:
        return token_id not in self._special_ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.special_tokens)


class LegacyLogprobs:
    """`logprobs` of `/v1/completions`, of one choice as its tokens come.

    Args:
        num_top: how many of the likeliest tokens are shown; the one that was taken is always among them.
    """

    def __init__(self, names: TokenNames, num_top: int) -> None:
        self._names = names
        self._num_top = num_top
        self._offset = 0  # of the next token, in characters of the choice's text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The shape of some more tokens; None stands for a token of which nothing is known, the first of a prompt."""
        offsets, top = [], []
        for token_id, entry in zip(token_ids, entries, strict=True):
            offsets.append(self._offset)
            if self._names.has_text(token_id):
                self._offset += len(self._decoder.decode(self._names.bytes_of(token_id)))
            top.append(None if entry is None else self._top(token_id, entry))
        return {
            "tokens": [self._names[token_id] for token_id in token_ids],
            "token_logprobs": [None if entry is None else entry.chosen for entry in entries],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        top = {self._names[other]: logprob for other, logprob in entry.top[: self._num_top]}
        return top if self._names[token_id] in top else {**top, self._names[token_id]: entry.chosen}


def chat_logprobs(
    names: TokenNames, token_ids: Sequence[int], entries: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, Any]]:
    """`logprobs.content` of `/v1/chat/completions`: an entry for each token, reasoning and marks of calls included."""
    return [
        {
            **_chat_entry(names, token_id, entry.chosen),
            "top_logprobs": [_chat_entry(names, other, logprob) for other, logprob in entry.top[:num_top]],
        }
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]


def _chat_entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": names[token_id], "logprob": logprob, "bytes": list(names.bytes_of(token_id))}


def prompt_logprobs(
    names: TokenNames, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per token an object by token id. The rank of one that is not among the top is null."""
    shapes: list[dict[str, Any] | None] = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        if entry is None:
            shapes.append(None)
            continue
        shape = {
            str(other): {"logprob": logprob, "rank": rank, "decoded_token": names[other]}
            for rank, (other, logprob) in enumerate(entry.top[:num_top], 1)
        }
        own = {"logprob": entry.chosen, "rank": None, "decoded_token": names[token_id]}
        shapes.append({str(token_id): shape.pop(str(token_id), own), **shape})
    return shapes


def routed_experts(trace: RoutingTrace) -> str:
    """`[tokens - 1, layers, top_k]` as a .npy file in base64: the experts of each token of prompt and answer but the
    last, the heaviest first.
    """
    import numpy as np

    file = io.BytesIO()
    np.save(file, trace.expert_ids, allow_pickle=False)
    return b64encode(file.getvalue()).decode()
