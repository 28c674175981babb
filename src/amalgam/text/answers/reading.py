"""Text that comes in pieces, read as if it lay there whole.

In: pieces of text. Out: what stands before a mark, JSON values. Must never know: what it means.

Readers are generators that pause where more text is needed, so that a format is written down as it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from amalgam.text.stream import num_chars_begun

T = TypeVar("T")
Waiting = Generator[None, None, T]
Emit = Callable[[str], None]

_PAIRS = {"}": "{", "]": "["}
_SCALAR_ENDS = frozenset(" \t\r\n,]}<")


class Reader:
    """What has come and has not been read yet."""

    def __init__(self) -> None:
        self.text = ""
        self.is_ended = False
        self._read: list[str] | None = None

    def add(self, text: str) -> None:
        self.text += text

    def end(self) -> None:
        self.is_ended = True

    def more(self) -> Waiting[bool]:
        """Wait for more text; False: there is none."""
        length = len(self.text)
        while len(self.text) == length and not self.is_ended:
            yield
        return len(self.text) > length

    def take(self, num_chars: int) -> str:
        taken, self.text = self.text[:num_chars], self.text[num_chars:]
        if self._read is not None:
            self._read.append(taken)
        return taken

    def put_back(self, text: str) -> None:
        self.text = text + self.text
        if self._read is not None:
            self._read = ["".join(self._read).removesuffix(text)]

    def remember(self) -> None:
        """From here on, `forget` gives what has been read."""
        self._read = []

    def forget(self) -> str:
        read, self._read = "".join(self._read or ()), None
        return read

    def until(self, marks: Sequence[str], emit: Emit) -> Waiting[str | None]:
        """Give the text before the first of the marks, as it comes, to `emit`; returns the mark, None if none comes."""
        while True:
            found = [(place, -len(mark), mark) for mark in marks if (place := self.text.find(mark)) >= 0]
            begun = len(self.text) - (0 if self.is_ended else num_chars_begun(self.text, marks))
            if found and min(found)[0] < begun:
                place, _, mark = min(found)
                emit(self.take(place))
                self.take(len(mark))
                return mark
            if not found:
                emit(self.take(begun))
            if not (yield from self.more()) and not found:
                emit(self.take(len(self.text)))
                return None

    def spaces(self) -> Waiting[str]:
        """Read spaces and lines up to something else."""
        spaces = ""
        while True:
            rest = self.text.lstrip()
            spaces += self.take(len(self.text) - len(rest))
            if rest or not (yield from self.more()):
                return spaces

    def accept(self, *words: str) -> Waiting[str | None]:
        """Read one of the words if it comes next; the longest of those that fit."""
        while True:
            fitting = [word for word in words if self.text.startswith(word)]
            is_open = any(word.startswith(self.text) and len(word) > len(self.text) for word in words)
            if (not is_open or self.is_ended) or not (yield from self.more()):
                if not fitting:
                    return None
                return self.take(len(max(fitting, key=len)))

    def json_value(self, emit: Emit) -> Waiting[bool]:
        """Read a JSON value, whose pieces go to `emit` as they come; False: it is broken here, or never ends.

        Brackets and strings are checked, and nothing else.
        """
        if not self.text and not (yield from self.more()):
            return False
        stack: list[str] = []
        in_string = is_escaped = False
        is_scalar, num_read = self.text[0] not in '{["', 0
        while True:
            for index, char in enumerate(self.text):
                if is_scalar:
                    if char in _SCALAR_ENDS:
                        emit(self.take(index))
                        return num_read + index > 0
                    continue
                if in_string:
                    if is_escaped:
                        is_escaped = False
                    elif char == "\\":
                        is_escaped = True
                    elif char == '"':
                        in_string = False
                elif char == '"':
                    in_string = True
                elif char in "{[":
                    stack.append(char)
                elif char in "}]" and (not stack or stack.pop() != _PAIRS[char]):
                    emit(self.take(index))
                    return False
                if not stack and not in_string:
                    emit(self.take(index + 1))
                    return True
            num_read += len(self.text)
            emit(self.take(len(self.text)))
            if not (yield from self.more()):
                return is_scalar
