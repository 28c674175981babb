r"""Regular expressions that can be matched in time linear in the text, as text comes. Text → a tree.

In: a pattern. Out: nodes. Must never know: how they are matched.

The syntax is the common one: literals, `.`, classes, `\d \w \s \p{…}`, groups, `|`, `? * + {n,m}`, `(?i)`, `\b`, and
`\<`, `\>`: no letter or digit of a word before, behind, where Chinese has no borders. What cannot be decided while
reading forward, references and looking around, is refused, and so are anchors: an answer is no line.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from amalgam.errors import ConfigError, describe

MAX_PATTERN_CHARS = 4096
MAX_NODES = 20_000  # of all patterns of a rule, repetitions written out
_MAX_REPEAT = 1000
_MAX_DEPTH = 64

Test = Callable[[str], bool]


@dataclass(frozen=True)
class One:
    """One character."""

    test: Test


@dataclass(frozen=True)
class Edge:
    """A place between characters: `b`, `B`, `<`, `>`."""

    kind: str


@dataclass(frozen=True)
class Chain:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    part: Node
    least: int
    most: int | None  # None: without end


Node = One | Edge | Chain | Choice | Repeat


def num_nodes(node: Node) -> int:
    """With repetitions written out."""
    match node:
        case Chain(parts) | Choice(parts):
            return 1 + sum(map(num_nodes, parts))
        case Repeat(part, least, most):
            return 1 + num_nodes(part) * max(1, least + 1 if most is None else most)
        case _:
            return 1


def can_be_empty(node: Node) -> bool:
    """Whether it matches no character at all."""
    match node:
        case Chain(parts):
            return all(map(can_be_empty, parts))
        case Choice(options):
            return any(map(can_be_empty, options))
        case Repeat(part, least, _):
            return least == 0 or can_be_empty(part)
        case Edge():
            return True
        case _:
            return False


def parse(pattern: str, fold: Callable[[str], str] = str, *, ignores_case: bool = False) -> Node:
    """
    Args:
        fold: what the text's characters become before they are compared; literals become the same.
        ignores_case: as `(?i)` at the beginning.

    Raises:
        ConfigError: it is wrong, too large, not supported, or matches the empty text.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise _wrong(pattern, f"has {len(pattern)} characters", f"Allowed: {MAX_PATTERN_CHARS}.")
    node = _Parser(pattern, fold, ignores_case).parse()
    if can_be_empty(node):
        raise _wrong(pattern, "matches the empty text", "Demand at least one character.")
    return node


def _wrong(pattern: str, what: str, remedy: str) -> ConfigError:
    return ConfigError(f"The regular expression {describe(pattern)} {what}.", remedy=remedy)


def _is_digit(char: str) -> bool:
    return unicodedata.category(char) == "Nd"


def _is_word(char: str) -> bool:
    return char == "_" or char.isalnum() or unicodedata.category(char)[0] == "M"


def _negated(test: Test) -> Test:
    return lambda char: not test(char)


_CLASSES: dict[str, Test] = {"d": _is_digit, "w": _is_word, "s": str.isspace}
_CLASSES |= {name.upper(): _negated(test) for name, test in _CLASSES.items()}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a"}
_SCRIPTS = {
    "Han": "CJK ", "Hiragana": "HIRAGANA ", "Katakana": "KATAKANA ", "Hangul": "HANGUL ", "Latin": "LATIN ",
    "Cyrillic": "CYRILLIC ", "Greek": "GREEK ", "Arabic": "ARABIC ", "Hebrew": "HEBREW ", "Thai": "THAI ",
    "Devanagari": "DEVANAGARI ",
}  # fmt: skip
_CATEGORIES = {
    "L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P", "Pc", "Pd", "Ps", "Pe", "Pi",
    "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp", "C", "Cc", "Cf", "Co", "Cn",
}  # fmt: skip


class _Parser:
    def __init__(self, pattern: str, fold: Callable[[str], str], ignores_case: bool) -> None:
        self._pattern = pattern
        self._fold = fold
        self._ignores_case = ignores_case
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        if self._take("(?i)"):
            self._ignores_case = True
        node = self._choice()
        if self._at < len(self._pattern):
            raise self._error("has a ')' without a '('", "Write \\) for the character.")
        if num_nodes(node) > MAX_NODES:
            raise self._error("is too large with its repetitions written out", "Repeat less.")
        return node

    def _error(self, what: str, remedy: str) -> ConfigError:
        return _wrong(self._pattern, f"{what} at character {min(self._at + 1, len(self._pattern))}", remedy)

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _next(self) -> str:
        if not (char := self._peek()):
            raise self._error("ends too early", "Complete it.")
        self._at += 1
        return char

    def _take(self, text: str) -> bool:
        if self._pattern.startswith(text, self._at):
            self._at += len(text)
            return True
        return False

    def _choice(self) -> Node:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while (char := self._peek()) and char not in "|)":
            parts.append(self._repeated(self._atom()))
        return Chain(tuple(parts))

    def _repeated(self, part: Node) -> Node:
        while (char := self._peek()) and char in "?*+{":
            limits = {"?": (0, 1), "*": (0, None), "+": (1, None)}.get(char)
            self._at += 1
            least, most = self._counts() if limits is None else limits
            if isinstance(part, Edge):
                raise self._error("repeats a place between characters", "Leave the repetition out.")
            if self._take("+"):
                raise self._error("has a possessive repetition", "Leave the second + out.")
            self._take("?")  # lazy: the longest match is taken all the same
            part = Repeat(part, least, most)
        return part

    def _counts(self) -> tuple[int, int | None]:
        end = self._pattern.find("}", self._at)
        first, comma, last = self._pattern[self._at : max(end, self._at)].partition(",")
        numbers = [text for text in (first, last) if text]
        if end < 0 or not first or not all(text.isascii() and text.isdigit() for text in numbers):
            raise self._error("has a '{' that begins no {n}, {n,} or {n,m}", "Write \\{ for the character.")
        self._at = end + 1
        least = int(first)
        most = int(last) if last else None if comma else least
        if max(least, most or 0) > _MAX_REPEAT or (most is not None and most < max(least, 1)):
            raise self._error(f"repeats {least} to {most} times", f"Allowed: up to {_MAX_REPEAT}, and no less than n.")
        return least, most

    def _atom(self) -> Node:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == ".":
            return One(lambda other: other != "\n")
        if char == "\\":
            return self._escape()
        if char in "^$":
            raise self._error(f"has the anchor {char}", "Leave it out: a text is found wherever it stands.")
        if char in "?*+{":
            raise self._error(f"has nothing that {char} could repeat", f"Write \\{char} for the character.")
        return self._literal(char)

    def _group(self) -> Node:
        outer, self._depth = self._ignores_case, self._depth + 1
        if self._depth > _MAX_DEPTH:
            raise self._error("is nested too deeply", f"Allowed: {_MAX_DEPTH} groups in each other.")
        if self._take("?i:"):
            self._ignores_case = True
        elif self._take("?P<") or (not self._pattern.startswith(("?<=", "?<!"), self._at) and self._take("?<")):
            self._at = self._pattern.find(">", self._at) + 1
            if not self._at:
                raise self._error("has a name without an end", "Write (?<name>…).")
        elif not self._take("?:") and self._peek() == "?":
            raise self._error("looks around, or sets a flag", "Allowed: (…), (?:…), (?<name>…), (?i:…).")
        node = self._choice()
        if not self._take(")"):
            raise self._error("has a '(' without a ')'", "Write \\( for the character.")
        self._ignores_case, self._depth = outer, self._depth - 1
        return node

    def _escape(self) -> Node:
        char = self._next()
        if char in "bB<>":
            return Edge(char)
        if char in "AzZG":
            raise self._error(f"has the anchor \\{char}", "Leave it out: a text is found wherever it stands.")
        if char.isdigit() and char != "0":
            raise self._error("refers to a group", "Write what it stands for.")
        if (test := self._class_escape(char)) is not None:
            return One(test)
        return self._literal(self._char_escape(char))

    def _class_escape(self, char: str) -> Test | None:
        if char in _CLASSES:
            return _CLASSES[char]
        if char not in "pP":
            return None
        name = self._next()
        if name == "{":
            end = self._pattern.find("}", self._at)
            name, self._at = self._pattern[self._at : max(end, self._at)], end + 1 or len(self._pattern)
        if name in _SCRIPTS:
            prefix = _SCRIPTS[name]
            test: Test = lambda other: unicodedata.name(other, "").startswith(prefix)  # noqa: E731
        elif name in _CATEGORIES:
            test = lambda other: unicodedata.category(other).startswith(name)  # noqa: E731
        else:
            allowed = f"a general category such as L or Nd, or {', '.join(_SCRIPTS)}"
            raise self._error(f"has the class {describe(name)}", f"Allowed: {allowed}.")
        return _negated(test) if char == "P" else test

    def _char_escape(self, char: str) -> str:
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char in "xuU":
            size = {"x": 2, "u": 4, "U": 8}[char]
            if self._take("{"):
                end = self._pattern.find("}", self._at)
                digits, self._at = self._pattern[self._at : max(end, self._at)], end + 1 or len(self._pattern)
            else:
                digits, self._at = self._pattern[self._at : self._at + size], self._at + size
            try:
                return chr(int(digits, 16))
            except (ValueError, OverflowError):
                raise self._error(f"has the code {describe(digits)}", "Write \\x41, \\u4e2d or \\x{1F600}.") from None
        if char.isalnum():
            raise self._error(f"has the escape \\{char}", "It is not one of this syntax.")
        return char

    def _literal(self, char: str) -> Node:
        folded = self._fold(char)
        parts = tuple(One(self._same(other)) for other in folded)
        return parts[0] if len(parts) == 1 else Chain(parts)

    def _same(self, char: str) -> Test:
        if not self._ignores_case:
            return char.__eq__
        return {char, char.lower(), char.upper()}.__contains__

    def _class(self) -> Node:
        is_negated = self._take("^")
        tests: list[Test] = []
        is_first = True
        while is_first or self._peek() != "]":
            is_first = False
            low = self._member(tests)
            if low is None:
                continue
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._member(tests)
                if high is None or high < low:
                    raise self._error("has a range that goes backwards", "Write the lower character first.")
                tests.append(_in_range(low, high))
            elif len(folded := self._fold(low)) == 1:
                tests.append(folded.__eq__)
            else:
                raise self._error(f"has {describe(low)} in a class, which is compared as several", "Write (?:a|b).")
        self._at += 1
        ignores_case = self._ignores_case

        def test(char: str) -> bool:
            forms = {char, char.lower(), char.upper()} if ignores_case else (char,)
            return any(found(form) for form in forms if len(form) == 1 for found in tests) != is_negated

        return One(test)

    def _member(self, tests: list[Test]) -> str | None:
        """A character; None: a class, which has been added."""
        char = self._next()
        if char == "[" and self._peek() == ":":
            raise self._error("has a POSIX class", "Write \\d, \\w, \\s or \\p{…}.")
        if char != "\\":
            return char
        char = self._next()
        if (test := self._class_escape(char)) is not None:
            tests.append(test)
            return None
        return "\b" if char == "b" else self._char_escape(char)


def _in_range(low: str, high: str) -> Test:
    return lambda char: low <= char <= high
