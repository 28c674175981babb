"""Rules → which source each weight comes from, on which device it lies, and why.

In: logical weight names and rules (name or pattern → source). Out: `Choices`.
Must never know: files, tensors, layers.

Precedence: an exact name wins; then the most specific pattern, the one with the most literal characters; among equals
the later rule; then the default source. Sources and devices are decided apart, each by the
rules that say one.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from amalgam.composition.patterns import compile_pattern, idle_alternative, is_exact, specificity
from amalgam.config.placement import Rule
from amalgam.errors import PlanError, describe


@dataclass(frozen=True)
class Choice:
    """Where one weight comes from, and where it lies.

    Attributes:
        rule: that says the source; None: the default source applies.
        device: None: no rule says one.
        device_rule: that does.
    """

    name: str
    source: str
    rule: Rule | None
    device: str | None = None
    device_rule: Rule | None = None

    @property
    def reason(self) -> str:
        """One sentence for people."""
        if self.rule is None:
            return "no rule names it: default source"
        return "exact name" if is_exact(self.rule.pattern) else f"pattern {self.rule.pattern}"


@dataclass(frozen=True)
class Explanation:
    """A weight's choice with every rule that matches it, strongest first.

    Attributes:
        matching: those that say a source.
        placing: those that say a device.
    """

    choice: Choice
    matching: tuple[Rule, ...]
    default_source: str
    placing: tuple[Rule, ...] = ()

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
            PlanError: a pattern is malformed, or a rule matches no weight, with one of its alternatives neither.
        """
        self.rules = tuple(rules)
        self.default_source = default_source
        self._of_sources = _Ranked([rule for rule in self.rules if rule.source is not None])
        self._of_devices = _Ranked([rule for rule in self.rules if rule.device is not None])
        self._choices = {name: self._choose(name) for name in names}
        self._check_all_match()

    def __getitem__(self, name: str) -> Choice:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    @property
    def overridden(self) -> tuple[Rule, ...]:
        """Rules that decide for no weight, because a stronger one does for each that they match."""
        winners = self._winners()
        return tuple(rule for rule in self.rules if id(rule) not in winners)

    def explain(self, name: str) -> Explanation:
        """Which rule won for one weight, and over which others.

        Raises:
            PlanError: the model has no such weight; the message suggests the nearest names.
        """
        if name not in self._choices:
            raise PlanError(f"The model has no weight {describe(name)}.", remedy=_nearest(name, self._choices))
        return Explanation(
            self._choices[name], self._of_sources.matching(name), self.default_source, self._of_devices.matching(name)
        )

    def _choose(self, name: str) -> Choice:
        rule, placing = self._of_sources.first(name), self._of_devices.first(name)
        source = self.default_source if rule is None or rule.source is None else rule.source
        return Choice(name, source, rule, None if placing is None else placing.device, placing)

    def _winners(self) -> dict[int, list[str]]:
        """The id of each rule that decides → the weights that it decides for."""
        found: dict[int, list[str]] = defaultdict(list)
        for name, choice in self._choices.items():
            for rule in (choice.rule, choice.device_rule):
                if rule is not None:
                    found[id(rule)].append(name)
        return found

    def _check_all_match(self) -> None:
        winners = self._winners()
        for ranked in (self._of_sources, self._of_devices):
            for name in ranked.exact:
                if name not in self._choices:
                    raise PlanError(f"Rule {describe(name)} matches no weight.", remedy=_nearest(name, self._choices))
            for rule, regex in ranked.patterns:
                if id(rule) not in winners and not any(regex.fullmatch(name) for name in self._choices):
                    raise PlanError(
                        f"Rule {describe(rule.pattern)} matches no weight.",
                        remedy="`amalgam plan --all` lists the weights' names.",
                    )
                likely = chain(winners.get(id(rule), ()), self._choices)
                idle = idle_alternative(rule.pattern, likely, self._choices)
                if idle is not None:
                    raise PlanError(
                        f"Rule {describe(rule.pattern)} matches no weight with {describe(idle)}.",
                        remedy="Leave that out of its braces; `amalgam plan --all` lists the weights' names.",
                    )


class _Ranked:
    """Rules by strength.

    Attributes:
        exact: by name; of several the last.
        patterns: from the strongest to the weakest.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self.exact = {rule.pattern: rule for rule in rules if is_exact(rule.pattern)}
        patterns = [(index, rule) for index, rule in enumerate(rules) if not is_exact(rule.pattern)]
        patterns.sort(key=lambda item: (-specificity(item[1].pattern), -item[0]))
        self.patterns = [(rule, compile_pattern(rule.pattern)) for _, rule in patterns]

    def first(self, name: str) -> Rule | None:
        rule = self.exact.get(name)
        return rule or next((rule for rule, regex in self.patterns if regex.fullmatch(name)), None)

    def matching(self, name: str) -> tuple[Rule, ...]:
        exact = [rule for rule in reversed(self._rules) if rule.pattern == name]
        return (*exact, *(rule for rule, regex in self.patterns if regex.fullmatch(name)))


def _nearest(name: str, names: Iterable[str]) -> str:
    sample = list(names)[:20_000]
    close = difflib.get_close_matches(name, sample, n=3, cutoff=0.6) if len(name) < 256 else []
    if close:
        return "Did you mean " + " or ".join(repr(candidate) for candidate in close) + "?"
    return "`amalgam plan --all` lists the weights' names."
