r"""Personal data and secrets: how they look, and how the real ones are told from other numbers.

In: nothing. Out: for each kind, regular expressions and what checks a match. Numbers may be full-width, as they are
compared folded.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

Personal = Literal["email", "phone", "id_card", "bank_card", "ip", "api_key"]
KINDS: tuple[Personal, ...] = get_args(Personal)


class Look(NamedTuple):
    """How one kind of data is written."""

    pattern: str
    check: Callable[[str], bool] | None = None


def _digits(text: str) -> str:
    return "".join(char for char in text if char.isdigit())


def has_luhn(text: str) -> bool:
    """Whether a card's number has its check digit (ISO/IEC 7812-1, annex B), and begins as cards do."""
    digits = [int(digit) for digit in _digits(text)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return digits[0] in (2, 3, 4, 5, 6) and len(set(digits)) > 1 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def has_id_check(text: str) -> bool:
    """Whether the number of a Chinese identity card has its check character (GB 11643, ISO 7064 MOD 11-2)."""
    weights = [pow(2, 17 - place, 11) for place in range(17)]
    total = sum(weight * int(digit) for weight, digit in zip(weights, text[:17], strict=True))
    return "10X98765432"[total % 11] == text[17].upper()


def is_address(text: str) -> bool:
    """Whether it is an IP address, and not a time or a scope of C++."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.version == 4 or (any(char.isdigit() for char in text) and len(text) > 4)


def is_international(text: str) -> bool:
    """A number with its country's code has up to 15 digits (ITU-T E.164)."""
    return 8 <= len(_digits(text)) <= 15


_HEX = "[0-9A-Fa-f]"
LOOKS: dict[Personal, tuple[Look, ...]] = {
    "email": (Look(r"\<[A-Za-z0-9_][A-Za-z0-9._%+-]*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}\>"),),
    "phone": (
        Look(r"\<(?:(?:\+|00)?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}\>"),  # mobile numbers in China
        Look(r"\<(?:\(0\d{2,3}\)|0\d{2,3}-)[ ]?\d{7,8}\>"),  # others there, with the city's code
        Look(r"\<\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,6}\>", is_international),
        Look(r"\<(?:\(\d{3}\)[ ]?|\d{3}[.-])\d{3}[.-]\d{4}\>"),  # North America
    ),
    "id_card": (
        Look(
            r"\<[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx]\>",
            has_id_check,
        ),
    ),
    "bank_card": (Look(r"\<[2-6](?:[ -]?\d){12,18}\>", has_luhn),),
    "ip": (
        Look(r"\<\d{1,3}(?:\.\d{1,3}){3}\>", is_address),
        Look(rf"\<(?:{_HEX}{{1,4}}|:)(?::{_HEX}{{0,4}}){{2,7}}(?::\d{{1,3}}(?:\.\d{{1,3}}){{3}})?\>", is_address),
    ),
    "api_key": (
        Look(r"\<sk-[A-Za-z0-9_-]{20,}"),  # OpenAI, Anthropic, DeepSeek, DashScope
        Look(r"\<(?:gh[opusr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_-]{20,})"),
        Look(r"\<xox[abeprs]-[A-Za-z0-9-]{10,}"),  # Slack
        Look(r"\<(?:AKIA|ASIA)[0-9A-Z]{16}\>"),  # AWS
        Look(r"\<LTAI[A-Za-z0-9]{12,20}\>"),  # Alibaba Cloud
        Look(r"\<AIza[0-9A-Za-z_-]{35}"),  # Google
        Look(r"\<(?:hf|npm|pypi)_[A-Za-z0-9]{30,}"),
        Look(r"\<eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),  # JSON Web Tokens
        Look(r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[A-Za-z0-9+/=\s]*(?:-----END [A-Z ]{0,20}PRIVATE KEY-----)?"),
    ),
}
