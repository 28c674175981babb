"""An error is recognised by what a program can tell of it: its class, its code, and the values that it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from amalgam.errors import AmalgamError


@contextmanager
def raises(
    kinds: type[BaseException] | tuple[type[BaseException], ...], *named: object
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Like `pytest.raises`; the error has the code of its class, and its message names each of `named` as a whole."""
    __tracebackhide__ = True
    with pytest.raises(kinds) as caught:
        yield caught
    error = caught.value
    if isinstance(error, AmalgamError):
        assert error.code in {kind.code for kind in (kinds if isinstance(kinds, tuple) else (kinds,))}
    missing = [value for value in named if not is_named(str(value), str(error))]
    assert not missing, f"{missing} not named in: {error}"


def is_named(value: str, message: str) -> bool:
    """Whether `value` stands in `message`, and not as a part of a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message) is not None
