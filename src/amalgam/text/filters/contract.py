"""The nouns of filters, and what a hook of somebody else's has to be.

In: nothing. Out: `Finding`, `Hook`. Must never know: requests, tokens, HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from amalgam.errors import AmalgamError, RequestError

Where = Literal["prompts", "answers", "logs"]
Action = Literal["block", "redact", "replace"]

GROUP = "amalgam.filters"
"""The entry points that offer hooks: a `HookFactory` each, under the name that rules call it by."""


class ContentFilteredError(RequestError):
    """A filter lets a text not pass."""

    http_status = 400
    code = "content_filtered"


class FilterFailedError(AmalgamError):
    """A hook has raised, taken too long or returned nonsense: what it did not pass does not pass."""

    http_status = 500
    code = "filter_failed"


@dataclass(frozen=True)
class Finding:
    """What a hook has found: `[start, end)` of the text that it was given.

    Attributes:
        label: what it is, for `[LABEL]` in its place.
        replacement: what stands in its place, if the rule redacts or replaces; None: what the rule says.
    """

    start: int
    end: int
    label: str = "REMOVED"
    replacement: str | None = None


class Hook(Protocol):
    """Looks at texts before they are computed with, or sent.

    It is called in threads of its own, several at a time. Whatever it raises, and whatever takes longer than
    `filters.hook_seconds`, ends the request.

    Attributes:
        max_chars: the longest stretch that it needs to see at once. Of an answer it is given stretches that overlap by
            so many characters, and so many are held back.
    """

    max_chars: int

    def find(self, text: str, where: Where) -> Sequence[Finding]:
        """What in `text` may not pass as it is."""


HookFactory = Callable[[Mapping[str, Any]], Hook]
"""Makes a hook of a rule's `options`; raises `ConfigError` if they are wrong."""
