"""One text on its way: what of it may leave, and as what.

In: rules; the text as it comes. Out: text that has passed, with what was found in it. Must never know: tokens, HTTP.

Nothing leaves before every rule has seen it, and as long as a match that may have begun with it could still become
complete. A text that has JSON's escapes (`\\u4e2d`) is looked at twice, as it is written and as it is read: the
arguments of tool calls are JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from amalgam.text.filters.automaton import Scanner, Span
from amalgam.text.filters.contract import FilterFailedError, Finding
from amalgam.text.filters.folding import Folding
from amalgam.text.filters.rules import Rule

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", '"': '"', "\\": "\\"}
_ESCAPE_CHARS = 6  # `\\u4e2d`


class Found(NamedTuple):
    """Something that may not pass: `[start, end)` of the text, and what stands in its place."""

    start: int
    end: int
    rule: Rule
    replacement: str


class Passed(NamedTuple):
    """What has passed.

    Attributes:
        end: of the text as it came, up to where it is decided.
        found: what was found in it, and replaced.
        blocked_by: the rule that lets nothing more pass.
    """

    text: str
    end: int
    found: tuple[Found, ...] = ()
    blocked_by: Rule | None = None


class Look(NamedTuple):
    """What a hook is to look at now; see `TextFilter.looks`."""

    rule: Rule
    start: int
    text: str


@dataclass
class _Unescaping:
    """JSON's escapes → characters, each with its place; as text comes."""

    _begun: str = ""  # of an escape
    _start: int = 0
    _high: tuple[int, int] | None = None  # the first half of a surrogate pair, and its place

    @property
    def begun(self) -> int | None:
        """Where an escape begins that is not complete."""
        if self._high is not None:
            return self._high[1]
        return self._start if self._begun else None

    def units(self, text: str, start: int) -> Iterator[tuple[str, int, int]]:
        for place, char in enumerate(text, start):
            if not self._begun:
                if char == "\\":
                    self._begun, self._start = char, place
                else:
                    self._high = None
                    yield char, place, place + 1
                continue
            self._begun += char
            if len(self._begun) == 2 and char == "u":
                continue
            if self._begun[1] != "u":
                read, self._begun = _ESCAPES.get(char, char), ""
                yield read, self._start, place + 1
            elif char not in "0123456789abcdefABCDEF":
                self._begun = ""
                yield char, place, place + 1
            elif len(self._begun) == _ESCAPE_CHARS:
                code, self._begun = int(self._begun[2:], 16), ""
                if 0xD800 <= code < 0xDC00:
                    self._high = (code, self._start)
                    continue
                first = self._start
                if 0xDC00 <= code < 0xE000 and self._high is not None:
                    code, first = 0x10000 + ((self._high[0] - 0xD800) << 10) + code - 0xDC00, self._high[1]
                self._high = None
                yield chr(code), first, place + 1


@dataclass(slots=True)
class _Scan:
    """One rule at work on one text."""

    rule: Rule
    scanner: Scanner
    unescaping: _Unescaping | None = None
    unescaped: Scanner | None = None
    is_escaped: bool = False  # the next character, by a backslash

    def push(self, text: str, start: int) -> list[Span]:
        folding = self.rule.folding
        if self.unescaped is None or self.unescaping is None:
            if (at := text.find("\\")) < 0:
                return self.scanner.feed(_folded(folding, _placed(text, start)))
            found = self.scanner.feed(_folded(folding, _placed(text[:at], start)))
            self.unescaping, self.unescaped = _Unescaping(), self.scanner.copy()
            return found + self.push(text[at:], start + at)
        found = self.scanner.feed(_folded(folding, self._written(text, start)))
        return found + self.unescaped.feed(_folded(folding, self.unescaping.units(text, start)))

    def _written(self, text: str, start: int) -> Iterator[tuple[str, int, int]]:
        """The text as it is written. What begins behind a backslash begins with it: half an escape is no text."""
        for place, char in enumerate(text, start):
            yield char, place - self.is_escaped, place + 1
            self.is_escaped = char == "\\" and not self.is_escaped

    def finish(self) -> list[Span]:
        found = self.scanner.finish() + ([] if self.unescaped is None else self.unescaped.finish())
        self.unescaping = self.unescaped = None
        return found

    @property
    def begun(self) -> int | None:
        places = [self.scanner.begun]
        if self.unescaped is not None and self.unescaping is not None:
            places += [self.unescaped.begun, self.unescaping.begun]
        return min((place for place in places if place is not None), default=None)


def _placed(text: str, start: int) -> Iterator[tuple[str, int, int]]:
    return zip(text, range(start, start + len(text)), range(start + 1, start + len(text) + 1), strict=True)


def _folded(folding: Folding, units: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    for char, start, end in units:
        for unit in folding[char]:
            yield unit, start, end


@dataclass
class _HookState:
    """How far a hook has looked."""

    rule: Rule
    looked: int = 0


@dataclass(slots=True)
class TextFilter:
    """All rules at work on one text, which comes in pieces.

    With hooks, `looks` are to be shown to them and `take`n before each `release`.

    Args:
        rules: in the order in which they matter where two find the same.
        context: what stands before the text, and is out already.
    """

    rules: Sequence[Rule]
    context: str = ""
    _scans: list[_Scan] = field(init=False)
    _hooks: list[_HookState] = field(init=False)
    _text: str = field(init=False)  # from `_start` on; the context's places are negative
    _start: int = field(init=False)
    _decided: int = 0  # where what has been released ends
    _found: list[Found] = field(default_factory=list)
    _blocked: tuple[int, Rule] | None = None
    _last: Found | None = None
    _is_ended: bool = False

    def __post_init__(self) -> None:
        self._scans = [
            _Scan(rule, rule.scanner(is_eager=rule.action == "block"))
            for rule in self.rules
            if rule.automaton is not None
        ]
        self._start, self._text = -len(self.context), self.context
        self._hooks = [_HookState(rule, 0) for rule in self.rules if rule.hook is not None]
        if self.context:
            for scan in self._scans:
                self._note(scan.rule, scan.push(self.context, self._start))

    def push(self, text: str) -> None:
        """More of the text."""
        if text and self._blocked is None:
            start = self._start + len(self._text)
            self._text += text
            for scan in self._scans:
                self._note(scan.rule, scan.push(text, start))

    def end(self) -> None:
        """Nothing follows."""
        self._is_ended = True
        for scan in self._scans:
            self._note(scan.rule, scan.finish())

    def looks(self) -> list[Look]:
        """What hooks are to look at now: enough new text, or all that is left at the end."""
        end = self._start + len(self._text)
        found = []
        for state in self._hooks:
            num_new, max_chars = end - state.looked, state.rule.max_chars
            if num_new and (self._is_ended or num_new >= max_chars):
                start = max(state.looked - max_chars, self._start)
                state.looked = end
                found.append(Look(state.rule, start, self._text[start - self._start :]))
        return found

    def take(self, look: Look, findings: Sequence[Finding]) -> None:
        """What a hook has found.

        Raises:
            FilterFailedError: it is nothing that a hook may find.
        """
        for found in findings:
            is_finding = isinstance(found, Finding) and isinstance(found.start, int) and isinstance(found.end, int)
            if not is_finding or not 0 <= found.start < found.end <= len(look.text):
                raise FilterFailedError(
                    f"The filter {look.rule.name!r} found something of type {type(found).__name__} that is no Finding "
                    "inside of the text.",
                    remedy="Correct its hook.",
                )
            replacement = look.rule.replaced(found.label, found.replacement)
            self._add(Found(look.start + found.start, look.start + found.end, look.rule, replacement))

    def release(self) -> Passed:
        """What can leave by now. A rule that blocks ends the text before what it has found."""
        end = self._start + len(self._text)
        safe = end
        for scan in self._scans:
            if (begun := scan.begun) is not None:
                safe = min(safe, begun)
        if not self._is_ended:
            for state in self._hooks:
                safe = min(safe, max(state.looked - state.rule.max_chars, self._decided))
        blocked_by = None
        if self._blocked is not None:
            safe, blocked_by = min(safe, self._blocked[0]), self._blocked[1]
        return self._cut(max(safe, self._decided), blocked_by)

    def _cut(self, safe: int, blocked_by: Rule | None) -> Passed:
        """The text from where it is decided to `safe`, which is moved before what reaches over it."""
        if not self._found:  # the usual case
            text = self._text[self._decided - self._start : safe - self._start]
            self._decided = safe
            self._forget()
            return Passed(text, safe, (), blocked_by)
        waiting = sorted(self._found, key=lambda found: (found.start, self.rules.index(found.rule)))
        groups = _joined(waiting)
        for group in groups:
            if group.start < safe < group.end:
                safe = max(group.start, self._decided)
        parts, found = [], []
        at = self._decided
        for group in groups:
            if group.end > safe:
                break
            parts.append(self._text[at - self._start : max(group.start, at) - self._start])
            if self._last is None or (self._last.end, self._last.rule) != (group.start, group.rule):
                parts.append(group.replacement)  # of a match that came in pieces, once
            found.append(group)
            self._last = group
            at = max(at, group.end)
        parts.append(self._text[at - self._start : max(safe, at) - self._start])
        self._found = [other for other in waiting if other.end > safe]
        self._decided = max(safe, self._decided)
        self._forget()
        return Passed("".join(parts), self._decided, tuple(found), blocked_by)

    def _forget(self) -> None:
        """What is decided, and no hook is to see again."""
        kept = self._decided
        if self._hooks:
            kept = min(kept, *(state.looked - state.rule.max_chars for state in self._hooks))
        if kept > self._start:
            self._text, self._start = self._text[kept - self._start :], kept

    def _note(self, rule: Rule, spans: Sequence[Span]) -> None:
        for start, end, tag in spans:
            self._add(Found(start, end, rule, rule.replaced(tag.label)))

    def _add(self, found: Found) -> None:
        if found.end <= self._decided:
            return  # of the context, or seen before
        found = found._replace(start=max(found.start, self._decided))
        if found.rule.action != "block":
            self._found.append(found)
        elif self._blocked is None or found.start < self._blocked[0]:
            self._blocked = found.start, found.rule


def _joined(found: Sequence[Found]) -> list[Found]:
    """In order; those that overlap are one, with the first one's replacement."""
    groups: list[Found] = []
    for one in found:
        if groups and one.start < groups[-1].end:
            groups[-1] = groups[-1]._replace(end=max(groups[-1].end, one.end))
        else:
            groups.append(one)
    return groups


def filtered(rules: Sequence[Rule], text: str) -> Passed:
    """A whole text, by rules without hooks."""
    passing = TextFilter([rule for rule in rules if rule.hook is None])
    passing.push(text)
    passing.end()
    return passing.release()
