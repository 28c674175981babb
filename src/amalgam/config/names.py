"""What weight versions can be called.

In: text. Out: whether it is a name. Must never know: versions.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

CURRENT = "current"  # what a request may ask for, too
MAX_KEPT = 64  # versions beside the current one
ALLOWED_NAMES = f"letters, digits, '.', '_' and '-', at most 64, not digits alone, and not {CURRENT!r}"

_NAME = re.compile(r"(?![0-9]+\Z)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_weights_name(text: str) -> bool:
    """Whether a version can be called so."""
    return _NAME.fullmatch(text) is not None and text != CURRENT


def _checked(text: str) -> str:
    if not is_weights_name(text):
        raise ValueError(f"weights cannot be called {text[:80]!r}. Allowed: {ALLOWED_NAMES}")
    return text


WeightsName = Annotated[str, AfterValidator(_checked)]
