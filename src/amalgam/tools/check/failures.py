"""Why a check cannot go on; `running.py` makes findings of these."""

from __future__ import annotations


class CannotTellError(Exception):
    """A check has nothing to go by; it is skipped, with this as the reason."""


class PlainRefusalError(Exception):
    """A request that every server must answer was not answered; the check fails with this."""
