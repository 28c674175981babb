"""What a tokenizer consists of, wherever it was read from.

In: nothing. Out: the record that readers fill in and `tokenizer.Tokenizer` takes. Must never know: files, tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any


@dataclass(frozen=True)
class TokenizerParts:
    """The names are those of a tokenizer of transformers that is backed by the tokenizers library, which serves too.

    Attributes:
        backend_tokenizer: a `tokenizers.Tokenizer`.
        special_tokens_map: texts of special tokens by name, such as `bos_token`; chat templates refer to them.
        chat_template: its source, or the sources by name, of which the one named `default` is used.
        sorts_tools: templates are shown the keys of tools in order.
    """

    backend_tokenizer: Any
    special_tokens_map: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | Mapping[str, str] | None = None
    sorts_tools: bool = False


@cache
def byte_of_letter() -> dict[str, int]:
    """How byte-level BPE spells bytes: printable Latin-1 as itself, the others in order from U+0100 (as GPT-2 did)."""
    as_themselves = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in as_themselves]
    return {chr(byte): byte for byte in as_themselves} | {chr(256 + index): byte for index, byte in enumerate(others)}
