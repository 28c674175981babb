"""Foreign text on terminals and in logs.

In: text of a model, a checkpoint, a client. Out: the same, where a control character can do no harm: it appears as its
escape sequence, `\\x1b`.
"""

from __future__ import annotations


def one_line(text: str) -> str:
    """`text` with everything escaped that could end a line or steer a terminal."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def harmless(text: str) -> str:
    """`text` with everything escaped that could steer a terminal, but for ends of lines and tabs."""
    return "".join(
        _escape(letter) if (letter < " " and letter not in "\n\t") or "\x7f" <= letter <= "\x9f" else letter
        for letter in text
    )


def without_password(place: str) -> str:
    """A file's name, or an address as others may read it."""
    scheme, separator, rest = place.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if separator else place


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
