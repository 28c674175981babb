"""A tokenizer → the keys `tokenizer.*` of a GGUF file: what `metadata` builds one of, written.

In: a tokenizer that runs on the tokenizers library. Out: metadata. Must never know: files, tensors.

How text is cut into words GGUF says by a name that llama.cpp knows. It is found by what it does: the names whose
expressions are those of the tokenizer come first, and the first one that cuts some texts in many scripts into the same
tokens is taken; if none does, the one that differs in the fewest of them, and how many these are is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from amalgam.errors import AmalgamError, UnsupportedError, describe
from amalgam.text.gguf.metadata import MODEL_KEY, build_tokenizer
from amalgam.text.gguf.pretokenizers import PRE_TOKENIZERS
from amalgam.text.parts import TokenizerParts

NO_TOKENIZER: Mapping[str, Any] = {MODEL_KEY: "none"}
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Of names for one and the same cut, those that converters write.
_USUAL = ("llama-bpe", "qwen2", "gpt-2", "deepseek-v3", "gpt-4o", "smollm", "tekken", "olmo", "qwen35", "glm4", "lfm2")
# Where cuts differ: case, digits, marks, scripts, spaces, line ends, and text that is not in Unicode's form NFC.
_PROBES = (
    "It's 1234567 I'LL we'Re DON'T don\u2019t\n'Tis\n'twas\n\n\n  x = [1, 22, 333];\r\n\tif (a_b!=c):  # done.\n",
    "HTTPServer camelCase iPhone15 na\u00efve \u00c9COLE stra\u00dfe Cafe\u0301 A\u030angstro\u0308m \u00bd x\u00b2",
    "明月几时有？2024年12月31日，共1,234,567元。こんにちは、カタカナ。한국어 텍스트입니다!",
    "Привет, мир! Γειά σου שלום עולם مرحبا ٢٣٤ हिन्दी में लिखा।  ไทย ភាសា",
    "   three spaces\t\ttabs \t mixed \n \n  end   \u00a0nbsp\u3000\u2003em   ",
    "a/b//c\\d http://www.example.com/path?q=1&r=2#frag ...!!!???---/*\n*/ //\n\n// x\r\n\r\n",
    "1 12 123 1234 12345 0x1F 3.14159 1e10 v2.0.1 99bottles 👍🏽 ≠ €3,14 $5.00 50% a+b<c>=d^2~|`x`|",
    "_under_score_ __init__ 'quoted' \"double\" (paren) [brack] {brace} <tag/> #hash !bang ,comma",
)


@dataclass(frozen=True)
class TokenizerKeys:
    """A tokenizer's metadata, and how true they are.

    Attributes:
        keys: by key.
        name: how they say that text is cut into words: `tokenizer.ggml.pre`, or the model's kind.
        num_differing: texts of `num_probes` that llama.cpp's cut makes other tokens of; 0: the name is right.
    """

    keys: dict[str, Any]
    name: str
    num_differing: int
    num_probes: int = len(_PROBES)


def tokenizer_metadata(parts: TokenizerParts, ends: Collection[int], num_rows: int, where: str) -> TokenizerKeys:
    """The keys for a tokenizer.

    Args:
        ends: ids that end an answer.
        num_rows: of the embedding; ids that mean nothing get names of their own.
        where: the tokenizer's folder, for messages.

    Raises:
        UnsupportedError: a kind of tokenizer that GGUF has no keys for.
    """
    backend = parts.backend_tokenizer
    described = json.loads(backend.to_str())
    model = described["model"]
    if model.get("type") != "BPE":
        _refuse(where, f"is a {describe(model.get('type'))} model")
    common = _tokens(backend, model, num_rows) | _special(parts, ends, num_rows) | _around(parts)
    best: TokenizerKeys | None = None
    for kind in _kinds(described, common):
        keys = {f"{_PREFIX}{key}": value for key, value in {**common, **kind}.items() if value is not None}
        found = TokenizerKeys(keys, kind["pre"], _num_differing(keys, parts, where))
        if best is None or found.num_differing < best.num_differing:
            best = found
        if not best.num_differing:
            break
    if best is None or best.num_differing > len(_PROBES):
        _refuse(where, "cannot be told by GGUF's keys")
    return replace(best, keys=best.keys | _templates(parts.chat_template))


def _refuse(where: str, what: str) -> NoReturn:
    raise UnsupportedError(
        f"The tokenizer in {where} {what}.",
        remedy="GGUF can say byte-level BPE and SentencePiece's BPE. Export to another target: `--to hf`.",
    )


def _tokens(backend: Any, model: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
    """Every id's text and type."""
    added = backend.get_added_tokens_decoder()
    texts = {token_id: text for text, token_id in backend.get_vocab(with_added_tokens=True).items()}
    spells_bytes = bool(model.get("byte_fallback"))

    def type_of(token_id: int, text: str) -> int:
        if text == model.get("unk_token"):
            return _UNKNOWN
        if token_id in added:
            return _CONTROL if added[token_id].special else _USER_DEFINED
        return _BYTE if spells_bytes and _BYTE_PIECE.fullmatch(text) else _NORMAL

    tokens = [texts.get(token_id, f"[PAD{token_id}]") for token_id in range(num_rows)]
    types = [type_of(i, text) if i in texts else _UNUSED for i, text in enumerate(tokens)]
    return {"tokens": tokens, "token_type": types}


def _special(parts: TokenizerParts, ends: Collection[int], num_rows: int) -> dict[str, Any]:
    named = {
        key: parts.backend_tokenizer.token_to_id(text)
        for ours, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (text := parts.special_tokens_map.get(f"{ours}_token"))
    }
    others = sorted(set(ends) - {named.get("eos")})
    if named.get("eos") is None and others:
        named["eos"] = others.pop(0)
    named |= dict(zip(("eot", "eom"), others, strict=False))
    return {f"{key}_token_id": value for key, value in named.items() if value is not None and value < num_rows}


def _around(parts: TokenizerParts) -> dict[str, Any]:
    """Which tokens stand around every text."""
    ids = parts.backend_tokenizer.encode("").ids
    special = {name: parts.special_tokens_map.get(f"{name}_token") for name in ("bos", "eos")}
    named = {name: parts.backend_tokenizer.token_to_id(text) for name, text in special.items() if text}
    begins, finishes = ids[:1], ids[-1:]
    is_twice = named.get("bos") == named.get("eos") and len(ids) < 2
    return {
        "add_bos_token": begins == [named.get("bos")],
        "add_eos_token": finishes == [named.get("eos")] and not (is_twice and begins == [named.get("bos")]),
    }


def _kinds(described: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What may be written of how text is cut and merged, the likeliest first."""
    model = described["model"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if not model.get("byte_fallback"):
        for name in _likely(described, bool(model.get("ignore_merges"))):
            yield {"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in merges]}
        return
    prepends = "prepend" in json.dumps([described["normalizer"], described["pre_tokenizer"]]).lower()
    scores = _scores(common["tokens"], common["token_type"], merges)
    for first in (prepends, not prepends):
        yield {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": first}
    yield {"model": "gemma4", "pre": "gemma4", "merges": [" ".join(pair) for pair in merges]}


def _likely(described: Mapping[str, Any], ignores_merges: bool) -> list[str]:
    """Names of pre-tokenizers, one of each kind: those with the tokenizer's own expressions first."""
    text = json.dumps([described["normalizer"], described["pre_tokenizer"]], ensure_ascii=False)
    expressions = set(_patterns(described["pre_tokenizer"]))
    by_kind: dict[Any, list[str]] = {}
    for name, kind in PRE_TOKENIZERS.items():
        if kind.is_byte_level and kind.ignores_merges == ignores_merges:
            by_kind.setdefault(kind, []).append(name)

    def distance(kind: Any) -> tuple[int, bool]:
        return len(expressions ^ set(kind.expressions)), kind.normalizes != ("NFC" in text)

    return [
        next((name for name in _USUAL if name in by_kind[kind]), by_kind[kind][0])
        for kind in sorted(by_kind, key=distance)
    ]


def _patterns(described: Any) -> Iterator[str]:
    """Every expression in a pre-tokenizer; of GPT-2's, which is built into the library, that one."""
    if isinstance(described, dict):
        if described.get("type") == "ByteLevel" and described.get("use_regex", True):
            yield PRE_TOKENIZERS["gpt-2"].expressions[0]
        pattern = described.get("pattern")
        if isinstance(pattern, dict) and "Regex" in pattern:
            yield pattern["Regex"]
        for value in described.values():
            yield from _patterns(value)
    elif isinstance(described, list):
        for value in described:
            yield from _patterns(value)


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]]) -> list[float]:
    """SentencePiece's scores, by which pieces merge: minus the place of the first merge that makes a piece."""
    place: dict[str, int] = {}
    for index, pair in enumerate(merges):
        place.setdefault("".join(pair), index)
    last = float(len(merges))
    return [
        -float(place.get(token, last)) if kind == _NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)
    ]


def _templates(found: str | Mapping[str, str] | None) -> dict[str, str]:
    templates = {"default": found} if isinstance(found, str) else dict(found or {})
    return {_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}": text for name, text in templates.items()}


def _num_differing(keys: Mapping[str, Any], parts: TokenizerParts, where: str) -> int:
    """Probes of which a file with these keys is read to make other tokens; more than there are if it cannot be read."""
    try:
        wrapped, _ = build_tokenizer(keys, where)
    except AmalgamError:
        return len(_PROBES) + 1
    ours, theirs = parts.backend_tokenizer, wrapped.backend_tokenizer
    is_same = [ours.encode(text).ids == theirs.encode(text).ids for text in _PROBES]
    if keys[MODEL_KEY] == "gpt2":  # words too: the vocabulary may happen to hide where they end
        is_same = [
            same and _words(ours, text) == _words(theirs, text) for same, text in zip(is_same, _PROBES, strict=True)
        ]
    return is_same.count(False)


def _words(backend: Any, text: str) -> list[str]:
    normalized = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    cut = backend.pre_tokenizer
    return [normalized] if cut is None else [word for word, _ in cut.pre_tokenize_str(normalized)]
