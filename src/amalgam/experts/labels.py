"""Tallies by label, for a bounded number of labels.

In: counted rows and the label that a client gave their request. Out: a tally per label. Must never know: the time.
Not locked: `ExpertTracker` calls it under its own lock.
"""

from __future__ import annotations

from amalgam.errors import RequestError, describe
from amalgam.experts.history import Tally

MAX_LABEL_CHARS = 64


class LabelTallies:
    """A tally for each of at most `max_labels` labels."""

    def __init__(self, num_layers: int, num_experts: int, max_labels: int) -> None:
        self.max_labels = max_labels
        self._grid = (num_layers, num_experts)
        self._tallies: dict[str, Tally] = {}

    def admit(self, label: str) -> None:
        """Make room for a label.

        Raises:
            RequestError: it is no name, or one too many.
        """
        check_label(label)
        if self.tally(label) is None:
            raise RequestError(
                f"domain is {describe(label)}, and {self.max_labels} other domains are being counted already.",
                remedy="Use one of those (GET /experts/labels), reset the statistics, or raise statistics.max_labels.",
            )

    def tally(self, label: str) -> Tally | None:
        """The tally to add to, made if absent; None if there is no room (after a reset with requests in flight)."""
        if label not in self._tallies and len(self._tallies) < self.max_labels:
            self._tallies[label] = Tally.zeros(*self._grid)
        return self._tallies.get(label)

    def get(self, label: str) -> Tally:
        """
        Raises:
            RequestError: nothing is counted under this label.
        """
        if label not in self._tallies:
            raise RequestError(
                f"label is {describe(label)}, which no request has had.", remedy="GET /experts/labels lists them."
            )
        return self._tallies[label].copy()

    def copy(self) -> dict[str, Tally]:
        """All labels, in order of their first request."""
        return {label: tally.copy() for label, tally in self._tallies.items()}

    def num_tokens(self) -> dict[str, int]:
        return {label: int(tally.num_tokens.sum()) for label, tally in self._tallies.items()}

    def clear(self) -> None:
        self._tallies.clear()

    @property
    def nbytes(self) -> int:
        return sum(tally.nbytes for tally in self._tallies.values())


def check_label(label: str) -> None:
    """
    Raises:
        RequestError: not 1 to 64 printable characters.
    """
    if not isinstance(label, str) or not 0 < len(label) <= MAX_LABEL_CHARS or not label.isprintable():
        raise RequestError(
            f"domain is {describe(label)}.", remedy=f"Allowed: 1 to {MAX_LABEL_CHARS} printable characters."
        )
