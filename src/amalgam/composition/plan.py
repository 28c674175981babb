"""Rules → which source each weight comes from, and why.

In: logical weight names and rules (name or pattern → source). Out: a `Plan`.
Must never know: files, tensors, layers.

Precedence: an exact name wins; then the most specific pattern, the one with the most literal characters; among equals
the later rule; then the default source. Patterns are shell-like and match whole names: `*` any characters (dots too),
`?` one character, `[abc]` and `[0-9]` one of them, `{a,b}` alternatives, `{0-15}` whole numbers in a range.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from amalgam.config.settings import Rule
from amalgam.errors import PlanError, describe

_WILDCARDS = frozenset("*?[{")
_MAX_RANGE = 65536
_MAX_STARS = 8


@dataclass(frozen=True)
class Choice:
    """Where one weight comes from. `rule` is None when the default source applies."""

    name: str
    source: str
    rule: Rule | None

    @property
    def reason(self) -> str:
        """One sentence for people."""
        if self.rule is None:
            return "no rule names it: default source"
        return "exact name" if is_exact(self.rule.pattern) else f"pattern {self.rule.pattern}"


@dataclass(frozen=True)
class Explanation:
    """A weight's choice with every rule that matches it, strongest first."""

    choice: Choice
    matching: tuple[Rule, ...]
    default_source: str

    @property
    def why(self) -> str:
        """Why the first rule beat the second."""
        if not self.matching:
            return f"no rule matches: the default source {self.default_source!r} applies"
        winner = self.matching[0]
        if len(self.matching) == 1:
            return f"{winner.pattern!r} is the only rule that matches"
        second = self.matching[1]
        if is_exact(winner.pattern):
            if is_exact(second.pattern):
                return "both are exact names and this one stands later"
            return f"an exact name beats the pattern {second.pattern!r}"
        mine, other = specificity(winner.pattern), specificity(second.pattern)
        if mine > other:
            return f"{winner.pattern!r} has {mine} literal characters, {second.pattern!r} only {other}"
        return f"{winner.pattern!r} and {second.pattern!r} have {mine} literal characters each, and it stands later"


class Plan(Mapping[str, Choice]):
    """Logical name → `Choice`, for every weight of a model. Immutable."""

    def __init__(self, names: Iterable[str], rules: Sequence[Rule], default_source: str) -> None:
        """Resolve every name.

        Raises:
            PlanError: a pattern is malformed, or a rule matches no weight.
        """
        self.rules = tuple(rules)
        self.default_source = default_source
        self._exact, self._patterns = _rank(self.rules)
        self._choices = {name: self._choose(name) for name in names}
        self._check_all_match()

    def __getitem__(self, name: str) -> Choice:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def explain(self, name: str) -> Explanation:
        """Which rule won for one weight, and over which others.

        Raises:
            PlanError: the model has no such weight; the message suggests the nearest names.
        """
        if name not in self._choices:
            raise PlanError(f"The model has no weight {describe(name)}.", remedy=_nearest(name, self._choices))
        exact = [rule for rule in reversed(self.rules) if rule.pattern == name]
        patterns = [rule for rule, regex in self._patterns if regex.fullmatch(name)]
        return Explanation(self._choices[name], (*exact, *patterns), self.default_source)

    def _choose(self, name: str) -> Choice:
        rule = self._exact.get(name)
        if rule is None:
            rule = next((rule for rule, regex in self._patterns if regex.fullmatch(name)), None)
        return Choice(name, self.default_source if rule is None else rule.source, rule)

    def _check_all_match(self) -> None:
        for name in self._exact:
            if name not in self._choices:
                raise PlanError(f"Rule {describe(name)} matches no weight.", remedy=_nearest(name, self._choices))
        winners = {id(choice.rule) for choice in self._choices.values()}
        for rule, regex in self._patterns:
            if id(rule) not in winners and not any(regex.fullmatch(name) for name in self._choices):
                raise PlanError(
                    f"Rule {describe(rule.pattern)} matches no weight.",
                    remedy="`amalgam plan` lists the weights' names.",
                )


def is_exact(pattern: str) -> bool:
    """Whether a pattern is a plain name."""
    return _WILDCARDS.isdisjoint(pattern)


def specificity(pattern: str) -> int:
    """How many characters of a pattern stand for themselves."""
    return len(re.sub(r"\*|\?|\[[^\]]*\]|\{[^}]*\}", "", pattern))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A shell-like pattern as a regular expression for `fullmatch`.

    Raises:
        PlanError: a bracket or brace is not closed, or a range is empty or too long.
    """
    # A run of stars means one star. More than a few would make matching exponential.
    pattern = re.sub(r"\*+", "*", pattern)
    if pattern.count("*") > _MAX_STARS:
        raise PlanError(
            f"Pattern {describe(pattern)} holds {pattern.count('*')} stars.", remedy="At most 8 are allowed."
        )
    parts: list[str] = []
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character in "[{":
            close = pattern.find("]" if character == "[" else "}", position + 1)
            if close < 0:
                raise PlanError(f"Pattern {describe(pattern)} does not close its {character!r}.")
            body = pattern[position + 1 : close]
            parts.append(_one_of(pattern, body) if character == "[" else _alternatives(pattern, body))
            position = close + 1
            continue
        parts.append({"*": ".*", "?": "."}.get(character) or re.escape(character))
        position += 1
    return re.compile("".join(parts), re.DOTALL)


def _one_of(pattern: str, body: str) -> str:
    if not re.fullmatch(r"!?[A-Za-z0-9_.-]+", body):
        raise PlanError(f"Pattern {describe(pattern)} holds [{body}].", remedy="Allowed: letters, digits, _ . and a-z.")
    negated, characters = body.startswith("!"), body.removeprefix("!")
    try:
        re.compile(f"[{characters}]")
    except re.error as error:
        raise PlanError(f"Pattern {describe(pattern)} holds [{body}]: {error}.") from None
    return f"[{'^' if negated else ''}{characters}]"


def _alternatives(pattern: str, body: str) -> str:
    options: list[str] = []
    for option in body.split(","):
        bounds = re.fullmatch(r"(\d{1,9})-(\d{1,9})", option.strip())
        if bounds is None:
            options.append(re.escape(option.strip()))
            continue
        low, high = int(bounds[1]), int(bounds[2])
        if not low <= high < low + _MAX_RANGE:
            raise PlanError(
                f"Pattern {describe(pattern)} holds the range {option}.", remedy="Give low-high, low first."
            )
        options += map(str, range(low, high + 1))
    return f"(?:{'|'.join(options)})"


def _rank(rules: Sequence[Rule]) -> tuple[dict[str, Rule], list[tuple[Rule, re.Pattern[str]]]]:
    """Exact rules by name, and the patterns from the strongest to the weakest."""
    exact = {rule.pattern: rule for rule in rules if is_exact(rule.pattern)}
    patterns = [(index, rule) for index, rule in enumerate(rules) if not is_exact(rule.pattern)]
    patterns.sort(key=lambda item: (-specificity(item[1].pattern), -item[0]))
    return exact, [(rule, compile_pattern(rule.pattern)) for _, rule in patterns]


def _nearest(name: str, names: Iterable[str]) -> str:
    sample = list(names)[:20_000]
    close = difflib.get_close_matches(name, sample, n=3, cutoff=0.6) if len(name) < 256 else []
    if close:
        return "Did you mean " + " or ".join(repr(candidate) for candidate in close) + "?"
    return "`amalgam plan` lists the weights' names."
