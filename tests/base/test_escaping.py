"""Foreign text can neither steer a terminal nor forge a line of a log."""

from __future__ import annotations

import pytest

from amalgam.base.escaping import harmless, one_line

CONTROLS = [chr(code) for code in (*range(32), *range(0x7F, 0xA0))]


@pytest.mark.parametrize("text", ["plain text", "月 ä 🎉", ":smile: [red]b[/red] %s {x}", "C:\\new", ""])
def test_text_that_does_no_harm_stays_as_it_is(text: str) -> None:
    assert one_line(text) == harmless(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\rb\x7f", r"a\rb\x7f"),
    ],
)
def test_sequences_that_steer_a_terminal_are_shown(text: str, shown: str) -> None:
    assert one_line(text) == harmless(text) == shown


def test_every_control_is_escaped_but_ends_of_lines_and_tabs() -> None:
    assert all(one_line(control).isprintable() for control in CONTROLS)
    assert [control for control in CONTROLS if harmless(control) == control] == ["\t", "\n"]


def test_a_line_stays_one_line() -> None:
    assert one_line("a\nb\u2028c\u202ed\ud800") == r"a\nb\u2028c\u202ed\ud800"
    assert harmless("a\nb\tc") == "a\nb\tc"
