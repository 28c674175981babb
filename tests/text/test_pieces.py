"""Long texts piece by piece: the ids of the whole text, and never a refusal of what would fit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from amalgam.errors import PromptTooLongError
from amalgam.text import pieces as text_pieces
from amalgam.text import tokenizer as text
from amalgam.text.pieces import LengthBound, token_ids_by_piece
from tests.cases import each_case
from tests.errors import raises

DEMO = Path(__file__).parents[2] / "models" / "demo"
PIECE, OVERLAP = 2048, 512


def byte_level(normalizer: Any = None, pattern: str | None = None, **added: Any) -> Tokenizer:
    """Byte-level BPE with merges of letters, spaces and digits."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ġ", "a"), ("1", "2"), ("a", "a"), ("aa", "aa")]
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=not pattern)])
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken("<|a_long_special_token|>", **added)])
    return backend


def sentence_piece(**model: Any) -> Tokenizer:
    """BPE with byte fallback whose spaces are letters, without a pre-tokenizer: the whole text is one word."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcde", "ab", "▁a", "abc", "▁▁", "aa", "aaaa"]
    merges = [("a", "b"), ("▁", "a"), ("ab", "c"), ("▁", "▁"), ("a", "a"), ("aa", "aa")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, **model}
    backend = Tokenizer(models.BPE(vocabulary, merges, **options))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


LLAMA3 = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "demo": lambda: Tokenizer.from_file(str(DEMO / "tokenizer.json")),
    "gpt2": byte_level,
    "llama3": lambda: byte_level(pattern=LLAMA3),
    "nfc": lambda: byte_level(normalizers.NFC(), LLAMA3),
    "nfkc": lambda: byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "strips": lambda: byte_level(rstrip=True, lstrip=True),
    "sentencepiece": sentence_piece,
    "unknown": lambda: sentence_piece(byte_fallback=False),
}
CHARS = {
    "letters": "abcde",
    "one letter": "a",
    "spaces": " ",
    "digits": "0123456789",
    "wide": "你好世界人工智能",
    "astral": "😀👩\u200d🏽𝐀",
    "composed": "e\u0301a\u030a\u1100\u1161\u11a8Å",
    "any": "ab c12\n\n  \t,.é你😀\u0301''s",
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pieces, "PIECE_CHARS", PIECE)
    monkeypatch.setattr(text_pieces, "OVERLAP_CHARS", OVERLAP)
    monkeypatch.setattr(text, "PIECE_CHARS", PIECE)


def ids_of(backend: Tokenizer, prompt: str) -> list[int]:
    result: list[int] = backend.encode(prompt, add_special_tokens=False).ids
    return result


@pytest.mark.parametrize("name", BACKENDS)
def test_pieces_are_those_of_the_whole_text(name: str) -> None:
    backend = BACKENDS[name]()
    with each_case() as case:
        for chars in CHARS:
            rng = random.Random(name + chars)
            prompt = "".join(rng.choices(CHARS[chars], k=5 * PIECE + rng.randrange(PIECE)))
            with case(chars):
                portions = list(token_ids_by_piece(backend, prompt))
                assert [token_id for portion in portions for token_id in portion] == ids_of(backend, prompt)
                if name not in ("unknown", "strips"):
                    assert max(map(len, portions)) < 10 * PIECE  # bounded, but for what has no end


@pytest.mark.parametrize("name", BACKENDS)
def test_special_tokens_among_the_text(name: str) -> None:
    backend, rng = BACKENDS[name](), random.Random(name)
    parts = ["<|a_long_special_token|>", "<|a_long", "ab ", "   ", "12", "\n", "你"]
    prompt = "".join(rng.choices(parts, k=3000))
    portions = token_ids_by_piece(backend, prompt)
    assert [token_id for portion in portions for token_id in portion] == ids_of(backend, prompt)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_bound_is_one(name: str) -> None:
    backend = BACKENDS[name]()
    bound = LengthBound(backend)
    with each_case() as case:
        for chars in (*CHARS, "special"):
            rng = random.Random(chars + name)
            words = ["<|a_long_special_token|>", " " * 50] if chars == "special" else list(CHARS[chars])
            for length in (0, 1, 7, 3000):
                prompt = "".join(rng.choices(words, k=length))
                with case(chars, length):
                    assert bound.min_tokens(prompt) <= len(ids_of(backend, prompt))


@pytest.mark.parametrize("name", ["demo", "gpt2", "llama3", "nfc", "sentencepiece"])
def test_the_bound_tells_something(name: str) -> None:
    assert LengthBound(BACKENDS[name]()).min_tokens("x" * 7_000_000) > 50_000


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Replace("a", "")},
        {"normalizer": normalizers.Replace(Regex(" +"), " ")},
        {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])},
        {"normalizer": normalizers.BertNormalizer()},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel()])},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"model": models.WordLevel({"<unk>": 0}, "<unk>")},
        {"model": models.WordPiece({"[UNK]": 0})},
        {"model": models.Unigram([("<unk>", 0.0)], 0)},
        {"model": models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)},
    ],
    ids=repr,
)
def test_where_text_is_dropped_nothing_is_told(part: dict[str, Any]) -> None:
    backend = byte_level()
    for name, value in part.items():
        setattr(backend, name, value)
    assert LengthBound(backend).min_tokens("a" * 10**6) == 0


class Wrapped:
    """As much of a tokenizer of transformers as is needed."""

    chat_template = None
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend


def tokenizer(backend: Tokenizer) -> text.Tokenizer:
    return text.Tokenizer(Wrapped(backend), frozenset())  # type: ignore[arg-type]


@pytest.mark.parametrize("single", ["$A", "<|a_long_special_token|> $A", "$A <|a_long_special_token|>"])
def test_the_tokens_around_a_long_text(single: str) -> None:
    backend = byte_level(pattern=LLAMA3)
    token_id = backend.token_to_id("<|a_long_special_token|>")
    backend.post_processor = processors.TemplateProcessing(
        single, special_tokens=[("<|a_long_special_token|>", token_id)]
    )
    backend.decoder = decoders.ByteLevel()
    prompt = "ab c 12\n" * PIECE
    assert tokenizer(backend).encode(prompt) == backend.encode(prompt).ids


def test_a_prompt_that_cannot_fit_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    long = tokenizer(byte_level())
    monkeypatch.setattr(text, "token_ids_by_piece", lambda *_: pytest.fail("tokenized"))
    with raises(PromptTooLongError, 7_000_000, 1000):
        long.encode("ab" * 3_500_000, max_tokens=1000)


def test_what_the_bound_lets_pass_ends_with_the_piece_that_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    long, num_chars = tokenizer(byte_level()), 0
    begun = text_pieces.Piece.__init__

    def count(self: Any, backend: Any, prompt: str, start: int, length: int, **options: Any) -> None:
        nonlocal num_chars
        num_chars += length
        begun(self, backend, prompt, start, length, **options)

    monkeypatch.setattr(text_pieces.Piece, "__init__", count)
    with raises(PromptTooLongError, 15_000):
        long.encode("x, " * (10 * PIECE), max_tokens=15_000)
    assert num_chars < 20 * PIECE


@pytest.mark.parametrize("margin", [0, 1])
def test_the_limit_itself_fits(margin: int) -> None:
    long, prompt = tokenizer(byte_level()), "x, " * (2 * PIECE)
    num_tokens = len(long.encode(prompt))
    if margin:
        with pytest.raises(PromptTooLongError):
            long.encode(prompt, max_tokens=num_tokens - margin)
    else:
        assert len(long.encode(prompt, max_tokens=num_tokens)) == num_tokens
