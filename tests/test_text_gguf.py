"""Tokenizers from GGUF metadata, against those they were made from and against sentencepiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from amalgam.errors import AmalgamError, CheckpointError, UnsupportedError
from amalgam.text import Tokenizer
from amalgam.text_gguf import build_tokenizer
from tests.tokenizer_metadata import metadata_of

DEMO = Path(__file__).parents[1] / "models" / "demo"
SENTENCE_PIECE = json.loads((Path(__file__).parent / "data" / "sentencepiece_bpe.json").read_text())
TEXTS = (
    "It was the best of times, it was the worst; she said: 'I can't.'\n\n  Indented.",
    "明月几时有？把酒问青天。不知天上宫阙，今夕是何年。",
    "ok 😀👩‍👩‍👧‍👦 e\u0301 🇨🇭 done ",
    "def f(x: int) -> str:\n\treturn f'{x!r:>{10}}'  # naïve\n",
    "1234567 89.5 €3,14 ½ Ⅷ x²",
    "<|im_start|>user\nhi<|im_end|>",
    "We'LL see: DON'T HTTPServer camelCase ÉCOLE straße ǅ ʰa",
    "tabs\t\tand\r\nlines\n\n\n   end   ",
)


@pytest.fixture
def demo() -> dict[str, Any]:
    return metadata_of(DEMO)


@pytest.fixture
def pieces() -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SENTENCE_PIECE["tokens"],
        "tokenizer.ggml.scores": SENTENCE_PIECE["scores"],
        "tokenizer.ggml.token_type": SENTENCE_PIECE["types"],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def load(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.load(Path("model.gguf"), metadata)


class TestByteLevel:
    @pytest.mark.parametrize("text", TEXTS)
    def test_the_demo_tokenizer_comes_back(self, text: str, demo: dict[str, Any]) -> None:
        ours, published = load(demo), Tokenizer.load(DEMO)
        if "DON'T" not in text:  # the demo's expression knows the endings in lower case only
            assert ours.encode(text) == published.encode(text)
        assert ours.decode(published.encode(text)) == published.decode(published.encode(text))
        assert ours.vocab_size == published.vocab_size
        assert ours.eos_token_ids == published.eos_token_ids
        messages = [{"role": "user", "content": text}]
        if "DON'T" not in text:
            assert ours.encode_chat(messages) == published.encode_chat(messages)

    @pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "gpt-4o", "tekken"])
    @pytest.mark.parametrize("text", TEXTS)
    def test_words_are_those_of_transformers(self, pre: str, text: str, demo: dict[str, Any]) -> None:
        """transformers has its own reading of GGUF; it takes GPT-2's expression where it knows none."""
        from transformers.integrations.gguf import convert_gguf_tokenizer

        fields = {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre}
        tables = {name: demo[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type")}
        theirs, _ = convert_gguf_tokenizer("llama", {**fields, **tables})
        wrapped, _ = build_tokenizer({**demo, "tokenizer.ggml.pre": pre}, "model.gguf")
        ours: Backend = wrapped.backend_tokenizer
        assert [w for w, _ in ours.pre_tokenizer.pre_tokenize_str(text)] == [
            w for w, _ in theirs.pre_tokenizer.pre_tokenize_str(text)
        ]

    @pytest.mark.parametrize(
        ("pre", "text", "words"),
        [
            (
                "deepseek-v3",
                "12345 你好かな ok_then don't",
                ["123", "45", " ", "你好かな", " ok", "_then", " don", "'t"],
            ),
            ("glm4", "Don't 12345  x", ["Don", "'t", " ", "123", "45", " ", " x"]),
            ("olmo", "DON'T  12345", ["DON", "'", "T", " ", " 12345"]),
        ],
    )
    def test_words(self, pre: str, text: str, words: list[str], demo: dict[str, Any]) -> None:
        wrapped, _ = build_tokenizer({**demo, "tokenizer.ggml.pre": pre}, "model.gguf")
        spans = wrapped.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in spans] == words

    def test_a_word_that_is_a_token_needs_no_merges(self, demo: dict[str, Any]) -> None:
        """Llama 3 has such words; cut up by merges they would be other tokens than in training."""
        tokens = demo["tokenizer.ggml.tokens"]
        word = next(token for token in tokens if len(token) > 5 and token.isascii() and token.isalpha())
        merges = [merge for merge in demo["tokenizer.ggml.merges"] if merge.replace(" ", "") != word]
        changed = {**demo, "tokenizer.ggml.merges": merges}
        assert len(load(changed).encode(word)) > 1
        for pre in ("llama-bpe", "tekken"):
            settings = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
            assert load({**changed, **settings}).encode(word) == [tokens.index(word)]

    def test_what_stands_around_a_text(self, demo: dict[str, Any]) -> None:
        changed = {**demo, "tokenizer.ggml.bos_token_id": 1}
        plain = load(changed).encode("so")
        assert load({**changed, "tokenizer.ggml.add_bos_token": True}).encode("so") == [1, *plain]
        assert load({**changed, "tokenizer.ggml.add_eos_token": True}).encode("so") == [*plain, 0]
        assert load({**changed, "tokenizer.ggml.pre": "llama-bpe"}).encode("so")[0] == 1

    def test_user_defined_tokens_stay_whole_and_are_shown(self, demo: dict[str, Any]) -> None:
        types = list(demo["tokenizer.ggml.token_type"])
        types[1] = 4
        tokenizer = load({**demo, "tokenizer.ggml.token_type": types})
        assert tokenizer.encode("a<|im_start|>b")[1] == 1
        assert tokenizer.decode([1]) == "<|im_start|>"


class TestSentencePiece:
    @pytest.mark.parametrize("case", SENTENCE_PIECE["cases"], ids=lambda case: repr(case["text"][:20]))
    def test_ids_and_text_are_those_of_sentencepiece(self, case: dict[str, Any], pieces: dict[str, Any]) -> None:
        tokenizer = load(pieces)
        assert tokenizer.encode(case["text"]) == [1, *case["ids"]]
        assert tokenizer.decode(case["ids"]) == case["decoded"]

    def test_special_tokens_stay_whole(self, pieces: dict[str, Any]) -> None:
        token_ids = load(pieces).encode("a</s>b")
        assert token_ids.count(2) == 1

    def test_without_a_space_before_the_text(self, pieces: dict[str, Any]) -> None:
        tokenizer = load({**pieces, "tokenizer.ggml.add_space_prefix": False})
        tokens = [SENTENCE_PIECE["tokens"][i] for i in tokenizer.encode("the")[1:]]
        assert "".join(tokens) == "the"
        assert tokenizer.decode(tokenizer.encode(" the")) == " the"


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"model": "rwkv"}, UnsupportedError, "'rwkv'"),
            ({"model": 3}, UnsupportedError, "model = 3"),
            ({"pre": "default"}, UnsupportedError, "'default'.*Known: gpt-2"),
            ({"pre": None}, UnsupportedError, "pre = None"),
            ({"pre": ["qwen2"]}, UnsupportedError, "pre = "),
            ({"tokens": None}, CheckpointError, "tokens = None"),
            ({"tokens": "abc"}, CheckpointError, "tokens = 'abc'"),
            ({"tokens": ["a", "a"], "token_type": [1, 1]}, CheckpointError, "twice"),
            ({"tokens": ["a" * 2000], "token_type": [1]}, CheckpointError, "over 1024 characters"),
            ({"tokens": ["a"]}, CheckpointError, "token_type.*an array of 1 numbers"),
            ({"token_type": None}, CheckpointError, "token_type = None"),
            ({"merges": ["a"]}, CheckpointError, "merges = 'a'"),
            ({"merges": ["a b c"]}, CheckpointError, "merges = 'a b c'"),
            ({"merges": ["e zzzzz"]}, CheckpointError, "merges = 'e zzzzz'"),
            ({"eos_token_id": 99_999}, CheckpointError, "eos_token_id = 99999"),
            ({"eos_token_id": -1}, CheckpointError, "eos_token_id = -1"),
            ({"eos_token_id": "0"}, CheckpointError, "eos_token_id = '0'"),
            ({"bos_token_id": True}, CheckpointError, "bos_token_id = True"),
            ({"add_bos_token": 1}, CheckpointError, "add_bos_token = 1"),
        ],
    )
    def test_what_is_not_understood(
        self, changes: dict[str, Any], error: type[AmalgamError], message: str, demo: dict[str, Any]
    ) -> None:
        changed = demo | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        with pytest.raises(error, match=message):
            load(changed)

    def test_scores_of_another_vocabulary(self, pieces: dict[str, Any]) -> None:
        with pytest.raises(CheckpointError, match=r"scores.*an array of \d+ numbers"):
            load({**pieces, "tokenizer.ggml.scores": [0.0, 1.0]})

    def test_without_tables(self) -> None:
        with pytest.raises(CheckpointError, match="has no tokenizer"):
            load({})
