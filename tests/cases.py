"""Many small cases in one test: all are tried, and each that fails is named.

A test of pytest's own takes milliseconds for itself and is collected by every process. Where a case takes no longer
than that, its test loops:

    with each_case() as case:
        for text in TEXTS:
            with case(text):
                assert ...
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_MOST_SHOWN = 5  # of whose failures all is shown


class Cases:
    """What has failed so far: the case, and its traceback."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str]] = []
        self.count = 0

    @contextmanager
    def __call__(self, *case: object) -> Iterator[None]:
        """One case, named by what it is made of."""
        self.count += 1
        try:
            yield
        except (Exception, pytest.fail.Exception):
            self.failures.append((", ".join(map(str, case)), traceback.format_exc()))


@contextmanager
def each_case() -> Iterator[Cases]:
    """Fails at the end if any case has failed, whatever else ends the loop, or if there was none."""
    cases = Cases()
    try:
        yield cases
    finally:
        if cases.failures:
            names = "\n".join(f"- {name}" for name, _ in cases.failures)
            details = "\n".join(f"--- {name}\n{trace}" for name, trace in cases.failures[:_MOST_SHOWN])
            pytest.fail(f"{len(cases.failures)} of {cases.count} cases:\n{names}\n{details}", pytrace=False)
    assert cases.count, "there was no case"
