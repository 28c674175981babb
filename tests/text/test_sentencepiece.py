"""`tokenizer.model` gives the ids of the sentencepiece library itself (tests/data/sentencepiece_bpe.json)."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from amalgam.errors import AmalgamError, CheckpointError, UnsupportedError
from amalgam.text.tokenizer import Tokenizer
from tests.errors import raises

DATA = json.loads((Path(__file__).parents[1] / "data" / "sentencepiece_bpe.json").read_text())
TRAINER = {3: 2, 35: 1, 40: 0, 41: 1, 42: 2, 43: -1}  # BPE, byte fallback, ids of <unk>, <s>, </s> and no padding
NORMALIZER = {1: b"identity", 3: 1, 4: 0, 5: 1}  # a space before the text, none removed, ▁ for spaces
CONFIG = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def model(trainer: dict[int, Any] = TRAINER, normalizer: dict[int, Any] = NORMALIZER) -> bytes:
    pieces = zip(DATA["tokens"], DATA["scores"], DATA["types"], strict=True)
    parts = [
        field(1, field(1, t.encode()) + field(2, float(s)) + (field(3, k) if k != 1 else b"")) for t, s, k in pieces
    ]
    for number, fields in ((2, trainer), (3, normalizer)):
        parts.append(field(number, b"".join(field(key, value) for key, value in fields.items())))
    return b"".join(parts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestText:
    @pytest.mark.parametrize("legacy", [True, False, None])
    @pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
    def test_ids_and_text_are_those_of_sentencepiece(
        self, legacy: bool | None, tokenizer_class: str, folder: Path
    ) -> None:
        edit(folder / "tokenizer_config.json", legacy=legacy, tokenizer_class=tokenizer_class)
        found = Tokenizer.load(folder)
        for case in DATA["cases"]:
            if legacy is not False or not case["text"].startswith((" ", "▁")):  # to these the later rule adds no space
                assert found.encode(case["text"]) == [1, *case["ids"]]
            assert found.decode(case["ids"]) == case["decoded"]
        assert found.vocab_size == len(DATA["tokens"])
        assert found.eos_token_ids == {2}

    def test_after_a_special_token_a_space_is_put_by_the_older_rule_only(self, folder: Path) -> None:
        plain = Tokenizer.load(folder).encode("the")[1:]
        assert Tokenizer.load(folder).encode("</s>the")[1:] == [2, *plain]
        edit(folder / "tokenizer_config.json", legacy=False)
        found = Tokenizer.load(folder)
        assert found.encode("</s>the")[1:] != [2, *plain]
        assert found.decode(found.encode("</s>the")[2:]) == "the"

    @pytest.mark.parametrize(("adds", "around"), [(True, [1]), (False, []), (None, [1])])
    def test_what_stands_before(self, adds: bool | None, around: list[int], folder: Path) -> None:
        if adds is not None:
            edit(folder / "tokenizer_config.json", add_bos_token=adds)
        assert Tokenizer.load(folder).encode(DATA["cases"][0]["text"]) == [*around, *DATA["cases"][0]["ids"]]

    def test_added_tokens_and_a_template(self, folder: Path) -> None:
        (folder / "added_tokens.json").write_text(json.dumps({"<|turn|>": 900}))
        edit(folder / "tokenizer_config.json", chat_template="{{ bos_token }}{{ messages[0].content }}<|turn|>")
        found = Tokenizer.load(folder)
        [case, *_] = DATA["cases"]
        assert found.encode_chat([{"role": "user", "content": case["text"]}]) == [1, *case["ids"], 900]

    def test_without_a_config(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").unlink()
        assert Tokenizer.load(folder).encode(DATA["cases"][0]["text"]) == [1, *DATA["cases"][0]["ids"]]

    def test_without_a_space_before_the_text(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(model(normalizer=NORMALIZER | {3: 0}))
        found = Tokenizer.load(folder)
        assert found.decode(found.encode(" the")) == " the"
        assert "".join(map(found.token_text, found.encode("the")[1:])) == "the"


class TestRefusals:
    @pytest.mark.parametrize(
        ("trainer", "normalizer", "named"),
        [
            ({3: 1}, {}, "model_type"),
            ({3: 4}, {}, "model_type"),
            ({24: 1}, {}, "treat_whitespace_as_suffix"),
            ({}, {2: b"rules"}, "precompiled_charsmap"),
            ({}, {4: 1}, "remove_extra_whitespaces"),
            ({}, {5: 0}, "escape_whitespaces"),
        ],
    )
    def test_what_is_not_implemented(
        self, trainer: dict[int, Any], normalizer: dict[int, Any], named: str, folder: Path
    ) -> None:
        (folder / "tokenizer.model").write_bytes(model(TRAINER | trainer, NORMALIZER | normalizer))
        with raises(UnsupportedError, named):
            Tokenizer.load(folder)

    @pytest.mark.parametrize(
        "data", [b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff\xff\xff\xff\x7f", b"\x80" * 20, b"\x0a\x02\x08\x01"]
    )
    def test_what_is_no_model(self, data: bytes, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(data)
        with raises(CheckpointError, folder / "tokenizer.model", "tokenizer.json"):
            Tokenizer.load(folder)

    @pytest.mark.parametrize("seed", range(40))
    def test_damaged_models_are_our_errors_or_load(self, seed: int, folder: Path) -> None:
        rng = random.Random(seed)
        data = bytearray(model())
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (folder / "tokenizer.model").write_bytes(data[: rng.randint(len(data) // 2, len(data))])
        with contextlib.suppress(AmalgamError):
            Tokenizer.load(folder).encode("the")
