"""`tiktoken.model`: the ranks of byte-level BPE, and how the one model family that publishes them alone cuts words.

In: the bytes of the file (a token in base64 and its rank, line by line), what a tokenizer_config.json says. Out: a
`tokenizers.Tokenizer` that gives the tokens of the tiktoken library. Must never know: requests, tensors.

Neither file says how text is cut into words: the code beside them does, which is never run. Kimi's is known by its
name. Special tokens stand behind the ranks; those without a name are reserved.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from amalgam.errors import CheckpointError, UnsupportedError, describe
from amalgam.text.gguf.metadata import bpe_backend
from amalgam.text.gguf.pretokenizers import PRE_TOKENIZERS
from amalgam.text.parts import byte_of_letter

FILE = "tiktoken.model"
MAX_BYTES = 32 * 2**20
_MAX_TOKEN_BYTES, _MAX_RANK_DIGITS = 512, 8
_MAX_MERGES = 2**22  # published files have a few for each token
_NUM_RESERVED = 256
_CLASSES = {"tokenization_kimi.TikTokenTokenizer": "kimi-k2"}  # `auto_map` → how it cuts words


def read_ranks(data: bytes, where: str) -> dict[bytes, int]:
    """Token → rank: every rank from 0 on once, every byte a token.

    Args:
        where: the file, for messages.

    Raises:
        CheckpointError: this is no such file.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        coded, _, rank = line.partition(b" ")
        try:
            token = binascii.a2b_base64(coded, strict_mode=True)
        except binascii.Error:
            token = b""
        if not 0 < len(token) <= _MAX_TOKEN_BYTES or not rank.isdigit() or len(rank) > _MAX_RANK_DIGITS:
            raise _damaged(where, f"line {number} is {describe(line)}", "Expected a token in base64 and its rank.")
        if token in ranks:
            raise _damaged(where, f"line {number} has {describe(token)} a second time")
        ranks[token] = int(rank)
    missing = next((bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise _damaged(where, f"it has no token for the byte {describe(missing)}")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _damaged(where, f"its {len(ranks)} ranks are not those from 0 to {len(ranks) - 1}")
    return ranks


def _damaged(where: str, what: str, remedy: str = "Copy it again from the published checkpoint.") -> CheckpointError:
    return CheckpointError(f"{where} holds no ranks of tokens: {what}.", remedy=remedy)


def build_backend(
    data: bytes, config: Mapping[str, Any], named: Mapping[int, tuple[str, Mapping[str, bool]]], where: str
) -> Any:
    """A `tokenizers.Tokenizer`.

    Args:
        config: tokenizer_config.json.
        named: special tokens that it names, text and flags by id.

    Raises:
        CheckpointError: see `read_ranks`; a special token has the id of another token.
        UnsupportedError: code makes this tokenizer, and it is not known what it does.
    """
    from tokenizers import AddedToken

    auto_map = config.get("auto_map")
    declared = auto_map.get("AutoTokenizer") if isinstance(auto_map, Mapping) else None
    name = declared[0] if isinstance(declared, list) and declared else declared
    if not isinstance(name, str) or name not in _CLASSES:
        raise UnsupportedError(
            f"{where} does not say how text is cut into words, and the class is {describe(name)}.",
            remedy=f"Add the published tokenizer.json. Without it: {', '.join(_CLASSES)}; code is not run.",
        )
    ranks = read_ranks(data, where)
    last = len(ranks) + _NUM_RESERVED - 1
    for token_id, (text, _) in named.items():
        if not len(ranks) <= token_id <= last:
            raise CheckpointError(
                f"tokenizer_config.json gives {describe(text)} the id {token_id}, beside the ranks in {where}.",
                remedy=f"Its special tokens have the ids from {len(ranks)} to {last}.",
            )
    letters = {byte: letter for letter, byte in byte_of_letter().items()}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(spelled[left], spelled[right]) for left, right in islice(_merges(ranks), _MAX_MERGES + 1)]
    if len(merges) > _MAX_MERGES:
        raise _damaged(where, f"its tokens are made of each other in more than {_MAX_MERGES} ways")
    # As tiktoken does it: a word that is a token is that token, whether merges lead there or not.
    pretokenizer = replace(PRE_TOKENIZERS[_CLASSES[name]], ignores_merges=True)
    backend = bpe_backend({spelled[token]: rank for token, rank in ranks.items()}, merges, pretokenizer)
    reserved = {"special": True, "normalized": False}
    behind = (named.get(i, (f"<|reserved_token_{i}|>", reserved)) for i in range(len(ranks), last + 1))
    backend.add_tokens([AddedToken(text, **flags) for text, flags in behind])
    return backend


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Any two tokens that are a token together merge, that of the least rank first."""
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                yield left, right
