"""The nouns of answers: what a text is taken apart into, and what a format says of itself.

In: nothing. Out: `AnswerDelta`s, `AnswerParser`, `ToolFormat`. Must never know: tokens, requests, HTTP.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from amalgam.text.answers.reading import Reader

Tools = Sequence[Mapping[str, Any]]  # as OpenAI's interface has them, with the schema of their arguments
Reading = Generator[None, None, None]  # pauses where more text is needed


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text that the model wrote before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of a call. The first one of each index has the function's name, and none after it has."""

    index: int
    id: str
    name: str | None
    arguments: str  # a piece of JSON; all pieces together are the arguments


AnswerDelta = ContentDelta | ReasoningDelta | ToolCallDelta


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class Tags(NamedTuple):
    """What stands around reasoning."""

    start: str
    end: str


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes tool calls.

    Attributes:
        name: as in `server.tool_parser`.
        marks: texts that structure an answer; a tokenizer may have them as special tokens, which must then be shown.
        recognizes: whether a chat template is one of this family.
        read: takes an answer apart. Raises nothing: what is no call is content.
        grammar: a rule `calls` in llguidance's dialect of Lark: exactly calls of the tools, and one only unless they
            may be several.
        new_id: of a call, as the family's templates take it.
        reasons: it sets reasoning apart by itself, and reads answers to requests without tools too.
        frames_content: marks stand around content, too: it reads answers to requests without tools.
        thought: what stands around that reasoning.
        opening: what every call begins with, and no other text; empty: calls have no such mark.
        short_openings: what calls are known by too, where the model has left out `opening`.
    """

    name: str
    marks: tuple[str, ...]
    recognizes: Callable[[str], bool]
    read: Callable[[Reader, Answer], Reading]
    grammar: Callable[[GrammarWriter, Tools, bool], str]
    new_id: Callable[[], str] = _new_id
    reasons: bool = False
    frames_content: bool = False
    thought: Tags | None = None
    opening: str = ""
    short_openings: tuple[str, ...] = ()


class Answer:
    """One answer as it is taken apart: where its parts go.

    Spaces between the parts belong to none of them: they are dropped where reasoning ends, and before and after calls.
    """

    def __init__(self, tools: Tools, new_id: Callable[[], str], *, reasons: bool) -> None:
        self.tools = tools
        self.reasons = reasons  # reasoning is to be set apart
        self.deltas: list[AnswerDelta] = []
        self._new_id = new_id
        self._num_calls = 0
        self._id = ""
        self._spaces: list[str] = []  # not put together before they are shown: a model may write nothing else
        self._is_leading = False  # what comes next is the beginning of a part
        self._kind: type[ContentDelta | ReasoningDelta] = ContentDelta

    def content(self, text: str) -> None:
        self._say(ContentDelta, text)

    def reasoning(self, text: str) -> None:
        self._say(ReasoningDelta, text)

    def call(self, name: str, call_id: str | None = None) -> None:
        """A call begins; `arguments` are its. Without an id it is given one."""
        self._spaces, self._is_leading = [], True
        self._id = self._new_id() if call_id is None else call_id
        self.deltas.append(ToolCallDelta(self._num_calls, self._id, name, ""))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        if text:
            self.deltas.append(ToolCallDelta(self._num_calls - 1, self._id, None, text))

    def end_part(self) -> None:
        """What follows is a part of its own."""
        self._spaces, self._is_leading = [], True

    def finish(self) -> None:
        if self._spaces and not self._is_leading:
            self.deltas.append(self._kind("".join(self._spaces)))
        self._spaces = []

    def _say(self, kind: type[ContentDelta | ReasoningDelta], text: str) -> None:
        if kind is not self._kind:
            self._kind, self._spaces, self._is_leading = kind, [], True
        if self._is_leading:
            text = text.lstrip()
        shown = text.rstrip()
        if shown:
            self.deltas.append(kind("".join(self._spaces) + shown))
            self._spaces, self._is_leading = [], False
        if len(text) > len(shown):
            self._spaces.append(text[len(shown) :])


class AnswerParser:
    """Takes one answer apart. However its text is cut, the deltas put together are the same.

    What is no complete call comes out as content. A call whose arguments turn out to be broken after they have begun
    goes on with what the model wrote.
    """

    def __init__(self, answer: Answer, read: Callable[[Reader, Answer], Reading]) -> None:
        self._answer = answer
        self._reader = Reader()
        self._reading = read(self._reader, answer)

    def push(self, text: str) -> list[AnswerDelta]:
        """More of the answer; returns what is certain by now."""
        self._reader.add(text)
        return self._go_on()

    def finish(self) -> list[AnswerDelta]:
        """Nothing follows."""
        self._reader.end()
        deltas = self._go_on()
        self._answer.finish()
        return deltas + self._take()

    def _go_on(self) -> list[AnswerDelta]:
        next(self._reading, None)
        return self._take()

    def _take(self) -> list[AnswerDelta]:
        deltas, self._answer.deltas = self._answer.deltas, []
        return deltas


@dataclass(frozen=True)
class GrammarWriter:
    """Texts and values as they stand in a grammar of llguidance.

    Attributes:
        special_ids: texts of special tokens → their ids. In a grammar they are something else than their characters.
    """

    special_ids: Mapping[str, int] = field(default_factory=dict)

    def text(self, text: str) -> str:
        """Exactly this text, in which special tokens are tokens."""
        if not self.special_ids:
            return _quoted(text)
        names = "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True)))
        parts = re.split(f"({names})", text)
        return " ".join(f"<[{self.special_ids[part]}]>" if index % 2 else _quoted(part)
                        for index, part in enumerate(parts) if part)  # fmt: skip

    def up_to(self, rule: str, mark: str) -> str:
        """A rule for any text and then `mark`, where that comes first."""
        if any(mark.startswith(text) for text in self.special_ids):
            return f"{rule}: /(?s:.*)/ {self.text(mark)}"
        return f"{rule}[lazy]: /(?s:.*){pattern_of(mark)}/"

    def json(self, schema: Mapping[str, Any]) -> str:
        """A JSON value that fits the schema, written as `json.dumps` does."""
        return "%json " + json.dumps({"x-guidance": _JSON_STYLE, **schema}, ensure_ascii=False)


_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def pattern_of(text: str) -> str:
    """A regular expression for exactly this text, as it stands between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\n", "n")  # behind the backslash that is there


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool's name, description and parameters."""
    found: Mapping[str, Any] = tool.get("function") or tool
    return found


def name_of(tool: Mapping[str, Any]) -> str:
    name: str = function_of(tool)["name"]
    return name


def schema_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of its arguments: always that of an object."""
    schema = function_of(tool).get("parameters") or {}
    return (
        {"type": "object", **schema} if schema else {"type": "object", "properties": {}, "additionalProperties": False}
    )
