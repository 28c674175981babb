"""Text ↔ token ids: the tokenizer of a checkpoint, with its chat template.

In: a model folder; strings and chat messages; token ids. Out: token ids; text.
Must never know: tensors, requests, HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from amalgam.errors import CheckpointError, PromptTooLongError, RequestError, describe
from amalgam.text.chat import DEFAULT, ChatPrompt, ChatTemplates
from amalgam.text.files import TOKENIZER_FILES, eos_token_ids, has_tokenizer, read_folder
from amalgam.text.gguf.metadata import build_tokenizer
from amalgam.text.marking import MarkedEncoder, SpecialTokenFinder
from amalgam.text.parts import TokenizerParts, byte_of_letter
from amalgam.text.pieces import PIECE_CHARS, LengthBound, surrounding_ids, token_ids_by_piece, token_starts_by_piece
from amalgam.text.rendering import TemplateError

UNDECODABLE = "\ufffd"  # what `decode` makes of bytes that are no whole character
_NUM_END_TOKENS = 32
_MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
_NONE: Mapping[str, Any] = MappingProxyType({})


_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece spells them


class Tokenizer:
    """A checkpoint's tokenizer. Any thread may use it; encoding and decoding release the interpreter lock.

    Args:
        parts: what was read, or a tokenizer of transformers that is backed by the tokenizers library.
        eos_token_ids: the ids that end an answer.

    Attributes:
        special_tokens: the text of each special token, which `decode` leaves out, by id.
    """

    def __init__(self, parts: TokenizerParts | Any, eos_token_ids: frozenset[int]) -> None:
        self._backend = parts.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        sources = parts.chat_template or {}
        sources = {DEFAULT: sources} if isinstance(sources, str) else sources
        sorts_tools = getattr(parts, "sorts_tools", False)
        self._templates = ChatTemplates(sources, parts.special_tokens_map, sorts_tools=sorts_tools)
        self.eos_token_ids = eos_token_ids
        known_ids = self._backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(known_ids, default=-1)
        added = self._backend.get_added_tokens_decoder().items()
        self.special_tokens: Mapping[int, str] = {token_id: token.content for token_id, token in added if token.special}
        self._has_text = bytearray(self.vocab_size)  # asked for each token of an answer; the library takes longer
        for token_id in known_ids:
            self._has_text[token_id] = token_id not in self.special_tokens

    @classmethod
    def load(
        cls, folder: Path, gguf_metadata: Mapping[str, Any] | None = None, chat_template: str | None = None
    ) -> Tokenizer:
        """Read a folder's tokenizer. Code that the folder brings along or refers to is never run.

        Args:
            folder: a folder, or a GGUF file.
            gguf_metadata: the checkpoint's metadata if it is GGUF; used if the folder has no tokenizer's files.
            chat_template: its source, in place of those that the folder has.

        Raises:
            CheckpointError: there is none, or its files are damaged.
            UnsupportedError: it does not run on the tokenizers library.
        """
        if not has_tokenizer(folder):
            if gguf_metadata:
                wrapped, ends = build_tokenizer(gguf_metadata, str(folder))
                return cls(_with_template(wrapped, chat_template), ends | eos_token_ids(folder))
            raise CheckpointError(
                f"Folder {str(folder)!r} has no tokenizer.",
                remedy=f"Put one of these files there: {', '.join(TOKENIZER_FILES)}.",
            )
        parts, eos = read_folder(folder)
        tokenizer = cls(_with_template(parts, chat_template), eos)
        if not tokenizer.vocab_size:
            raise CheckpointError(f"The tokenizer in {str(folder)!r} is empty.", remedy="Copy its files again.")
        return tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self._templates.source() is not None

    def first_difference(self, other: Tokenizer) -> int | None:
        """The first token id that stands for something else in another tokenizer, or for nothing; None: there is none.

        Special tokens that one of them lacks do not count: chats end differently in models of one vocabulary.
        """
        mine, others = (
            {token_id: text for text, token_id in tokenizer._backend.get_vocab(with_added_tokens=True).items()}
            for tokenizer in (self, other)
        )
        special = self.special_tokens.keys() | other.special_tokens.keys()
        differing = (
            token_id
            for token_id in mine.keys() | others.keys()
            if mine.get(token_id) != others.get(token_id)
            and not (token_id in special and (token_id not in mine or token_id not in others))
        )
        return min(differing, default=None)

    def check_vocabulary(self, vocab_size: int) -> None:
        """
        Raises:
            CheckpointError: the tokenizer can give ids that a model with `vocab_size` embeddings does not have, or so
                few of those that it has that it is another model's. Embeddings are padded by a few percent at most.
        """
        if not vocab_size // 2 <= self.vocab_size <= vocab_size:
            raise CheckpointError(
                f"The tokenizer has {self.vocab_size} tokens and the model's embedding {vocab_size} rows.",
                remedy="Tokenizer and weights belong to different models; use those of one checkpoint.",
            )

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Token ids of a prompt, with the tokens that the tokenizer puts around every text.

        Args:
            max_tokens: a longer prompt is refused, mostly before it costs anything.

        Raises:
            RequestError: the text holds lone surrogates.
            PromptTooLongError: it has more tokens than `max_tokens`.
        """
        return [token_id for piece in self.encode_by_piece(text, max_tokens) for token_id in piece]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int | None = None, **options: Any
    ) -> list[int]:
        """Token ids of a conversation, `[{"role": …, "content": …}, …]`, up to where the assistant goes on.

        Args:
            options: as those of `encode_chat_by_piece`.

        Raises:
            RequestError: there is no chat template, it refuses the messages, or they are malformed.
            PromptTooLongError: as `encode`.
        """
        return [token_id for piece in self.encode_chat_by_piece(messages, max_tokens, **options) for token_id in piece]

    def encode_by_piece(
        self, text: str, max_tokens: int | None = None, *, add_special_tokens: bool = True
    ) -> Iterator[list[int]]:
        """What `encode` gives, in portions of bounded work and memory; nothing is done before one is asked for.

        Args:
            add_special_tokens: those that the tokenizer puts around every text.
        """
        return self._by_piece(text, max_tokens, add_special_tokens=add_special_tokens)

    def encode_chat_by_piece(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = _NONE,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Iterator[list[int]]:
        """What `encode_chat` gives, as `encode_by_piece`; the template is applied with the first portion.

        `chat.ChatPrompt` says what the arguments mean.
        """
        prompt = ChatPrompt(messages, tools, documents, variables, add_generation_prompt, continue_final_message)
        text, mark = self._apply_chat_template(prompt)
        if not mark:
            yield from self._by_piece(text, max_tokens, add_special_tokens=False)
            return
        _check_surrogates(text)
        yield from self._within(self._marked_encoder.pieces(text, mark), text, max_tokens)

    def token_starts_by_piece(self, text: str) -> Iterator[list[int]]:
        """The character that each token of a text begins in, without those around it, in portions as of `encode`.

        Raises:
            RequestError: the text holds lone surrogates.
        """
        _check_surrogates(text)
        return token_starts_by_piece(self._backend, text)

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template, of the one for chats with tools if there are two; None: there is none."""
        return self._templates.source(has_tools=True)

    def _by_piece(self, text: str, max_tokens: int | None, *, add_special_tokens: bool) -> Iterator[list[int]]:
        _check_surrogates(text)
        if max_tokens is not None and len(text) > PIECE_CHARS:
            _check_length(self._length_bound.min_tokens(text), text, max_tokens)
        yield from self._within(self._pieces(text, add_special_tokens=add_special_tokens), text, max_tokens)

    def _within(self, pieces: Iterator[list[int]], text: str, max_tokens: int | None) -> Iterator[list[int]]:
        """The pieces of a text, up to where they are too many."""
        num_tokens = 0
        for piece in pieces:
            num_tokens += len(piece)
            if max_tokens is not None:
                _check_length(num_tokens, text, max_tokens)
            yield piece

    def _pieces(self, text: str, *, add_special_tokens: bool) -> Iterator[list[int]]:
        surroundings = self._surrounding_ids if add_special_tokens else ([], [])
        if len(text) <= PIECE_CHARS or surroundings is None:
            # Unlike `encode`, the batch call lets other threads run meanwhile.
            yield self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return
        before, after = surroundings
        yield before
        yield from token_ids_by_piece(self._backend, text)
        yield after

    @cached_property
    def _length_bound(self) -> LengthBound:
        return LengthBound(self._backend)

    @cached_property
    def _surrounding_ids(self) -> tuple[list[int], list[int]] | None:
        return surrounding_ids(self._backend)

    @cached_property
    def _special_token_finder(self) -> SpecialTokenFinder | None:
        """None: special tokens of a text are text anyway."""
        if self._backend.encode_special_tokens:
            return None
        return SpecialTokenFinder(list(self.special_tokens.values()))

    @cached_property
    def _marked_encoder(self) -> MarkedEncoder:
        assert self._special_token_finder is not None
        return MarkedEncoder(self._backend, self.special_tokens, self._special_token_finder)

    def _apply_chat_template(self, prompt: ChatPrompt) -> tuple[str, str]:
        if self._templates.source(has_tools=prompt.tools is not None) is None:
            names = self._templates.names
            named = f" by the name {DEFAULT!r}, only {describe(names)}" if names else ""
            raise RequestError(f"This model has no chat template{named}.", remedy="Send a plain prompt.")
        _check_messages(prompt.messages)
        try:
            return self._templates.render(prompt, self._special_token_finder)
        except TemplateError as error:
            raise RequestError(
                f"The model's chat template refuses the messages: {describe(str(error), 400)}.",
                remedy="Send roles in the order that the model expects.",
            ) from error

    def prompt_end(self, prompt_ids: Sequence[int]) -> str:
        """The text of a prompt's last tokens, special ones included: where an answer begins in the middle of a part."""
        text: str = self._backend.decode(list(prompt_ids[-_NUM_END_TOKENS:]), skip_special_tokens=False)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text inside of a longer one, special ones too; bytes that are no whole character show as �."""
        before, text_before = self._context
        text: str = self._backend.decode([*before, token_id], skip_special_tokens=False)
        return text[len(text_before) :]

    def token_bytes(self, token_id: int) -> bytes:
        """One token as UTF-8, and one that is part of a character as the bytes that it stands for."""
        text, piece = self.token_text(token_id), self._backend.id_to_token(token_id) or ""
        if found := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(found[1])
        spelled = _spelled_bytes(piece) if UNDECODABLE in text else None
        return text.encode() if spelled is None else spelled

    @cached_property
    def _context(self) -> tuple[list[int], str]:
        """A token and its text, to be decoded before another: at the beginning of a text decoders drop a space."""
        token_ids = self._backend.encode("a", add_special_tokens=False).ids[:1]
        return token_ids, self._backend.decode(token_ids, skip_special_tokens=False)

    def grammar_vocabulary(self) -> tuple[list[bytes], list[int], Callable[[bytes], list[int]]]:
        """What a grammar must know of the tokens.

        Returns:
            The bytes of each token, which of a special one begin with 0xFF and of an id without a token are none; the
            special ones; and how the tokenizer writes a text.
        """
        backend, is_byte_level = self._backend, self._is_byte_level  # `encode` may refer to the backend alone

        def bytes_of(token_id: int) -> bytes:
            if token_id in self.special_tokens:
                return b"\xff" + self.special_tokens[token_id].encode()
            piece = backend.id_to_token(token_id)
            if piece is None:
                return b""
            spelled = _spelled_bytes(piece) if is_byte_level and token_id not in added else None
            return self.token_bytes(token_id) if spelled is None else spelled

        def encode(text: bytes) -> list[int]:
            ids: list[int] = backend.encode(text.decode(errors="replace"), add_special_tokens=False).ids
            return ids

        added = backend.get_added_tokens_decoder()
        tokens = [bytes_of(token_id) for token_id in range(self.vocab_size)]
        return tokens, sorted(self.special_tokens), encode

    @cached_property
    def texts(self) -> Mapping[int, str | bytes] | None:
        """What `decode` puts together, by token: its text, or bytes where these are no whole characters.

        None: the decoder makes of a token what its neighbours say (SentencePiece); only byte-level ones do not.
        """
        return _Texts(self._backend, self.has_text) if self._is_byte_level else None

    @property
    def _is_byte_level(self) -> bool:
        from tokenizers.decoders import ByteLevel

        return isinstance(self._backend.decoder, ByteLevel)

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` makes anything of a token."""
        return 0 <= token_id < self.vocab_size and bool(self._has_text[token_id])

    def decode(self, token_ids: Sequence[int], *, keeps_special_tokens: bool = False) -> str:
        """The text of token ids; ids beyond the vocabulary give none, nor do special tokens unless they are kept."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=not keeps_special_tokens)
        return text


class _Texts(dict[int, str | bytes]):
    """The text of each token of a byte-level tokenizer, looked up when it is first asked for."""

    def __init__(self, backend: Any, has_text: Callable[[int], bool]) -> None:
        super().__init__()
        self._backend = backend
        self._has_text = has_text

    def __missing__(self, token_id: int) -> str | bytes:
        if not self._has_text(token_id):
            return ""
        piece = self._backend.id_to_token(token_id)
        spelled = _spelled_bytes(piece)
        found = piece.encode() if spelled is None else spelled
        try:
            self[token_id] = text = found.decode()
        except UnicodeDecodeError:
            self[token_id] = found
            return found
        return text


def _spelled_bytes(piece: str) -> bytes | None:
    """What byte-level BPE spells so; None: it is no such spelling."""
    letters = byte_of_letter()
    return bytes(map(letters.__getitem__, piece)) if letters.keys() >= set(piece) else None


def _with_template(parts: Any, chat_template: str | None) -> TokenizerParts:
    return TokenizerParts(
        parts.backend_tokenizer,
        parts.special_tokens_map,
        parts.chat_template if chat_template is None else chat_template,
        getattr(parts, "sorts_tools", False),  # which a tokenizer of transformers does not have
    )


def _check_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text has a lone surrogate at character {error.start}: {describe(text[error.start])}.",
            remedy="Send valid Unicode.",
        ) from None


def _check_length(num_tokens: int, text: str, max_tokens: int) -> None:
    """Raise PromptTooLongError if a text that has at least `num_tokens` has more than `max_tokens`."""
    if num_tokens > max_tokens:
        raise PromptTooLongError(
            f"The prompt of {len(text.encode())} bytes has at least {num_tokens} tokens, and may have {max_tokens}.",
            remedy="Shorten it, or raise inference.max_seq_length or engine.kv_cache_bytes.",
        )


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages is {describe(messages)}.", remedy="Give a list with at least one message.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not set(message) <= _MESSAGE_FIELDS or not _is_message(message):
            raise RequestError(
                f"messages[{index}] is {describe(message)}.",
                remedy=f"Give an object with a role and a content; its fields: {', '.join(sorted(_MESSAGE_FIELDS))}.",
            )


def _is_message(message: Mapping[str, Any]) -> bool:
    if any(not isinstance(message.get(name, ""), str) for name in ("role", "name", "tool_call_id")):
        return False
    if not isinstance(message.get("reasoning_content") or "", str) or "role" not in message:
        return False
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not (isinstance(calls, Sequence) and all(map(_is_tool_call, calls))):
        return False
    if content is None:
        return bool(calls or message.get("reasoning_content"))
    return isinstance(content, str) or (isinstance(content, Sequence) and all(map(_is_text_part, content)))


def _is_tool_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return False
    return isinstance(function.get("arguments"), str | Mapping)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
