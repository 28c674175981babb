"""Text ↔ token ids: the tokenizer, its chat template, and the stream that turns tokens into text as they come.

In: a model folder; strings and chat messages; one token id after another. Out: token ids; text that is safe to show.
Must never know: tensors, requests, HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from amalgam.errors import CheckpointError, RequestError, describe
from amalgam.text_chat import DEFAULT, ChatTemplate
from amalgam.text_files import TOKENIZER_FILES, eos_token_ids, has_tokenizer, read_folder
from amalgam.text_gguf import build_tokenizer
from amalgam.text_parts import TokenizerParts

_MESSAGE_FIELDS = {"role", "content"}
_UNDECODABLE = "\ufffd"
_MAX_HELD_TOKENS = 64


@cache
def _byte_of_letter() -> dict[str, int]:
    """How byte-level BPE spells bytes: printable Latin-1 as itself, the others in order from U+0100 (as GPT-2 did)."""
    as_themselves = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in as_themselves]
    return {chr(byte): byte for byte in as_themselves} | {chr(256 + index): byte for index, byte in enumerate(others)}


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
        self._templates = parts.chat_template or {}
        source = self._templates if isinstance(self._templates, str) else self._templates.get(DEFAULT)
        self._template = ChatTemplate(source, parts.special_tokens_map) if source else None
        self.eos_token_ids = eos_token_ids
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        added = self._backend.get_added_tokens_decoder().items()
        self.special_tokens: Mapping[int, str] = {token_id: token.content for token_id, token in added if token.special}

    @classmethod
    def load(cls, folder: Path, gguf_metadata: Mapping[str, Any] | None = None) -> Tokenizer:
        """Read a folder's tokenizer. Code that the folder brings along or refers to is never run.

        Args:
            folder: a folder, or a GGUF file.
            gguf_metadata: the checkpoint's metadata if it is GGUF; used if the folder has no tokenizer's files.

        Raises:
            CheckpointError: there is none, or its files are damaged.
            UnsupportedError: it does not run on the tokenizers library.
        """
        if not has_tokenizer(folder):
            if gguf_metadata:
                wrapped, ends = build_tokenizer(gguf_metadata, str(folder))
                return cls(wrapped, ends | eos_token_ids(folder))
            raise CheckpointError(
                f"Folder {str(folder)!r} has no tokenizer.",
                remedy=f"Put one of these files there: {', '.join(TOKENIZER_FILES)}.",
            )
        tokenizer = cls(*read_folder(folder))
        if not tokenizer.vocab_size:
            raise CheckpointError(f"The tokenizer in {str(folder)!r} is empty.", remedy="Copy its files again.")
        return tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

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

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the tokens that the tokenizer puts around every text.

        Raises:
            RequestError: the text holds lone surrogates.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, `[{"role": …, "content": …}, …]`, up to where the assistant goes on.

        Raises:
            RequestError: there is no chat template, it refuses the messages, or they are malformed.
        """
        if self._template is None:
            named = f" by the name {DEFAULT!r}, only {describe(sorted(self._templates))}" if self._templates else ""
            raise RequestError(f"This model has no chat template{named}.", remedy="Send a plain prompt.")
        _check_messages(messages)
        try:
            text = self._template.render(messages)
        except Exception as error:  # the template is the model's, so that its mistakes can be of any kind
            raise RequestError(
                f"The model's chat template refuses the messages: {describe(str(error), 400)}.",
                remedy="Send roles in the order that the model expects.",
            ) from error
        return self._encode(text, add_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones too; bytes that are no whole character show as �."""
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """One token as UTF-8, and one that is part of a character as the bytes that it stands for."""
        text, piece = self.token_text(token_id), self._backend.id_to_token(token_id) or ""
        if found := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(found[1])
        letters = _byte_of_letter()
        if _UNDECODABLE in text and all(letter in letters for letter in piece):
            return bytes(letters[letter] for letter in piece)
        return text.encode()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; special tokens and ids beyond the vocabulary give none."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"The text has a lone surrogate at character {error.start}: {describe(text[error.start])}.",
                remedy="Send valid Unicode.",
            ) from None
        # Unlike `encode`, the batch call lets other threads run meanwhile.
        token_ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return token_ids


class TextStream:
    """The text of one request, token by token.

    All that `push` and `finish` return, put together, is `decode` of all tokens, up to the stop string that is complete
    first. Held back are characters whose bytes have not all come, and text that may begin a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._max_stop = max(map(len, self._stop), default=0)
        self._held = ""  # decoded, but may begin a stop string
        # Tokens are decoded after the last ones shown, as decoders treat the first token of a text differently.
        self._window: list[int] = []
        self._num_shown = 0  # tokens of the window
        self._shown = ""  # their text
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; returns new text that is safe to show."""
        if self.is_stopped:
            return ""
        new = self._detokenize(token_id)
        return self._release(new, is_last=False) if self._stop else new

    def finish(self) -> str:
        """No token follows; returns what was held back."""
        if self.is_stopped:
            return ""
        return self._release(self._tokenizer.decode(self._window)[len(self._shown) :], is_last=True)

    def _detokenize(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        num_held = len(self._window) - self._num_shown
        # No character has so many bytes: this is noise, and to wait on would make each token dearer than the last.
        is_noise = num_held > _MAX_HELD_TOKENS
        new = text[len(self._shown) :]
        if not new or (text.endswith(_UNDECODABLE) and not is_noise):
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._tokenizer.decode(self._window)
        return new

    def _release(self, new: str, *, is_last: bool) -> str:
        text = self._held + new
        found = [position for position in map(text.find, self._stop) if position >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        num_held = 0 if is_last else self._num_chars_of_begun_stop(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def _num_chars_of_begun_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._max_stop - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages is {describe(messages)}.", remedy="Give a list with at least one message.")
    for index, message in enumerate(messages):
        is_complete = isinstance(message, Mapping) and set(message) == _MESSAGE_FIELDS
        if not is_complete or not all(isinstance(value, str) for value in message.values()):
            raise RequestError(
                f"messages[{index}] is {describe(message)}.",
                remedy="Give an object with a role and a content, both strings, and nothing else.",
            )
