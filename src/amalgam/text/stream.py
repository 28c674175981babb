"""The text of one answer, token by token: detokenized as tokens come, up to a stop string.

In: one token id after another. Out: text that is safe to show. Must never know: requests, tensors, HTTP.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from itertools import compress

from amalgam.text.tokenizer import UNDECODABLE, Tokenizer

_MAX_HELD_TOKENS = 64
_MAX_BYTES_OF_CHARACTER = _MAX_TOKENS_OF_CHARACTER = 4  # UTF-8, and a token for each byte
_NUM_CONTEXT_TOKENS = 8


class TextStream:
    """The text of one answer.

    All that `push` and `finish` return, put together, is `decode` of prompt and answer without that of the prompt, up
    to the stop string that is complete first. Held back are characters whose bytes have not all come, and text that
    may begin a stop string.

    Args:
        stop: texts to stop before. Special tokens have no text to be shown; but a stop string that contains the text
            of one (`tokenizer.special_tokens`) finds it as if it had.
        prompt_ids: what the answer continues. Without, it is a text of its own: where the tokenizer puts a space
            before every text, a first one is not shown.
        min_tokens: the text of so many tokens is shown whatever it holds; stop strings are looked for behind it.
        keeps_special_tokens: show them as text, but for the one that ends the answer.

    Attributes:
        push: adds a token; returns new text that is safe to show.
    """

    __slots__ = ("_detokenizer", "_keeps_special_tokens", "_num_unstoppable", "_special_tokens", "_stops", "push")

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt_ids: Sequence[int] = (),
        min_tokens: int = 0,
        *,
        keeps_special_tokens: bool = False,
    ) -> None:
        self._special_tokens = tokenizer.special_tokens
        self._num_unstoppable = min_tokens  # tokens that are still to come
        texts = tokenizer.texts
        self._detokenizer = (
            _WindowDetokenizer(tokenizer, prompt_ids) if texts is None else _ByteDetokenizer(texts, prompt_ids)
        )
        self._stops = _StopStrings(stop, {} if keeps_special_tokens else tokenizer.special_tokens) if stop else None
        self._keeps_special_tokens = keeps_special_tokens
        # Bound once: it is called for every token of every answer.
        unstopped = self._text_of if keeps_special_tokens else self._detokenizer.push
        self.push: Callable[[int], str] = unstopped if self._stops is None else self._push

    @property
    def is_stopped(self) -> bool:
        return self._stops is not None and self._stops.is_found

    @property
    def stop_string(self) -> str | None:
        """The one that was found."""
        return None if self._stops is None else self._stops.found

    def _push(self, token_id: int) -> str:
        assert self._stops is not None
        if self._num_unstoppable > 0:
            self._num_unstoppable -= 1
            return self._text_of(token_id)
        if self._stops.is_found:
            return ""
        name = None if self._keeps_special_tokens else self._special_tokens.get(token_id)
        if name is None:
            return self._stops.push(self._text_of(token_id))
        return self._stops.push_special(name, self._detokenizer.unfinished)

    def _text_of(self, token_id: int) -> str:
        if self._keeps_special_tokens and (name := self._special_tokens.get(token_id)) is not None:
            return self._detokenizer.finish_part() + name
        return self._detokenizer.push(token_id)

    def finish(self, end_id: int | None = None) -> str:
        """No token follows; returns what was held back.

        Args:
            end_id: the token that ends the answer. It is not shown, but may complete a stop string.
        """
        if self._stops is None:
            return self._detokenizer.unfinished()
        shown = ""
        if end_id is not None and end_id in self._special_tokens and not self._keeps_special_tokens:
            shown = self.push(end_id)
        return shown if self._stops.is_found else shown + self._stops.finish(self._detokenizer.unfinished())


class _ByteDetokenizer:
    """Tokens → text as they come, whole characters at a time, where each token is the same bytes wherever it stands."""

    __slots__ = ("_begun", "_has_prompt_begun", "_texts")

    def __init__(self, texts: Mapping[int, str | bytes], prompt_ids: Sequence[int]) -> None:
        self._texts = texts
        self._begun = b""  # of a character that is not whole yet
        self._has_prompt_begun = False  # it; without an end, what replaces it is the prompt's text
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = _encoded(texts[token_id]) + tail
            if len(tail) >= _MAX_BYTES_OF_CHARACTER:
                break
        self._join(tail)
        self._has_prompt_begun = bool(self._begun)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that has become whole."""
        text = self._texts[token_id]
        return text if isinstance(text, str) and not self._begun else self._join(_encoded(text))

    def unfinished(self) -> str:
        """What is left of the text if no token follows."""
        return "" if self._has_prompt_begun else self._begun.decode(errors="replace")

    def finish_part(self) -> str:
        """What is left of the text before something else than text."""
        text = self.unfinished()
        self._begun, self._has_prompt_begun = b"", False
        return text

    def _join(self, new: bytes) -> str:
        text, num_read = utf_8_decode(self._begun + new, "replace", False)
        self._begun = (self._begun + new)[num_read:]
        if text and self._has_prompt_begun:
            self._has_prompt_begun = False
            return text.removeprefix(UNDECODABLE)
        return text


def _encoded(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


class _WindowDetokenizer:
    """Tokens → text as they come, whole characters at a time, where a token's text depends on its neighbours.

    Tokens are decoded after the last ones shown, as decoders treat the first token of a text differently. Of the
    window, `num_shown` tokens have their text in `shown`, and all of them that came from the prompt.
    """

    __slots__ = ("_num_shown", "_shown", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window, self._num_shown = _context(tokenizer, prompt_ids)
        self._shown = tokenizer.decode(self._window) if self._window else ""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that has become whole."""
        if not self._tokenizer.has_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        num_held = len(self._window) - self._num_shown
        # No character has so many bytes: this is noise, and to wait on would make each token dearer than the last.
        is_noise = num_held > _MAX_HELD_TOKENS
        new = self._after_shown(text)
        if (not new or text.endswith(UNDECODABLE)) and not is_noise:
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._tokenizer.decode(self._window)
        return new

    def unfinished(self) -> str:
        """What is left of the text if no token follows."""
        return self._after_shown(self._tokenizer.decode(self._window))

    def finish_part(self) -> str:
        """What is left of the text before something else than text."""
        text = self.unfinished()
        self._num_shown = len(self._window)
        self._shown = self._tokenizer.decode(self._window)
        return text

    def _after_shown(self, text: str) -> str:
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # Bytes that could not be read have become characters.
        return self._tokenizer.decode(self._window[self._num_shown :])


class _StopStrings:
    """Looks for stop strings in text as it comes.

    Plain ones are looked for in the text that is shown; those that contain a special token's text, in the text that
    has these too.
    """

    def __init__(self, stop: Sequence[str], special_tokens: Mapping[int, str]) -> None:
        texts = [text for text in special_tokens.values() if text]
        self._named = tuple(string for string in stop if any(text in string for text in texts))
        self._plain = tuple(string for string in stop if string not in self._named)
        self._held = ""  # may begin a stop string
        self._is_shown: list[bool] = []  # of each character of it, or empty if all are
        self.found: str | None = None

    @property
    def is_found(self) -> bool:
        return self.found is not None

    def push(self, new: str) -> str:
        """More text; returns what is safe to show."""
        if not new:
            return ""
        self._add(new, is_shown=True)
        return self._show_if_found() or self._release()

    def push_special(self, name: str, unfinished: Callable[[], str]) -> str:
        """A special token; `unfinished` gives text that is shown before it if nothing comes any more."""
        if not self._named:
            return ""
        held, is_shown = self._held, self._is_shown[:]
        if text := unfinished():
            self._add(text, is_shown=True)
        self._add(name, is_shown=False)
        shown = self._show_if_found()
        if self.is_found or not text:
            return shown or self._release()
        self._held, self._is_shown = held, is_shown
        self._add(name, is_shown=False)
        return self._release()

    def finish(self, new: str) -> str:
        """The last text; returns all that is to be shown."""
        self._add(new, is_shown=True)
        shown = self._show_if_found()
        return shown if self.is_found else self._visible(len(self._held))

    def _add(self, text: str, *, is_shown: bool) -> None:
        if self._is_shown or not is_shown:
            self._is_shown += [True] * (len(self._held) - len(self._is_shown)) + [is_shown] * len(text)
        self._held += text

    def _visible(self, end: int) -> str:
        """What is shown of the first `end` characters."""
        return "".join(compress(self._held[:end], self._is_shown)) if self._is_shown else self._held[:end]

    def _show_if_found(self) -> str:
        visible = self._visible(len(self._held))
        ends = [(place, string) for string in self._plain if (place := visible.find(string)) >= 0]
        named = [(place, string) for string in self._named if (place := self._held.find(string)) >= 0]
        ends += [(len(self._visible(place)), string) for place, string in named]
        if not ends:
            return ""
        end, self.found = min(ends)
        return visible[:end]

    def _release(self) -> str:
        if self.is_found:
            return ""
        if not self._is_shown and not self._named:  # the usual case
            split = len(self._held) - num_chars_begun(self._held, self._plain)
            safe, self._held = self._held[:split], self._held[split:]
            return safe
        # No stop string begins before `split`, unless it is a plain one, which sees nothing that is not shown.
        split = len(self._held) - num_chars_begun(self._held, self._named)
        before, visible = self._visible(split), self._visible(len(self._held))
        num_safe = min(len(before), len(visible) - num_chars_begun(visible, self._plain))
        self._is_shown = [True] * (len(before) - num_safe) + self._is_shown[split:] if self._is_shown else []
        self._held = before[num_safe:] + self._held[split:]
        if all(self._is_shown):
            self._is_shown = []
        return before[:num_safe]


def num_chars_begun(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of the strings and is not all of it."""
    longest = max(map(len, strings), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        end = text[-length:]
        for string in strings:
            if string.startswith(end):
                return length
    return 0


def _context(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> tuple[list[int], int]:
    """The prompt's last tokens that have text: enough of them that what follows is decoded as after the whole.

    Returns:
        The tokens, and how many of them there are before a character that the prompt begins and does not end.
    """
    found: list[int] = []
    for token_id in reversed(prompt_ids):
        if tokenizer.has_text(token_id):
            found.append(token_id)
            if len(found) == _NUM_CONTEXT_TOKENS + _MAX_TOKENS_OF_CHARACTER - 1:
                break
    found.reverse()
    # Bytes in a row are decoded together, so that one lone byte at either end can spoil the text of all.
    for end in range(len(found), max(-1, len(found) - _MAX_TOKENS_OF_CHARACTER), -1):
        for start in range(max(0, len(found) - _NUM_CONTEXT_TOKENS), -1, -1):
            text = tokenizer.decode(found[start:end])
            if not text.startswith(UNDECODABLE) and not text.endswith(UNDECODABLE):
                return found[start:], end - start
    return found, len(found)
