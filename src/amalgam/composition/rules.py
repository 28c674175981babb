"""Rules → which source each weight comes from, and why.

In: logical weight names and rules (name or pattern → source). Out: `Choices`.
Must never know: files, tensors, layers.

Precedence: an exact name wins; then the most specific pattern, the one with the most literal characters; among equals
the later rule; then the default source.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from amalgam.composition.patterns import compile_pattern, is_exact, specificity
from amalgam.config.settings import Rule
from amalgam.errors import PlanError, describe


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


class Choices(Mapping[str, Choice]):
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
