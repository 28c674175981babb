"""The tokenizer that a GGUF file describes in its metadata.

In: the keys `tokenizer.*`. Out: a tokenizer of transformers, built with the tokenizers library. What decides how text
is cut is refused unless it is known: llama.cpp falls back to a default instead, and the model then reads other tokens
than it was trained on.
Must never know: files, tensors, requests.

Three kinds, by `tokenizer.ggml.model`. `gpt2`: byte-level BPE with merges; `tokenizer.ggml.pre` names the expression
that cuts text into words. `gemma4`: the same, with pieces and an expression of its own. `llama`: SentencePiece BPE,
whose merges follow from the pieces' scores. As llama.cpp does it (src/llama-vocab.cpp), and where it differs from the
published tokenizer.json, as that does it: Unicode's form NFC for Qwen and others, the published expressions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amalgam.base.fields import Fields
from amalgam.errors import CheckpointError, UnsupportedError, describe
from amalgam.text.gguf.ends import NAMED, end_ids, unmistakable
from amalgam.text.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer

MODEL_KEY = "tokenizer.ggml.model"
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_MAX_TOKEN_CHARS = 1024
_SPACE = "▁"
# Tables of the other kind of tokenizer; tokens for masks and for code; another library's copy of it all.
_HARMLESS = {
    *("model", "pre", "scores", "merges", "add_space_prefix"),
    *("token_type_count", "add_sep_token", "huggingface.json", "rwkv.world"),
    *(f"{name}_token_id" for name in ("separator", "seperator", "cls", "mask", "prefix", "suffix", "middle")),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid")),
}
# Would change how text is cut or which tokens may come; llama.cpp reads them for other kinds of tokenizers.
_NEUTRAL = ("remove_extra_whitespaces", "normalizer.lowercase", "normalizer.strip_accents")
_EMPTY = ("precompiled_charsmap", "suppress_tokens")
# What llama.cpp takes where a SentencePiece file names none.
_SENTENCE_PIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> tuple[Any, frozenset[int]]:
    """A `PreTrainedTokenizerFast`, and the ids that end an answer.

    Args:
        metadata: a GGUF file's, by key.
        where: the file, for messages.

    Raises:
        UnsupportedError: a kind of tokenizer or pre-tokenizer that is not known.
        CheckpointError: tables are missing, contradict each other, or name ids that there are not.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast  # 1 to 3 s, most of it torch

    tables = _Tables(metadata, where)
    kind = tables.get("model")
    builder = _KINDS.get(kind) if isinstance(kind, str) else None
    if builder is None:
        tables.unsupported("model", kind, ", ".join(_KINDS))
    try:
        backend, adds_bos = builder(tables)
        for special, types in ((True, (_CONTROL, _UNKNOWN)), (False, (_USER_DEFINED,))):
            added = [
                AddedToken(token, normalized=False, special=special)
                for token, found in zip(tables.tokens, tables.types, strict=True)
                if found in types
            ]
            (backend.add_special_tokens if special else backend.add_tokens)(added)
        before, after = (
            [tables.tokens[token_id]]
            if tables.bool(f"add_{name}_token", default=default) and token_id is not None
            else []
            for name, default, token_id in (
                ("bos", adds_bos, tables.special("bos")),
                ("eos", False, tables.special("eos")),
            )
        )
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(text, tables.vocab[text]) for text in {*before, *after}]
        )
        named = {
            f"{ours}_token": tables.tokens[token_id]
            for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if (token_id := tables.special(theirs)) is not None
        }
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=chat_templates(metadata),
            clean_up_tokenization_spaces=False,
            **named,
        )
    except (CheckpointError, UnsupportedError):
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"The tokenizer in {where} cannot be built: {describe(str(error), 400)}.", remedy="Download it again."
        ) from error
    special_ids = {token_id for token_id, found in enumerate(tables.types) if found in (_CONTROL, _USER_DEFINED)}
    ends = end_ids(tables.vocab, special_ids, {name: tables.special(name) for name in NAMED})
    tables.check_all_read()
    return wrapped, ends


def chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """`tokenizer.chat_template`, and others by name behind it."""
    named = {key.removeprefix(_TEMPLATE).lstrip("."): value for key, value in metadata.items()
             if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")}  # fmt: skip
    found = {name or "default": value for name, value in named.items() if isinstance(value, str)}
    return found["default"] if found.keys() == {"default"} else found or None


class _Tables(Fields):
    """Typed access to the keys `tokenizer.ggml.*`."""

    cure = "Or put the file into a folder with the published config.json and tokenizer.json."

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        values = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
        super().__init__(values, where, _PREFIX)
        self.pass_over(_HARMLESS)
        # An empty token cannot be found in any text; llama.cpp gives it the same name.
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(self.strings("tokens"))]
        self.types = self.numbers("token_type")
        for token_id in unmistakable(self.tokens):
            if self.types[token_id] != _USER_DEFINED:
                self.types[token_id] = _CONTROL
        if len(set(self.tokens)) != len(self.tokens):
            self.refuse("tokens", "a token twice", "every token once")
        if max(map(len, self.tokens), default=0) > _MAX_TOKEN_CHARS:
            self.refuse("tokens", f"over {_MAX_TOKEN_CHARS} characters in a token", "shorter ones")
        self.vocab = {token: token_id for token_id, token in enumerate(self.tokens)}

    def strings(self, name: str) -> list[str]:
        return self.list(name, of=str, what="strings")

    def numbers(self, name: str) -> list[float]:
        """One number for each token."""
        values = self.list(name, of=float, what="numbers")
        if len(values) != len(self.tokens):
            self.refuse(name, values, f"{len(self.tokens)} numbers, one for each token")
        return values

    def special(self, name: str) -> int | None:
        """The id of a special token, None if there is none."""
        default = self._default_id(name) if self.values.get("model") == "llama" else None
        return self.int(f"{name}_token_id", default=default, high=len(self.tokens) - 1)

    def _default_id(self, name: str) -> int | None:
        token_id = _SENTENCE_PIECE_IDS.get(name)
        has_it = token_id is not None and token_id < len(self.types) and self.types[token_id] in (_CONTROL, _UNKNOWN)
        return token_id if has_it else None

    def check_all_read(self) -> None:
        """Refuse what would change the tokens, and what nobody knows."""
        for name in _NEUTRAL:
            self.expect(name, False)
        for name in _EMPTY:
            value = self.get(name)
            if value is not None and (not isinstance(value, Sequence) or len(value)):
                self.unsupported(name, value, "nothing under this key")
        for _, name, value in self.unread():
            self.unsupported(name, value, "nothing under this key")


def _words_and_merges(tables: _Tables, default_pre: str | None = None) -> tuple[Any, bool]:
    """BPE with merges in words, by letters that stand for bytes or by pieces as SentencePiece has them."""
    pre = tables.get("pre", default=default_pre)
    pretokenizer = PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    if pretokenizer is None:
        tables.unsupported("pre", pre, "the names in docs/support.md")
    merges = []
    for merge in tables.strings("merges"):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not all(part in tables.vocab for part in (left, right, left + right)):
            tables.refuse("merges", merge, "pairs of tokens whose concatenation is a token")
        merges.append((left, right))
    return bpe_backend(tables.vocab, merges, pretokenizer), pretokenizer.adds_bos


def bpe_backend(vocab: dict[str, int], merges: list[tuple[str, str]], pretokenizer: PreTokenizer) -> Any:
    """A `tokenizers.Tokenizer` that merges within words, the first pairs of `merges` first."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(
        models.BPE(
            vocab,
            merges,
            ignore_merges=pretokenizer.ignores_merges,
            byte_fallback=not pretokenizer.is_byte_level,
        )
    )
    (_cut_bytes if pretokenizer.is_byte_level else _cut_pieces)(backend, pretokenizer)
    return backend


def _cut_bytes(backend: Any, pretokenizer: PreTokenizer) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers

    if pretokenizer.normalizes:
        backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*_splits(pretokenizer), byte_level])
    backend.decoder = decoders.ByteLevel()


def _cut_pieces(backend: Any, pretokenizer: PreTokenizer) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Sequence(_splits(pretokenizer))
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])


def _splits(pretokenizer: PreTokenizer) -> list[Any]:
    from tokenizers import Regex, pre_tokenizers

    return [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in pretokenizer.expressions]


def _sentence_piece(tables: _Tables) -> tuple[Any, bool]:
    """Spaces are ▁, one more is put before the text; what has no piece is spelled in bytes, `<0x0A>`."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = tables.special("unknown")
    backend = Tokenizer(
        models.BPE(
            tables.vocab,
            _merges_by_score(tables),
            unk_token=None if unknown is None else tables.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if tables.bool("add_space_prefix", default=True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _merges_by_score(tables: _Tables) -> list[tuple[str, str]]:
    """Two pieces merge if together they are a piece, the best score first.

    Pieces of the same score in the order of their ids, which is how SentencePiece numbers them: some converters write
    one score for all.
    """
    scores, vocab = tables.numbers("scores"), tables.vocab
    pieces = {token for token, kind in zip(tables.tokens, tables.types, strict=True) if kind == _NORMAL}
    merges: list[tuple[float, int, int, int, str, str]] = []
    for piece in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                piece_id = vocab[piece]
                merges.append((-scores[piece_id], piece_id, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


_KINDS: Mapping[str, Callable[[_Tables], tuple[Any, bool]]] = {
    "gpt2": _words_and_merges,
    "gemma4": lambda tables: _words_and_merges(tables, "gemma4"),
    "llama": _sentence_piece,
}
