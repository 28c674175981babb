"""A model folder → its tokenizer, from the files as they were published.

In: a folder. Out: `TokenizerParts` and the ids that end an answer. Must never know: requests, tensors, HTTP.

`tokenizer.json` is the truth: the tokenizers library reads it as it is, whatever class `tokenizer_config.json` names.
transformers builds some classes anew instead, with an expression, a normalizer or a space of its own. What the other
files add to it is what it cannot say or does not:

- `tokenizer_config.json` and `special_tokens_map.json` name the special tokens; one that is in the vocabulary and not
  yet special becomes so, as with transformers.
- `added_tokens_decoder` and `added_tokens.json` add tokens that tokenizer.json does not have, under the ids that they
  give. About tokens that it has, tokenizer.json is right.
- `add_bos_token` and `add_eos_token` decide where tokenizer.json has no template for what stands around a text. The
  DeepSeek models are published that way; transformers 5 leaves out their first token.
- `clean_up_tokenization_spaces` changes text after decoding, and is not done.

Without tokenizer.json, `tokenizer.model` is read here, `tiktoken.model` of Kimi too, and vocab.json with merges.txt by
transformers, whose class then is the definition. All else is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import orjson

from amalgam.base.fields import Fields
from amalgam.base.folders import member, member_folder
from amalgam.base.strict_json import read_advice, read_json_object
from amalgam.errors import AmalgamError, CheckpointError, UnsupportedError, describe
from amalgam.text import tiktoken
from amalgam.text.chat import DEFAULT
from amalgam.text.gguf.metadata import build_tokenizer
from amalgam.text.parts import TokenizerParts
from amalgam.text.sentencepiece import read_model

_JSON, _SENTENCE_PIECE = "tokenizer.json", "tokenizer.model"
TOKENIZER_FILES = (_JSON, _SENTENCE_PIECE, tiktoken.FILE, "vocab.json", "vocab.txt", "tekken.json")
_CONFIG, _NAMES, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# What transformers looks at, and more.
_READ = ("*.json", "*.jinja", "*.txt", "*.model", f"{_TEMPLATES}/*")
_MODEL, _ADVICE = "config.json", "generation_config.json"
_MAX_BYTES = 64 * 2**20
_MAX_TOKENIZER_BYTES = 512 * 2**20
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Of transformers: byte-level BPE whose words are those of the class, so that vocab.json and merges.txt are enough.
_DEFINING_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer")
_NO_TEMPLATE = {"ByteLevel"}  # post-processors that put nothing around a text

logger = logging.getLogger("amalgam.text")


def has_tokenizer(folder: Path) -> bool:
    """Whether any of `TOKENIZER_FILES` is there."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_folder(folder: Path) -> tuple[TokenizerParts, frozenset[int]]:
    """A folder's tokenizer, and the ids that end an answer. Code that it brings along or refers to is never run.

    Raises:
        CheckpointError: files are damaged, contradict each other, or lie outside of the folder.
        UnsupportedError: a kind of tokenizer that is not known, or one that is not published as tokenizer.json.
    """
    _check_links(folder)
    if (folder / _JSON).is_file():
        parts = _Folder(folder).from_json()
    elif (folder / _SENTENCE_PIECE).is_file():
        parts = _Folder(folder).from_sentence_piece()
    elif (folder / tiktoken.FILE).is_file():
        parts = _Folder(folder).from_ranks()
    else:
        parts = _read_with_transformers(folder)
    eos = parts.special_tokens_map.get("eos_token")
    ends = eos_token_ids(folder) | {parts.backend_tokenizer.token_to_id(eos) if eos is not None else None}
    return parts, frozenset(token_id for token_id in ends if token_id is not None)


def eos_token_ids(folder: Path) -> frozenset[int]:
    """What config.json and generation_config.json name as the end of a sequence.

    Raises:
        CheckpointError: they are damaged, or name something that is no token id.
    """
    token_ids: set[int] = set()
    for path in (folder / _MODEL, folder / _ADVICE):
        fields = Fields(_read_json(path), repr(str(path)))
        value = fields.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in values):
            fields.refuse("eos_token_id", value, "a token id, a list of them, or null")
        token_ids.update(values)
    return frozenset(token_ids)


def read_template(path: Path) -> str:
    """A chat template that lies in a file of its own.

    Raises:
        CheckpointError: there is none, or it is no text.
    """
    if not path.is_file():
        raise CheckpointError(
            f"server.chat_template is {str(path)!r}, and there is no such file.", remedy="Give a file with a template."
        )
    return _read_text(path)


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = _read_json(folder / _CONFIG)
        if "added_tokens_decoder" not in self._config:  # with it, the older files are not looked at
            self._config |= _read_json(folder / _NAMES)
        self._fields = Fields(self._config, self._where(_CONFIG))
        self._names = dict(self._named_tokens())

    def from_json(self) -> TokenizerParts:
        from tokenizers import Tokenizer as Backend

        path = self._folder / _JSON
        versions = self._config.get("fast_tokenizer_files") or [_JSON]
        if versions != [_JSON]:
            raise UnsupportedError(
                f"{self._where(_CONFIG)} has fast_tokenizer_files = {describe(versions)}.",
                remedy=f"Leave only the file to be used, by the name {_JSON}, and remove the entry.",
            )
        try:
            if path.stat().st_size > _MAX_TOKENIZER_BYTES:
                raise ValueError(f"more than {_MAX_TOKENIZER_BYTES} bytes")
            data = path.read_bytes()
            backend = Backend.from_buffer(data)
            published = orjson.loads(data)
        except BaseException as error:  # bare Exception is what tokenizers raises, and panics are not even that
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise self._unreadable(error) from None
        for token in published.get("added_tokens") or []:
            if (found := backend.token_to_id(token["content"])) != token["id"]:
                raise CheckpointError(
                    f"{self._where(_JSON)} gives its added token {describe(token['content'])} the id {token['id']}, "
                    f"and its vocabulary {found}.",
                    remedy="Copy the file again from the published checkpoint.",
                )
        return self._finish(backend)

    def from_sentence_piece(self) -> TokenizerParts:
        from tokenizers import normalizers, pre_tokenizers

        path = self._folder / _SENTENCE_PIECE
        if path.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise self._unreadable(ValueError(f"more than {_MAX_TOKENIZER_BYTES} bytes"))
        keys = read_model(path.read_bytes(), repr(str(path)))
        # What stands around a text is settled below, from the same place as ever.
        wrapped, _ = build_tokenizer({**keys, "tokenizer.ggml.add_bos_token": False}, repr(str(path)))
        backend = wrapped.backend_tokenizer
        if keys["tokenizer.ggml.add_space_prefix"] and self._fields.bool("legacy", default=True) is False:
            # A space before the text that has none, and none after each special token: as the published tokenizer.json
            # of such models has it.
            backend.normalizer = normalizers.Sequence([])
            backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        backend.post_processor = None
        self._names = {**wrapped.special_tokens_map, **self._names}
        self._config.setdefault("add_bos_token", "bos_token" in self._names)
        return self._finish(backend)

    def from_ranks(self) -> TokenizerParts:
        path = self._folder / tiktoken.FILE
        if path.stat().st_size > tiktoken.MAX_BYTES:
            raise self._unreadable(ValueError(f"more than {tiktoken.MAX_BYTES} bytes"))
        named = {token_id: (text, flags) for token_id, text, flags in self._declared_tokens()}
        backend = tiktoken.build_backend(path.read_bytes(), self._config, named, repr(str(path)))
        return replace(self._finish(backend), sorts_tools=True)

    def _finish(self, backend: Any) -> TokenizerParts:
        """What the other files say beside the one that `backend` was read from."""
        try:
            self._add_tokens(backend)
            self._surround(backend)
            if self._fields.bool("split_special_tokens", default=False):
                backend.encode_special_tokens = True
        except AmalgamError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise self._unreadable(error) from error
        return TokenizerParts(backend, self._names, self._chat_template())

    def _named_tokens(self) -> Iterator[tuple[str, str]]:
        """Special tokens by name: `bos_token` and the like, and those that only this model has."""
        extra = self._config.get("extra_special_tokens")
        for name, value in [*self._config.items(), *(extra.items() if isinstance(extra, dict) else ())]:
            is_named = name.endswith("_token") or (isinstance(extra, dict) and name in extra)
            if is_named and value is not None and not isinstance(value, bool):
                yield name, self._text(name, value)

    def _add_tokens(self, backend: Any) -> None:
        from tokenizers import AddedToken

        known = {token.content: (token_id, token) for token_id, token in backend.get_added_tokens_decoder().items()}
        new, differing = [], []
        for token_id, text, flags in self._declared_tokens():
            if text in known:
                found, token = known[text]
                if any(getattr(token, name) != value for name, value in flags.items()):
                    differing.append(text)
            else:
                found = backend.token_to_id(text)
                new.append((token_id, AddedToken(text, **flags)))
            if found is not None and found != token_id:
                self._contradicts(text, token_id, found)
        backend.add_tokens([token for _, token in sorted(new, key=lambda item: item[0])])
        for token_id, token in new:
            if (found := backend.token_to_id(token.content)) != token_id:
                self._contradicts(token.content, token_id, found)
        if differing:
            logger.warning(
                "%s: what tokenizer_config.json says about %s is not what the tokenizer itself says, which holds.",
                self._folder,
                describe(differing, 200),
            )
        self._make_special(backend, {*known, *(token.content for _, token in new)})

    def _make_special(self, backend: Any, known: set[str]) -> None:
        """Tokens that are named special and are mere words of the vocabulary so far."""
        from tokenizers import AddedToken

        extra = self._config.get("additional_special_tokens") or self._config.get("extra_special_tokens") or []
        if not isinstance(extra, list | dict):
            self._fields.refuse("additional_special_tokens", extra, "a list of tokens")
        listed = [
            self._text("additional_special_tokens", value) for value in (extra if isinstance(extra, list) else ())
        ]
        texts = [text for text in dict.fromkeys([*self._names.values(), *listed]) if text and text not in known]
        missing = [text for text in texts if backend.token_to_id(text) is None]
        if missing:
            logger.warning("%s names tokens that its vocabulary does not have: %s.", self._folder, describe(missing))
        backend.add_special_tokens([AddedToken(text, special=True) for text in texts if text not in missing])

    def _declared_tokens(self) -> Iterator[tuple[int, str, dict[str, bool]]]:
        """(id, text, flags) of added tokens, as the files beside tokenizer.json have them."""
        declared = self._config.get("added_tokens_decoder")
        if declared is None:
            special = {*self._names.values()}
            added = Fields(_read_json(self._folder / _ADDED), self._where(_ADDED))
            for text in added.values:
                yield added.int(text), text, {"special": text in special, "normalized": False}
            return
        if not isinstance(declared, dict):
            self._fields.refuse("added_tokens_decoder", declared, "an object")
        for token_id, token in declared.items():
            flags = {name: token.get(name, False) for name in _FLAGS} if isinstance(token, dict) else {}
            if not token_id.isdecimal() or not flags or not all(isinstance(value, bool) for value in flags.values()):
                self._fields.refuse(f"added_tokens_decoder.{token_id}", token, "a token with its flags")
            if text := self._text(f"added_tokens_decoder.{token_id}", token):
                yield int(token_id), text, flags

    def _surround(self, backend: Any) -> None:
        """What stands around every text."""
        from tokenizers import processors

        wants = {name: self._fields.bool(f"add_{name}_token", default=None) for name in ("bos", "eos")}
        if _has_template(backend):
            around = backend.encode("").ids
            for name, wanted in wants.items():
                token_id = backend.token_to_id(self._names.get(f"{name}_token", ""))
                if wanted is not None and token_id is not None and wanted != (token_id in around):
                    logger.warning("%s: add_%s_token is %s, and tokenizer.json holds.", self._folder, name, wanted)
            return
        texts = [self._names.get(f"{name}_token") if wanted else None for name, wanted in wants.items()]
        ids = {text: backend.token_to_id(text) for text in texts if text is not None}
        for text, token_id in ids.items():
            if token_id is None:
                self._fields.refuse("add_bos_token or add_eos_token", text, "with a token of the vocabulary")
        if ids:
            before, after = ([] if text is None else [text] for text in texts)
            backend.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after], special_tokens=list(ids.items())
            )

    def _chat_template(self) -> str | dict[str, str] | None:
        declared = self._config.get("chat_template")
        if isinstance(declared, list):  # [{"name": …, "template": …}, …]
            if not all(isinstance(item, dict) and {"name", "template"} <= item.keys() for item in declared):
                self._fields.refuse("chat_template", declared, "a template, or a list of named ones")
            declared = {item["name"]: item["template"] for item in declared}
        templates = {DEFAULT: declared} if isinstance(declared, str) else declared or {}
        if not isinstance(templates, dict) or not all(
            isinstance(item, str) for pair in templates.items() for item in pair
        ):
            self._fields.refuse("chat_template", declared, "a template, or a list of named ones")
        files = {file.stem: file for file in (self._folder / _TEMPLATES).glob("*.jinja")}
        if (path := self._folder / _TEMPLATE).is_file():
            files[DEFAULT] = path
        for name, file in files.items():
            templates = {**templates, name: _read_text(file)}
        return templates[DEFAULT] if templates.keys() == {DEFAULT} else templates or None

    def _text(self, name: str, token: Any) -> str:
        """A token is its text, or an object that has it with its flags."""
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str):
            self._fields.refuse(name, token, "a token")
        return text

    def _where(self, name: str) -> str:
        return repr(str(self._folder / name))

    def _unreadable(self, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"The tokenizer in {str(self._folder)!r} cannot be read: {describe(str(error), 400)}.",
            remedy="Copy its files again from the published checkpoint.",
        )

    def _contradicts(self, text: str, declared: int, found: int | None) -> NoReturn:
        raise CheckpointError(
            f"The files in {str(self._folder)!r} give the token {describe(text)} the id {declared}, and the tokenizer "
            f"{found}.",
            remedy="Copy the tokenizer's files again from one published checkpoint; remove those of another.",
        )


def _has_template(backend: Any) -> bool:
    """Whether a post-processor says what stands around a text, be it nothing."""
    if backend.post_processor is None:
        return False
    state = json.loads(backend.post_processor.__getstate__())
    steps = state.get("processors", []) if state["type"] == "Sequence" else [state]
    return any(step["type"] not in _NO_TEMPLATE for step in steps)


def _read_with_transformers(folder: Path) -> TokenizerParts:
    """vocab.json with merges.txt: what the class makes of them is the definition."""
    from transformers import AutoTokenizer  # 1 to 3 s, most of it torch

    try:
        wrapped = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise all kinds, bare Exception included
        raise CheckpointError(
            f"The tokenizer in {str(folder)!r} cannot be read: {describe(str(error), 400)}.",
            remedy=f"Add the published {_JSON}, or copy the files again; custom code is not run.",
        ) from error
    kind = type(wrapped).__name__
    if kind not in _DEFINING_CLASSES:
        raise UnsupportedError(
            f"The tokenizer in {str(folder)!r} is a {kind}, which does not say how text is cut into words.",
            remedy=f"Add the published {_JSON}. Without it: {', '.join(_DEFINING_CLASSES)}.",
        )
    backend = wrapped.backend_tokenizer
    published = _read_json(folder / "vocab.json")
    if not published or any(backend.token_to_id(token) != token_id for token, token_id in published.items()):
        raise CheckpointError(
            f"transformers makes other tokens of {str(folder / 'vocab.json')!r} than it holds.",
            remedy=f"Add the published {_JSON}.",
        )
    return TokenizerParts(wrapped.backend_tokenizer, wrapped.special_tokens_map, wrapped.chat_template)


def _check_links(folder: Path) -> None:
    """Raise CheckpointError if a file that is read, here or by transformers, lies outside of the folder."""
    files: Sequence[Path] = sorted({file for pattern in _READ for file in folder.glob(pattern)})
    for file in files:
        member(folder if file.parent == folder else member_folder(folder, file.parent.name), file.name)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        return path.read_bytes().decode()
    except ValueError as error:
        raise CheckpointError(
            f"{str(path)!r} is not text in UTF-8: {error}.", remedy="Copy it again from the published checkpoint."
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    return read_advice(path, _MAX_BYTES)[0] if path.name == _ADVICE else read_json_object(path, _MAX_BYTES)
