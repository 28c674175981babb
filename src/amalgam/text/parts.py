"""What a tokenizer consists of, wherever it was read from.

In: nothing. Out: the record that readers fill in and `tokenizer.Tokenizer` takes. Must never know: files, tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenizerParts:
    """The names are those of a tokenizer of transformers that is backed by the tokenizers library, which serves too.

    Attributes:
        backend_tokenizer: a `tokenizers.Tokenizer`.
        special_tokens_map: texts of special tokens by name, such as `bos_token`; chat templates refer to them.
        chat_template: its source, or the sources by name, of which the one named `default` is used.
    """

    backend_tokenizer: Any
    special_tokens_map: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | Mapping[str, str] | None = None
