"""Bytes as people read them.

In: a number of bytes. Out: a short text in binary units.
"""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """1234567 → `1.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
