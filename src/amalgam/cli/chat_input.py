"""What a person types into `amalgam chat`: messages, one at a time.

In: a terminal, with line editing and history; or any other input, line by line. Out: text. What cannot be read is an
`InputError` for one message, and the next can be read. Must never know: models, commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from amalgam.cli.console import is_terminal
from amalgam.errors import AmalgamError

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "> "
MAX_LINE_BYTES = 4 * 2**20
MAX_HISTORY_BYTES = 2**20
_CONTINUATION = "\\"


class InputError(AmalgamError):
    """One message cannot be read; the next may be."""


class Input(Protocol):
    is_interactive: bool
    """Whether a person types, whom an interrupt may be for something else than to end."""

    def read(self) -> str | None:
        """The next message; None at the end.

        Raises:
            InputError: it cannot be read.
            KeyboardInterrupt: Ctrl-C.
        """


def open_input(history_file: Path | None) -> Input:
    """A terminal with editing, where both ends are one; otherwise plain lines.

    Args:
        history_file: keeps what was typed; None: nothing is kept. Of use to a terminal only.
    """
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        return _Terminal(history_file)
    return _Lines()


class _Lines:
    """Lines of UTF-8; one that ends in a backslash goes on in the next."""

    def __init__(self) -> None:
        self.is_interactive = is_terminal(sys.stdin)
        self._number = 0

    def read(self) -> str | None:
        parts: list[str] = []
        while True:
            if self.is_interactive:
                sys.stderr.write(PROMPT)
                sys.stderr.flush()
            line = self._line()
            if line is None:
                return "\n".join(parts) if parts else None
            parts.append(line.removesuffix(_CONTINUATION))
            if not line.endswith(_CONTINUATION):
                return "\n".join(parts)

    def _line(self) -> str | None:
        stream = sys.stdin.buffer
        data = stream.readline(MAX_LINE_BYTES + 1)
        if not data:
            return None
        self._number += 1
        if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
            while (more := stream.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                pass
            raise InputError(
                f"Line {self._number} has more than {MAX_LINE_BYTES} bytes and is left out.", remedy="Send less."
            )
        try:
            return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"Line {self._number} is not UTF-8 (byte {error.start + 1}) and is left out.",
                remedy="Convert it, for instance with iconv.",
            ) from None


class _Terminal:
    """Lines that can be edited; Enter sends, and Alt-Enter, a backslash before Enter, and a paste give several."""

    def __init__(self, history_file: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.output import create_output
        from prompt_toolkit.output.vt100 import Vt100_Output

        self.is_interactive = True
        history = InMemoryHistory() if history_file is None else private_history(history_file)
        output = create_output(sys.stdout)
        if isinstance(output, Vt100_Output):
            # Where the cursor is matters to menus only, and terminals that do not tell would get a warning.
            output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=" " * len(PROMPT),
            history=history,
            key_bindings=self._bindings(),
            enable_history_search=True,
            output=output,
        )

    def read(self) -> str | None:
        try:
            text = self._session.prompt()
        except EOFError:
            return None
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                "The message is not UTF-8 and is left out.", remedy="Check the terminal's encoding."
            ) from None
        return text

    def _bindings(self) -> KeyBindings:
        from prompt_toolkit.key_binding import KeyBindings

        bindings = KeyBindings()

        @bindings.add("enter")
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.is_cursor_at_the_end and buffer.text.endswith(_CONTINUATION):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @bindings.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add("c-c")
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt)

        return bindings


def private_history(file: Path) -> History:
    from prompt_toolkit.history import History

    class PrivateHistory(History):
        """JSON strings, a line each, in a file of the user's own. One that cannot be kept stops nothing."""

        def load_history_strings(self) -> Iterator[str]:
            with contextlib.suppress(OSError), file.open("rb") as stream:
                stream.seek(max(0, os.fstat(stream.fileno()).st_size - MAX_HISTORY_BYTES))
                for line in reversed(stream.read().splitlines()):  # the newest comes first
                    with contextlib.suppress(ValueError):
                        if isinstance(text := json.loads(line), str):
                            yield text

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(json.dumps(string).encode() + b"\n")

    return PrivateHistory()
