"""Kimi's tokenizer, from its ranks: the tokens of the tiktoken library, and nothing of what damaged files say."""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from amalgam.errors import CheckpointError, UnsupportedError
from amalgam.text.tokenizer import Tokenizer
from tests.errors import raises
from tests.text.tokenizer_files import PROBES

# The expression of the published tokenization_kimi.py.
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NUM_RANKS = 700
NAMES = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 11: "<|tool_call_begin|>", 255: "[PAD]"}
TEMPLATE = "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}{{ tools | tojson if tools }}"


def ranks() -> dict[bytes, int]:
    """Byte pairs of a small corpus, the most frequent first; and a token that no merges lead to."""
    words = [[bytes([byte]) for byte in text.encode()] for text in [*PROBES, "aaaa aaa aaaaaaa aa", *PROBES]]
    found = {bytes([byte]): byte for byte in range(256)}
    while len(found) < NUM_RANKS - 1:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word) if b"".join(pair) not in found)
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        found[left + right] = len(found)
        words = [_merged(word, left, right) for word in words]
    found[b" unreachable"] = len(found)
    return found


def _merged(word: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    merged: list[bytes] = []
    for part in word:
        if merged and merged[-1] == left and part == right:
            merged[-1] = left + right
        else:
            merged.append(part)
    return merged


RANKS = ranks()
RESERVED = f"<|reserved_token_{len(RANKS) + 20}|>"
SPECIAL = {NAMES.get(index, f"<|reserved_token_{len(RANKS) + index}|>"): len(RANKS) + index for index in range(256)}


def lines(table: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in table.items())


def publish(folder: Path, data: bytes | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiktoken.model").write_bytes(lines(RANKS) if data is None else data)
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('this must never be run')")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(len(RANKS) + index): {"content": text, "special": index != 11, **flags} for index, text in NAMES.items()
    }
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_end|>", "<|im_user|>"],
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": None,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(publish(tmp_path_factory.mktemp("kimi")))


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens=SPECIAL)


def test_tokens_are_those_of_tiktoken(tokenizer: Tokenizer, reference: tiktoken.Encoding) -> None:
    random_words = random.Random(3)
    alphabet = "aab cdé明月 \n1'sT"
    texts = [*PROBES, " unreachable", "<|im_user|>hi<|im_end|>", RESERVED]
    texts += ["".join(random_words.choices(alphabet, k=40)) for _ in range(200)]
    for text in texts:
        ids = reference.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == ids, text
        assert b"".join(map(tokenizer.token_bytes, ids)) == reference.decode_bytes(ids)


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == len(RANKS) + 256
    assert tokenizer.eos_token_ids == {SPECIAL["[EOS]"]}
    assert SPECIAL["<|tool_call_begin|>"] not in tokenizer.special_tokens  # as the file has it
    assert tokenizer.special_tokens[SPECIAL[RESERVED]] == RESERVED


def test_tools_are_shown_with_their_keys_in_order(tokenizer: Tokenizer, reference: tiktoken.Encoding) -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": {"z": 1, "a": [{"c": 1, "b": 2}]}},
        }
    ]
    shown = f"<|im_user|>hi<|im_end|>{json.dumps(tools, sort_keys=True)}"
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.encode_chat(messages, tools=tools) == reference.encode(shown, allowed_special="all")


def _without(token: bytes) -> dict[bytes, int]:
    return {other: rank for other, rank in RANKS.items() if other != token}


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (lines(RANKS) + base64.b64encode(b"a") + b" 701\n", ("second time",)),
        (lines({**RANKS, b"two more": RANKS[b"a"]}), ("ranks",)),
        (lines({**RANKS, b"two more": 10**7}), ("ranks",)),
        (lines(_without(b"a")), ("b'a'",)),
        (b"YQ== 0\n!!!! 1\n", ("line 2",)),
        (b"YQ==\n", ("line 1",)),
        (b"YQ== -1\n", ("line 1",)),
        ("YQ== \N{ARABIC-INDIC DIGIT ONE}\n".encode(), ("line 1",)),
        (b"YQ== " + b"1" * 5000 + b"\n", ("line 1",)),
        (base64.b64encode(b"a" * 100_000) + b" 0\n", ("line 1",)),
        (b" 0\n", ("line 1",)),
        (b"", ("no token for the byte",)),
    ],
)
def test_damaged_ranks_are_refused(tmp_path: Path, data: bytes, values: tuple[str, ...]) -> None:
    publish(tmp_path, data)
    with raises(CheckpointError, *values):
        Tokenizer.load(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    publish(tmp_path)
    with (tmp_path / "tiktoken.model").open("r+b") as file:
        file.truncate(2**40)
    with raises(CheckpointError, "bytes"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("auto_map", [None, {}, {"AutoTokenizer": ["tokenization_hy.HYTokenizer", None]}])
def test_a_class_that_is_not_known_is_refused_by_name(tmp_path: Path, auto_map: Any) -> None:
    publish(tmp_path, auto_map=auto_map)
    with raises(UnsupportedError, "tokenization_kimi.TikTokenTokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("token_id", "text"), [(5, "<|x|>"), (10**6, "<|x|>"), (len(RANKS) + 3, "a")])
def test_special_tokens_stand_behind_the_ranks(tmp_path: Path, token_id: int, text: str) -> None:
    publish(tmp_path, added_tokens_decoder={str(token_id): {"content": text, "special": True}})
    with raises(CheckpointError, str(token_id)):
        Tokenizer.load(tmp_path)
