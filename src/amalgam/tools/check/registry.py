"""Which checks there are: whatever lies in the modules of `checks/`.

In: names and patterns. Out: checks, in the order of a report. Must never know what they do.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from fnmatch import fnmatchcase

from amalgam.errors import ConfigError
from amalgam.tools.check import checks
from amalgam.tools.check.contract import CATEGORIES, Check


@functools.cache
def all_checks() -> tuple[Check, ...]:
    """By category, and in a category as they stand in its file."""
    found: list[Check] = []
    for module in pkgutil.iter_modules(checks.__path__):
        values = vars(importlib.import_module(f"{checks.__name__}.{module.name}")).values()
        found += [value for value in values if isinstance(value, Check)]
    order = list(CATEGORIES)
    return tuple(sorted(found, key=lambda check: order.index(check.category)))


def chosen(only: Sequence[str], skip: Sequence[str]) -> tuple[Check, ...]:
    """Checks by ids, categories or patterns such as `limits.*`.

    Args:
        only: empty: all.

    Raises:
        ConfigError: a pattern that fits no check, or none is left.
    """
    for flag, patterns in (("--only", only), ("--skip", skip)):
        for pattern in patterns:
            if not any(_fits(check, pattern) for check in all_checks()):
                raise ConfigError(
                    f"{flag} is {pattern!r}, which is no check.",
                    remedy=f"Categories: {', '.join(CATEGORIES)}. `amalgam check --list` shows all checks.",
                )
    left = [
        check
        for check in all_checks()
        if (not only or any(_fits(check, pattern) for pattern in only))
        and not any(_fits(check, pattern) for pattern in skip)
    ]
    if not left:
        raise ConfigError("--only and --skip leave no check.", remedy="Leave one of them out.")
    return tuple(left)


def _fits(check: Check, pattern: str) -> bool:
    return pattern in (check.id, check.category) or fnmatchcase(check.id, pattern)
