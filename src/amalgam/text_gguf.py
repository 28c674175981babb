"""The tokenizer that a GGUF file describes in its metadata.

In: the keys `tokenizer.*`. Out: a tokenizer of transformers, built with the tokenizers library. What decides how text
is cut is refused unless it is known: llama.cpp falls back to a default instead, and the model then reads other tokens
than it was trained on.
Must never know: files, tensors, requests.

Two kinds, by `tokenizer.ggml.model`. `gpt2`: byte-level BPE with merges; `tokenizer.ggml.pre` names the expression
that cuts text into words. `llama`: SentencePiece BPE, whose merges follow from the pieces' scores. Neither normalizes
Unicode. As llama.cpp does it (src/llama-vocab.cpp); the expressions are those of the published tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from amalgam.errors import CheckpointError, UnsupportedError, describe

MODEL_KEY = "tokenizer.ggml.model"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_MAX_TOKEN_CHARS = 1024
_SPACE = "▁"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_QWEN2 = (rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}",)
_GPT4 = (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_GPT4O = (_CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?") + rf"|\p{{N}}{{1,3}}|{_CASED_REST}",)
_TEKKEN = (_CASED % ("", "") + rf"|\p{{N}}|{_CASED_REST}",)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class _Words:
    """How byte-level BPE cuts text: expressions, one after the other, whose matches stand alone."""

    expressions: tuple[str, ...]
    ignores_merges: bool = False  # a word that is a token is that token, whatever the merges say
    adds_bos: bool = False  # unless the file says otherwise


_PRE_TOKENIZERS = {
    "gpt-2": _Words(_GPT2),
    "phi-2": _Words(_GPT2),
    "olmo": _Words(_GPT2),
    "qwen2": _Words(_QWEN2),
    "deepseek-r1-qwen": _Words(_QWEN2),
    "llama-bpe": _Words(_GPT4, ignores_merges=True, adds_bos=True),
    "llama3": _Words(_GPT4, ignores_merges=True, adds_bos=True),
    "llama-v3": _Words(_GPT4, ignores_merges=True, adds_bos=True),
    "dbrx": _Words(_GPT4),
    "smaug-bpe": _Words(_GPT4),
    "glm4": _Words(_GPT4),
    "chatglm-bpe": _Words(_GPT4),
    "gpt-4o": _Words(_GPT4O),
    "tekken": _Words(_TEKKEN, ignores_merges=True, adds_bos=True),
    "deepseek-v3": _Words(_DEEPSEEK3),
}


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
    kind = metadata.get(MODEL_KEY)
    builder = _KINDS.get(kind) if isinstance(kind, str) else None
    if builder is None:
        tables.unsupported(MODEL_KEY, kind, _KINDS)
    try:
        backend, adds_bos = builder(tables)
        for special, token_type in ((True, _CONTROL), (False, _USER_DEFINED)):
            added = [
                AddedToken(token, normalized=False, special=special)
                for token, found in zip(tables.tokens, tables.types, strict=True)
                if found == token_type
            ]
            (backend.add_special_tokens if special else backend.add_tokens)(added)
        before, after = (
            [tables.tokens[token_id]] if tables.flag(f"add_{name}_token", default) and token_id is not None else []
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
            tokenizer_object=backend, chat_template=tables.chat_template, clean_up_tokenization_spaces=False, **named
        )
    except (CheckpointError, UnsupportedError):
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"The tokenizer in {where} cannot be built: {describe(str(error), 400)}.", remedy="Download it again."
        ) from error
    ends = (tables.special(name) for name in ("eos", "eot"))
    return wrapped, frozenset(token_id for token_id in ends if token_id is not None)


class _Tables:
    """Typed access to the keys `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self._where = where
        self.tokens = self.strings("tokens")
        self.types = list(self.numbers("token_type"))
        if len(set(self.tokens)) != len(self.tokens):
            self.damaged("tokens", "a token twice", "every token once")
        if max(map(len, self.tokens), default=0) > _MAX_TOKEN_CHARS:
            self.damaged("tokens", f"over {_MAX_TOKEN_CHARS} characters in a token", "shorter ones")
        self.vocab = {token: token_id for token_id, token in enumerate(self.tokens)}

    def get(self, name: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}")

    def strings(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) for v in value):
            self.damaged(name, value, "an array of strings")
        return list(value)

    def numbers(self, name: str) -> Sequence[float]:
        """One number for each token."""
        value = self.get(name)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(self.tokens):
            self.damaged(name, value, f"an array of {len(self.tokens)} numbers, one for each token")
        if not all(isinstance(number, int | float) for number in value):
            self.damaged(name, value, "numbers")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.damaged(name, value, "true or false")
        return default if value is None else value

    def special(self, name: str) -> int | None:
        """The id of a special token, None if there is none."""
        value = self.get(f"{name}_token_id")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            self.damaged(f"{name}_token_id", value, "a token id")
        if value is not None and not 0 <= value < len(self.tokens):
            self.damaged(f"{name}_token_id", value, f"an id below {len(self.tokens)}")
        return value

    @property
    def chat_template(self) -> str | None:
        value = self._metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) else None

    def damaged(self, name: str, value: Any, allowed: str) -> NoReturn:
        raise CheckpointError(
            f"{self._where} has tokenizer.ggml.{name} = {describe(value)}.", remedy=f"Expected {allowed}."
        )

    def unsupported(self, key: str, value: Any, known: Mapping[str, Any]) -> NoReturn:
        raise UnsupportedError(
            f"{self._where} has {key} = {describe(value)}.",
            remedy=f"Known: {', '.join(known)}. Or put the file into a folder with the published config.json and "
            "tokenizer.json.",
        )


def _byte_level(tables: _Tables) -> tuple[Any, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = tables.get("pre")
    words = _PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    if words is None:
        tables.unsupported("tokenizer.ggml.pre", pre, _PRE_TOKENIZERS)
    merges = []
    for merge in tables.strings("merges"):
        left, _, right = merge.partition(" ")
        if not all(part in tables.vocab for part in (left, right, left + right)):
            tables.damaged("merges", merge, "pairs of tokens whose concatenation is a token")
        merges.append((left, right))
    backend = Tokenizer(models.BPE(tables.vocab, merges, ignore_merges=words.ignores_merges))
    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in words.expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, words.adds_bos


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
    if tables.flag("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _merges_by_score(tables: _Tables) -> list[tuple[str, str]]:
    """Two pieces merge if together they are a piece, the best score first."""
    scores = tables.numbers("scores")
    pieces = {token for token, kind in zip(tables.tokens, tables.types, strict=True) if kind == _NORMAL}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append((-scores[tables.vocab[piece]], tables.vocab[left], tables.vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


_KINDS: Mapping[str, Callable[[_Tables], tuple[Any, bool]]] = {"gpt2": _byte_level, "llama": _sentence_piece}
