"""The deltas of an answer, put together again.

In: `AnswerDelta`s. Out: content, reasoning, calls. Must never know: interfaces, requests, tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from amalgam.text.answers.contract import AnswerDelta, ContentDelta, ReasoningDelta


@dataclass
class AnswerParts:
    """None: there was no delta of the kind.

    Attributes:
        calls: index → id, name and arguments as JSON.
    """

    content: str | None = None
    reasoning: str | None = None
    calls: dict[int, dict[str, str]] = field(default_factory=dict)

    def add(self, deltas: Iterable[AnswerDelta]) -> None:
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self.content = (self.content or "") + delta.text
            elif isinstance(delta, ReasoningDelta):
                self.reasoning = (self.reasoning or "") + delta.text
            else:
                call = self.calls.setdefault(delta.index, {"id": delta.id, "name": "", "arguments": ""})
                call["name"] += delta.name or ""
                call["arguments"] += delta.arguments

    def finish(self) -> None:
        """Nothing follows: calls that are not complete become content."""
        for index, call in list(self.calls.items()):
            if arguments_of(call["arguments"]) is None:
                del self.calls[index]
                self.content = (self.content or "") + call_as_text(call["name"], call["arguments"])


def arguments_of(text: str) -> dict[str, Any] | None:
    """The arguments of a call; None: the text is no JSON object, because the answer was cut off or the model erred."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def call_as_text(name: str, arguments: str) -> str:
    """A call that is not complete, as content."""
    return f"{name}({arguments}"
