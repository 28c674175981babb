"""Tables, progress bars and sizes for people, and the same as plain lines where nobody looks at a terminal.

Results go to stdout; what accompanies them to stderr, so that a pipe sees results only. Nothing that comes from a
model, a checkpoint or a user is ever taken for markup, and in a pipe nothing is cut or wrapped.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import orjson
from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from amalgam.base.escaping import harmless, one_line

if TYPE_CHECKING:
    from amalgam.composition.progress import Progress as ProgressCallback

_UNLIMITED = 1_000_000
_MAX_NAMED = 3
_FIGURE = re.compile(r"\W*\d[\d.,:×–-]*\W*[^\W\d]{0,3}\W*")  # with a sign, brackets or a unit
_FOLDED = 10  # cells in which a long word can still be read
_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}  # which JSON need not escape, and terminals obey


class _Console(Console):
    """As wide as the terminal; where there is none, as wide as the text."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    @property
    def size(self) -> ConsoleDimensions:
        return super().size if is_terminal(self.file) else ConsoleDimensions(_UNLIMITED, super().size.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        raise AttributeError


out = _Console()
err = _Console(stderr=True)


def is_terminal(stream: IO[str]) -> bool:
    """Whether a person reads what is written to the stream."""
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


@contextlib.contextmanager
def progress_bar(unit: str = "bytes") -> Iterator[ProgressCallback]:
    """A callback for long work, shown as bars on stderr; silent where that is no terminal.

    Args:
        unit: what is counted; anything but bytes is shown as a plain number.
    """
    amounts: tuple[ProgressColumn, ...] = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *(amounts if unit == "bytes" else (MofNCompleteColumn(),)),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not is_terminal(sys.stderr)) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Long work that keeps what is done of it: who interrupts it is told so."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("The same command goes on with what is done.") from None


def write(text: str) -> None:
    """Text of a model, on stdout at once: as it is, but a terminal gets no controls that could steer it."""
    sys.stdout.write(harmless(text) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()


def say(text: str) -> None:
    """A line on stdout."""
    out.print(Text(harmless(text)), soft_wrap=True)


def note(text: str) -> None:
    """A line on stderr that accompanies results."""
    err.print(Text(harmless(text), "dim"))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", num_totals: int = 0) -> None:
    """A table; where stdout is no terminal, a line for each row, with tabs between its cells.

    Words are folded where there is little room, figures never are: the parts would read as other figures. Where there
    is not even room for those, each cell has a line of its own.

    Args:
        columns: their names; none for rows that speak for themselves.
        num_totals: rows at the end that sum the others up.
    """
    lines = [[one_line(cell) for cell in row] for row in rows]
    if not is_terminal(sys.stdout):
        head = [[one_line(title)]] * bool(title) + [list(columns)] * bool(columns)
        sys.stdout.write("".join("\t".join(line) + "\n" for line in [*head, *lines]))
        return
    names = columns or [""] * max(map(len, lines), default=0)
    around = 3 * len(names) + 1 if columns else 2 * len(names)  # padding, and lines between columns
    widths = _column_widths([names, *lines], out.width - around)
    if widths is None:
        _print_cells(names, lines, title)
        return
    table = Table(title=Text(one_line(title)) if title else None) if columns else Table.grid(padding=(0, 2))
    for name, width in zip(names, widths, strict=True):
        table.add_column(name, overflow="fold", width=width)
    for index, line in enumerate(lines):
        if num_totals and index == len(lines) - num_totals:
            table.add_section()
        table.add_row(*line)
    out.print(table)


def _column_widths(lines: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """How wide columns are that share `room`; None: it is too little for their figures."""
    columns = list(zip(*lines, strict=True))
    wanted = [max(map(cell_len, column)) for column in columns]
    widths = [max((_least_width(word) for cell in column for word in cell.split()), default=0) for column in columns]
    spare = room - sum(widths)
    if spare < 0:
        return None
    for _ in range(min(spare, sum(wanted) - sum(widths))):
        narrowest = min((index for index, width in enumerate(widths) if width < wanted[index]), key=widths.__getitem__)
        widths[narrowest] += 1
    return widths


def _least_width(word: str) -> int:
    return cell_len(word) if _FIGURE.fullmatch(word) else min(cell_len(word), _FOLDED)


def _print_cells(names: Sequence[str], lines: Sequence[Sequence[str]], title: str) -> None:
    if title:
        say(one_line(title))
    for index, line in enumerate(lines):
        if index:
            say("")
        for name, cell in zip(names, line, strict=True):
            if cell:
                say(f"{name}: {cell}" if name else cell)


_STATUS_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def print_statuses(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> None:
    """A table whose first column is a status, in its colour; as `print_table` where stdout is no terminal."""
    if not is_terminal(sys.stdout):
        print_table(columns, rows, title)
        return
    table = Table(title=Text(one_line(title), "bold"), title_justify="left", expand=True, show_lines=False)
    for name, ratio in zip(columns, (None, 3, 8, 4), strict=True):
        table.add_column(name, overflow="fold", ratio=ratio)
    for status, *cells in rows:
        style = _STATUS_STYLES[status]
        table.add_row(Text(status, style), *(Text(one_line(cell), "dim" if status == "skip" else "") for cell in cells))
    out.print(table)


def print_json(value: Any, *, is_indented: bool = True) -> None:
    """One JSON document on stdout, also where its encoding or the strings are not Unicode."""
    option = orjson.OPT_NON_STR_KEYS | (orjson.OPT_INDENT_2 if is_indented else 0)
    try:
        text = orjson.dumps(value, option=option).decode()
        text.encode(sys.stdout.encoding or "utf-8")
    except (TypeError, UnicodeEncodeError):  # lone surrogates, such as in paths that are not UTF-8; or the encoding
        text = json.dumps(value, indent=2 if is_indented else None, default=str)
    sys.stdout.write(text.translate(_CONTROLS) + "\n")


def arrow(before: str, after: str) -> str:
    """`base → fp8`, or once what did not change."""
    return before if before == after else f"{before} → {after}"


def with_device(source: str, before: str | None, after: str | None) -> str:
    """What is said of a source, with the devices that weights lie on; None: the one that the model runs on."""
    if before is after is None:
        return source
    return f"{source}, {arrow(before or 'the model’s device', after or 'the model’s device')}"


def named(names: Sequence[str], count: int) -> str:
    """The first few of `count` names."""
    return ", ".join(names[:_MAX_NAMED]) + (", …" if count > _MAX_NAMED else "")


def interval(value: Any, form: str) -> str:
    """An estimate with the bounds of its confidence interval, where it has any: `0.0081 (0.0078 to 0.0085)`."""
    if value is None:
        return "–"
    text = form.format(value.value)
    return text if value.low is None else f"{text} ({form.format(value.low)} to {form.format(value.high)})"
