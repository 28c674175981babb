"""An answer's deltas → content blocks, and the events that tell of them as they come.

In: `AnswerDelta`s. Out: blocks and events of Anthropic's interface. Must never know: tokens, HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from amalgam.text.answers.contract import AnswerDelta, ContentDelta, ReasoningDelta, ToolCallDelta
from amalgam.text.answers.parts import arguments_of, call_as_text

JSON = dict[str, Any]


class Blocks:
    """The content of one answer.

    Args:
        shows_reasoning: otherwise a block says that there was some, without its text.

    Attributes:
        content: the blocks so far.
        has_called: a tool, with a call that is complete.
    """

    def __init__(self, *, shows_reasoning: bool) -> None:
        self.content: list[JSON] = []
        self.has_called = False
        self._shows_reasoning = shows_reasoning
        self._kind: object = None  # of the block that is open
        self._arguments = ""
        self._digest = hashlib.sha256()

    def add(self, delta: AnswerDelta) -> Iterator[JSON]:
        """The events that one more delta gives."""
        kind = delta.index if isinstance(delta, ToolCallDelta) else type(delta)
        if kind != self._kind:
            yield from self.close()
            self._kind = kind
            yield self._open(delta)
        block, shown = self.content[-1], self._shown(delta)
        if isinstance(delta, ContentDelta):
            block["text"] += delta.text
        elif isinstance(delta, ReasoningDelta):
            self._digest.update(delta.text.encode())
            if self._shows_reasoning:
                block["thinking"] += delta.text
        else:
            self._arguments += delta.arguments
        if shown is not None:
            yield self._event("content_block_delta", delta=shown)

    def close(self) -> Iterator[JSON]:
        """The block that is open is complete."""
        if self._kind is None:
            return
        block = self.content[-1]
        if block["type"] == "thinking":
            block["signature"] = self._digest.hexdigest()
            yield self._event("content_block_delta", delta={"type": "signature_delta", "signature": block["signature"]})
        elif block["type"] == "tool_use":
            self._set_input(block)
        yield self._event("content_block_stop")
        self._kind = None

    def _open(self, delta: AnswerDelta) -> JSON:
        if isinstance(delta, ContentDelta):
            block: JSON = {"type": "text", "text": "", "citations": None}
        elif isinstance(delta, ReasoningDelta):
            block = {"type": "thinking", "thinking": "", "signature": ""}
            self._digest = hashlib.sha256()
        else:
            block = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            self._arguments = ""
        self.content.append(block)
        return self._event("content_block_start", content_block=dict(block))

    def _shown(self, delta: AnswerDelta) -> JSON | None:
        if isinstance(delta, ContentDelta):
            return {"type": "text_delta", "text": delta.text}
        if isinstance(delta, ReasoningDelta):
            return {"type": "thinking_delta", "thinking": delta.text} if self._shows_reasoning else None
        return {"type": "input_json_delta", "partial_json": delta.arguments} if delta.arguments else None

    def _set_input(self, block: JSON) -> None:
        """The call's arguments; a call that is not complete becomes text."""
        found = arguments_of(self._arguments)
        if found is not None:
            block["input"], self.has_called = found, True
        else:
            text = call_as_text(block["name"], self._arguments)
            self.content[-1] = {"type": "text", "text": text, "citations": None}

    def _event(self, kind: str, **fields: Any) -> JSON:
        return {"type": kind, "index": len(self.content) - 1, **fields}
