"""How much goes, as people say it: `25%`, `0.25`, `4`; of single weights also `2:4`. Must never know: models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from amalgam.errors import ConfigError, describe

_AMOUNT = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)(%?)")
_PATTERN = re.compile(r"(\d{1,3}):(\d{1,3})")


@dataclass(frozen=True)
class Amount:
    """A share of something, or a number of them.

    Attributes:
        share: above 0 and below 1; None: `count` says it.
        text: as it was given.
    """

    text: str
    share: Fraction | None = None
    count: int = 0

    def of(self, total: int) -> int:
        """How many of so many; a share is rounded to the nearest number."""
        return self.count if self.share is None else round(self.share * total)


@dataclass(frozen=True)
class Sparsity:
    """How many weights become zero.

    Attributes:
        share: of all of them.
        pattern: (n, m): of m neighbours along the inputs, n remain; None: anywhere.
    """

    text: str
    share: Fraction
    pattern: tuple[int, int] | None = None


def parse_amount(flag: str, text: str) -> Amount:
    """
    Raises:
        ConfigError: it is no share and no number.
    """
    found = _AMOUNT.fullmatch(text.strip())
    if found is not None:
        value = Fraction(found[1])
        if not found[2] and value.denominator == 1 and "." not in found[1] and value >= 1:
            return Amount(text, count=int(value))
        share = value / 100 if found[2] else value
        if 0 < share < 1:
            return Amount(text, share=share)
    raise ConfigError(f"{flag} is {describe(text)}.", remedy="Expected a share such as 25% or 0.25, or a number: 4.")


def parse_sparsity(flag: str, text: str) -> Sparsity:
    """
    Raises:
        ConfigError: it is no share and no pattern.
    """
    found = _PATTERN.fullmatch(text.strip())
    if found is None:
        amount = parse_amount(flag, text)
        if amount.share is None:
            raise ConfigError(f"{flag} is {describe(text)}.", remedy="Expected a share such as 50%, or 2:4.")
        return Sparsity(text, amount.share)
    kept, of = int(found[1]), int(found[2])
    if not 0 < kept < of:
        raise ConfigError(f"{flag} is {describe(text)}.", remedy="Of the second number of weights, the first remain.")
    return Sparsity(text, 1 - Fraction(kept, of), (kept, of))
