"""Memory that a model could lie in: how much of it there is, and how fast it is read.

In: text of a user, or the table of known cards. Out: `Card`. Must never know: torch, models, which cards are here.

    24GB              so much memory; how fast it is read is not said
    24GB@1008GB/s     and read so fast
    rtx-4090          a card of the table, with its published figures
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amalgam.config.devices import size_in_bytes
from amalgam.config.text import read_yaml
from amalgam.errors import ConfigError, describe

TABLE = Path(__file__).with_name("cards.yaml")
_RATE = re.compile(r"(.+)/s")


@dataclass(frozen=True)
class Card:
    """Attributes:
    name: as it was asked for.
    memory_bytes: all of it.
    bandwidth: bytes a second that can be read of it; None: not known.
    host_bandwidth: bytes a second, one way, between it and the processors' memory; None: not known.
    contains: part of the name that PyTorch has for it.
    source: where the figures are from.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    host_bandwidth: float | None = None
    contains: str = ""
    source: str = "as given"


@functools.cache
def known_cards() -> dict[str, Card]:
    """Name → card, of the table."""
    return {name: _card_of(name, row) for name, row in read_yaml(TABLE).items()}


def _card_of(name: str, row: dict[str, Any]) -> Card:
    return Card(
        name,
        size_in_bytes(row["memory"]),
        rate_of(row["bandwidth"]),
        rate_of(row["host"]),
        row["contains"],
        row["source"],
    )


def card_named(name: str) -> Card | None:
    """The row of the table for what PyTorch calls a card; None: the table has none."""
    return next((card for card in known_cards().values() if card.contains in name), None)


def rate_of(text: str) -> float:
    """`1008GB/s` in bytes a second.

    Raises:
        ValueError: it is none.
    """
    found = _RATE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"bandwidth is {text[:80]!r}. Expected for instance 1008GB/s")
    return float(size_in_bytes(found[1]))


def parse_card(text: str, what: str) -> Card:
    """
    Args:
        what: the option that it comes from, for people.

    Raises:
        ConfigError: it is neither a size nor a known card.
    """
    wanted = text.strip()
    if wanted.lower() in known_cards():
        return known_cards()[wanted.lower()]
    size, at, rate = wanted.partition("@")
    try:
        return Card(wanted, size_in_bytes(size), rate_of(rate) if at else None)
    except ValueError:
        raise ConfigError(
            f"{what} is {describe(text)}.",
            remedy=f"Expected 24GB, 24GB@1008GB/s or one of {', '.join(known_cards())}.",
        ) from None
