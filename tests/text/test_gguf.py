"""Tokenizers from GGUF metadata, against those they were made from and against sentencepiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from amalgam.errors import AmalgamError, CheckpointError, UnsupportedError
from amalgam.text.gguf.metadata import build_tokenizer
from amalgam.text.gguf.pretokenizers import PRE_TOKENIZERS
from amalgam.text.tokenizer import Tokenizer
from tests import gguf_probes
from tests.cases import each_case
from tests.errors import raises
from tests.text.tokenizer_metadata import metadata_of

DEMO = Path(__file__).parents[2] / "models" / "demo"
LLAMA_CPP = json.loads(gguf_probes.DATA.read_text(encoding="utf-8"))
_MARKS = "std::regex knows no case of letters and no marks: an accent of its own ends a word"
_CASE = "words end where case changes"
_COHERE = {1: _CASE, 3: "a number before 年 does not end a word"}
_WIDE_SPACES = dict.fromkeys((6, 11), "wide spaces lie in the range from U+0800 to 一")
# Where the published tokenizer.json cuts otherwise than llama.cpp: name → number of the text → why.
PUBLISHED = {
    **{pre: {2: _MARKS, 4: _MARKS} for pre in ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "tekken")},
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _COHERE),
    **dict.fromkeys(("deepseek-llm", "deepseek-coder"), _WIDE_SPACES),
    "kimi-k2": {1: _CASE, 2: _MARKS, 4: _MARKS},
    "youtu": {1: _CASE},
    "superbpe": {4: "Arabic digits are digits"},
}
SENTENCE_PIECE = json.loads((Path(__file__).parents[1] / "data" / "sentencepiece_bpe.json").read_text())
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


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    return metadata_of(DEMO, "stablelm2")  # as the demo's, without Unicode's form NFC


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


class TestAsLlamaCpp:
    @pytest.mark.parametrize("pre", PRE_TOKENIZERS)
    def test_token_ids(self, pre: str) -> None:
        """The merges of this vocabulary show every border between words."""
        wrapped, _ = build_tokenizer(gguf_probes.metadata(pre), "model.gguf")
        different = [
            number
            for number, text in enumerate(gguf_probes.texts(pre))
            if wrapped.backend_tokenizer.encode(text).ids != LLAMA_CPP["rows"][LLAMA_CPP["names"][pre][number]]
        ]
        assert different == list(PUBLISHED.get(pre, {}))

    @pytest.mark.parametrize("case", gguf_probes.ENDS)
    def test_ends_of_an_answer(self, case: str) -> None:
        _, ends = build_tokenizer(gguf_probes.metadata_of_ends(case), "model.gguf")
        assert sorted(ends) == LLAMA_CPP["ends"][case]

    def test_every_name_of_llama_cpp_is_known(self) -> None:
        """All but `default`, which is no model's, and `whitespace`, which an encoder has."""
        assert set(PRE_TOKENIZERS) == set(LLAMA_CPP["names"])
        assert len(PRE_TOKENIZERS) == 89


@pytest.mark.parametrize("text", ["</s>", "<EOT>", "[EOS]", "<eos>", "[PAD]", "<REPO>"])
def test_a_word_that_looks_like_an_end_is_none(text: str) -> None:
    """Unlike llama.cpp, to which any token of this text is an end: it can stand in an answer, in HTML for one."""
    metadata = gguf_probes.metadata_of_ends(text) | {"tokenizer.ggml.eos_token_id": 1}
    types = [1, 3, *metadata["tokenizer.ggml.token_type"][2:]]
    assert build_tokenizer(metadata | {"tokenizer.ggml.token_type": types}, "model.gguf")[1] == {1}


class TestByteLevel:
    def test_the_demo_tokenizer_comes_back(self, demo: dict[str, Any]) -> None:
        ours, published = load(demo), Tokenizer.load(DEMO)
        assert ours.vocab_size == published.vocab_size
        assert ours.eos_token_ids == published.eos_token_ids
        with each_case() as case:
            for text in TEXTS:
                messages = [{"role": "user", "content": text}]
                with case(repr(text)):
                    assert ours.decode(published.encode(text)) == published.decode(published.encode(text))
                    if "DON'T" in text:  # the demo's expression knows the endings in lower case only
                        continue
                    assert ours.encode(text) == published.encode(text)
                    if "<|" not in text:  # nor is <|im_start|>, which is text here, one word for others
                        assert ours.encode_chat(messages) == published.encode_chat(messages)

    @pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "gpt-4o", "tekken"])
    def test_words_are_those_of_transformers(self, pre: str, demo: dict[str, Any]) -> None:
        """transformers has its own reading of GGUF; it takes GPT-2's expression where it knows none."""
        from transformers.integrations.gguf import convert_gguf_tokenizer

        fields = {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre}
        tables = {name: demo[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type")}
        theirs, _ = convert_gguf_tokenizer("llama", {**fields, **tables})
        wrapped, _ = build_tokenizer({**demo, "tokenizer.ggml.pre": pre}, "model.gguf")
        ours: Backend = wrapped.backend_tokenizer
        with each_case() as case:
            for text in TEXTS:
                with case(repr(text)):
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
            (
                "gpt-4o",
                "HTTPServer \u00c9COLE Cafe\u0301 हिन्दी",
                ["HTTPServer", " \u00c9COLE", " Cafe\u0301", " हिन्दी"],
            ),
            ("tekken", "camelCase 123 We'll", ["camel", "Case", " ", "1", "2", "3", " We", "'ll"]),
            ("kimi-k2", "camelCase明月ok 1234", ["camel", "Case", "明月", "ok", " ", "123", "4"]),
            ("tiny_aya", "1234 12345a 2024年", ["1", "234", " ", "123", "45", "a", " ", "202", "4", "年"]),
            ("youtu", "camelCase 12年", ["camel", "Case", " ", "1", "2", "年"]),
            ("deepseek-coder", "a\u3000b c", ["a", "\u3000", "b", " c"]),
            ("superbpe", "12345 ١٢٣٤", ["12", "345", " ", "١", "٢٣٤"]),
            ("smollm", "in 1987, 42", ["in", " ", "1", "9", "8", "7", ",", " ", "4", "2"]),
            ("afmoe", "1234567 12", ["1", "234", "567", " ", "12"]),
            ("laguna", "a \n b", ["a", " ", "\n", " b"]),
            ("bloom", "one, two (three)", ["one", ",", " two", " (", "three", ")"]),
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

    @pytest.mark.parametrize("pre", ["qwen2", "qwen35", "deepseek-r1-qwen", "olmo", "command-r"])
    def test_unicode_is_composed_where_the_published_file_does_so(self, pre: str, demo: dict[str, Any]) -> None:
        composes = load({**demo, "tokenizer.ggml.pre": pre})
        assert (
            composes.encode("e\u0301 A\u030a") == composes.encode("\u00e9 \u00c5") == load(demo).encode("\u00e9 \u00c5")
        )
        assert load(demo).encode("e\u0301") != load(demo).encode("\u00e9")

    def test_tokens_without_text(self, demo: dict[str, Any]) -> None:
        tokens, types = list(demo["tokenizer.ggml.tokens"]), list(demo["tokenizer.ggml.token_type"])
        changed = {**demo, "tokenizer.ggml.tokens": [*tokens, "", ""], "tokenizer.ggml.token_type": [*types, 5, 5]}
        tokenizer = load(changed)
        assert tokenizer.vocab_size == len(tokens) + 2
        assert tokenizer.encode("so") == load(demo).encode("so")

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
        token_ids = load(pieces).encode("a</s>b<unk>")
        assert token_ids.count(2) == 1
        assert token_ids[-1] == 0

    def test_ids_that_no_key_names_are_those_of_sentencepiece(self, pieces: dict[str, Any]) -> None:
        unnamed = {key: value for key, value in pieces.items() if not key.endswith("_token_id")}
        assert load(unnamed).encode("the") == load(pieces).encode("the")
        assert load(unnamed).eos_token_ids == {2}

    @pytest.mark.parametrize("case", SENTENCE_PIECE["cases"][:6], ids=lambda case: repr(case["text"][:20]))
    def test_one_score_for_all(self, case: dict[str, Any], pieces: dict[str, Any]) -> None:
        """Some converters write none; the pieces' numbers are in the order of their scores."""
        alike = [-1000.0] * len(pieces["tokenizer.ggml.scores"])
        assert load({**pieces, "tokenizer.ggml.scores": alike}).encode(case["text"]) == [1, *case["ids"]]

    def test_without_a_space_before_the_text(self, pieces: dict[str, Any]) -> None:
        tokenizer = load({**pieces, "tokenizer.ggml.add_space_prefix": False})
        tokens = [SENTENCE_PIECE["tokens"][i] for i in tokenizer.encode("the")[1:]]
        assert "".join(tokens) == "the"
        assert tokenizer.decode(tokenizer.encode(" the")) == " the"


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "error", "named"),
        [
            ({"model": "rwkv"}, UnsupportedError, "'rwkv'"),
            ({"model": 3}, UnsupportedError, "model = 3"),
            ({"pre": "default"}, UnsupportedError, "'default'"),
            ({"pre": "whitespace"}, UnsupportedError, "'whitespace'"),
            ({"new_trick": 7}, UnsupportedError, "tokenizer.ggml.new_trick = 7"),
            ({"normalizer.lowercase": True}, UnsupportedError, "normalizer.lowercase = True"),
            ({"remove_extra_whitespaces": True}, UnsupportedError, "remove_extra_whitespaces = True"),
            ({"suppress_tokens": [3]}, UnsupportedError, "suppress_tokens"),
            ({"precompiled_charsmap": [1, 2]}, UnsupportedError, "precompiled_charsmap"),
            ({"eom_token_id": 99_999}, CheckpointError, "eom_token_id = 99999"),
            ({"merges": ["ab"]}, CheckpointError, "merges = 'ab'"),
            ({"pre": None}, UnsupportedError, "pre = None"),
            ({"pre": ["qwen2"]}, UnsupportedError, "tokenizer.ggml.pre"),
            ({"tokens": None}, CheckpointError, "no tokenizer.ggml.tokens"),
            ({"tokens": "abc"}, CheckpointError, "tokens = 'abc'"),
            ({"tokens": ["a", "a"], "token_type": [1, 1]}, CheckpointError, "tokenizer.ggml.tokens"),
            ({"tokens": ["a" * 2000], "token_type": [1]}, CheckpointError, "1024"),
            ({"tokens": ["a"]}, CheckpointError, "tokenizer.ggml.token_type"),
            ({"token_type": None}, CheckpointError, "no tokenizer.ggml.token_type"),
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
        self, changes: dict[str, Any], error: type[AmalgamError], named: str, demo: dict[str, Any]
    ) -> None:
        changed = demo | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        with raises(error, named):
            load(changed)

    def test_scores_of_another_vocabulary(self, pieces: dict[str, Any]) -> None:
        with raises(CheckpointError, "tokenizer.ggml.scores"):
            load({**pieces, "tokenizer.ggml.scores": [0.0, 1.0]})

    def test_without_tables(self) -> None:
        with raises(CheckpointError, "model.gguf", "tokenizer.json"):
            load({})
