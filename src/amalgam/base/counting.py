"""Numbers of things, as sentences have them."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 weight`, `1,234 weights`.

    Args:
        plural: of a noun that does not take an s.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
