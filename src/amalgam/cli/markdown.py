"""Markdown on a terminal, as it comes: what is finished stands as it is, below it what is still being written.

In: pieces of a model's answer. Out: the same, laid out. No character of it is lost, and none steers the terminal: HTML
is text, links show where they lead, ends of lines stay. Must never know: models, conversations.
"""

from __future__ import annotations

import io
from itertools import chain, pairwise
from typing import Self

from markdown_it import MarkdownIt
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from amalgam.base.escaping import harmless

_REFRESHES_PER_SECOND = 10
_MARGIN_LINES = 2  # of the screen, that a block which grows leaves free


class MarkdownWriter:
    """Writes one answer. A context: what has come is written when it is left, however it is left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # A picture is then a link, which shows where it leads, and a definition of a link is text.
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
        self._parser.disable(["image", "reference"])
        self._live = Live(
            console=console,
            transient=True,
            refresh_per_second=_REFRESHES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._pending = ""  # the last block so far: what follows may belong to it
        self._has_written = False

    def write(self, text: str) -> None:
        """More of the answer."""
        self._pending += harmless(text)
        *finished, self._pending = self._blocks()
        for block in finished:
            self._print(block)
        self._live.update(self._last_lines())

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update(Text())
        self._live.stop()
        for block in self._blocks():
            self._print(block)
        self._pending = ""

    def _blocks(self) -> list[str]:
        """What is being written, cut where paragraphs, lists, tables and so on begin."""
        lines = list(io.StringIO(self._pending, newline="\n"))  # the parser knows no other end of a line
        starts = [token.map[0] for token in self._parser.parse(self._pending) if not token.level and token.map]
        borders = [0, *sorted(set(starts[1:])), len(lines)]
        return ["".join(lines[start:end]) for start, end in pairwise(borders)]

    def _last_lines(self) -> Text:
        """As much of what is being written as the screen holds."""
        text = Text(self._pending.strip("\n"))
        room = max(1, self._console.height - _MARGIN_LINES)
        lines = text.wrap(self._console, self._console.width)
        return Text("\n").join(lines[-room:])

    def _print(self, text: str) -> None:
        if not text.strip():
            return
        if self._has_written:
            self._console.print()
        self._has_written = True
        rendered = Markdown("", code_theme="ansi_dark", hyperlinks=False)
        rendered.parsed = self._parser.parse(text)
        for token in chain.from_iterable((token, *(token.children or ())) for token in rendered.parsed):
            token.content = harmless(token.content)  # %1B in an address is an escape once more
            if token.type == "softbreak":  # a line of verse is one
                token.type = "hardbreak"
            elif title := token.attrs.get("title"):
                token.attrs["href"] = harmless(f'{token.attrs["href"]} "{title}"')
        self._console.print(rendered)
