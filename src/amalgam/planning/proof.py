"""Whether a plan is better than what anybody would have taken, on texts that it was not made with.

In: choices, a reference on held-out texts. Out: a `Verdict`. Must never know: how a choice was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from amalgam.base.counting import counted
from amalgam.composition.planned import PlannedWeight
from amalgam.composition.progress import Progress
from amalgam.errors import ConfigError
from amalgam.evaluation.confidence import MIN_UNITS, Bootstrap, Floats, Interval
from amalgam.evaluation.quality import Figures, Quality, Reference, summarise
from amalgam.evaluation.texts import Sample
from amalgam.planning.problem import Problem


class Scale:
    """Measures choices on one sample; each choice once.

    Raises:
        ConfigError: the sample is too small for confidence.
    """

    def __init__(self, problem: Problem, reference: Reference, progress: Progress | None = None) -> None:
        check_units(reference.sample)
        self.problem = problem
        self.reference = reference
        self._progress = progress
        self._base = reference.contestant.loader.plan(())
        self._candidates: dict[tuple[str, str], PlannedWeight] = {}
        self._found: dict[tuple[int, ...], Figures] = {}
        self.bootstrap: Bootstrap | None = None

    def figures(self, name: str, choice: Sequence[int]) -> Figures:
        """Of every token.

        Raises:
            CheckpointError: hidden states or logits hold NaN or infinity.
        """
        key = tuple(choice)
        if key not in self._found:
            plan = self.reference.contestant.with_plan(name, self._planned(choice))
            self._found[key] = self.reference.figures(plan, self._progress)
            if self.bootstrap is None:
                self.bootstrap = Bootstrap(self._found[key].units)
        return self._found[key]

    def _planned(self, choice: Sequence[int]) -> list[PlannedWeight]:
        """Without comparing its sources with each other: each was compared with base when the problem was made."""
        mapping = self.problem.mapping(choice)
        return [self._candidate(mapping[w.choice.name], w) if w.choice.name in mapping else w for w in self._base]

    def _candidate(self, source: str, base: PlannedWeight) -> PlannedWeight:
        key = base.choice.name, source
        if key not in self._candidates:
            found = self.reference.contestant.loader.candidate(*key)
            assert found is not None, key
            self._candidates[key] = found
        return self._candidates[key]

    def divergence(self, name: str, choice: Sequence[int]) -> Interval:
        """The mean, with its confidence interval."""
        values = self.figures(name, choice).divergence
        assert self.bootstrap is not None
        return self.bootstrap.mean(values)

    def quality(self, name: str, choice: Sequence[int]) -> Quality:
        return summarise(self.figures(name, choice))

    def difference(self, one: Sequence[int], other: Sequence[int]) -> Interval:
        """mean(one) / mean(other) - 1, paired by the units of the text."""
        first, second = (self.figures("", choice).divergence for choice in (one, other))
        assert self.bootstrap is not None
        return self.bootstrap.ratio_of_means(first, second)

    def mean_difference(self, one: Sequence[int], other: Sequence[int]) -> tuple[float, float]:
        """mean(one) - mean(other), and the standard error of that."""
        first, second = (self.figures("", choice).divergence for choice in (one, other))
        assert self.bootstrap is not None
        draws: Floats = self.bootstrap.means(first - second)
        return float((first - second).mean()), float(draws.std())


def check_units(sample: Sample) -> None:
    """
    Raises:
        ConfigError: the sample is too small for confidence.
    """
    if sample.num_units < MIN_UNITS:
        raise ConfigError(
            f"The text has {counted(sample.num_units, sample.unit.removesuffix('s'))}, too few for confidence.",
            remedy=f"Give at least {MIN_UNITS} documents, or longer ones.",
        )


@dataclass(frozen=True)
class Rival:
    """What the plan was measured against.

    Attributes:
        difference: the plan's divergence to this one's, less 1.
    """

    name: str
    kind: str
    choice: tuple[int, ...]
    divergence: Interval
    difference: Interval


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    is_accepted: the plan's divergence is below that of each rival that decides, with confidence; where none does, it
        is the only plan there is to return.
    chosen: `plan`, or the name of the best rival that decides, which is returned then.
    """

    is_accepted: bool
    chosen: str
    choice: tuple[int, ...]
    divergence: Interval
    rivals: tuple[Rival, ...] = field(default_factory=tuple)


def judge(scale: Scale, plan: Sequence[int], rivals: Mapping[str, Mapping[str, Sequence[int]]]) -> Verdict:
    """
    Args:
        rivals: kind → name → choice. Of each kind the best one counts. Those of the kinds uniform and hand recipe
            decide; others are measured for comparison.
    """
    divergence = scale.divergence("plan", plan)
    found: list[Rival] = []
    for kind, choices in rivals.items():
        if not choices:
            continue
        measured = {name: scale.divergence(name, choice) for name, choice in choices.items()}
        best = min(measured, key=lambda name: measured[name].value)
        choice = tuple(choices[best])
        found.append(Rival(best, kind, choice, measured[best], scale.difference(plan, choice)))
    deciding = deciding_of(found)
    is_accepted = all(rival.difference.is_below_zero for rival in deciding)
    if is_accepted:
        return Verdict(True, "plan", tuple(plan), divergence, tuple(found))
    best_rival = min(deciding, key=lambda rival: rival.divergence.value)
    return Verdict(False, best_rival.name, best_rival.choice, best_rival.divergence, tuple(found))


def deciding_of(rivals: Iterable[Rival]) -> list[Rival]:
    """Those that a plan has to beat; none where the budget has room for no such rival."""
    return [rival for rival in rivals if rival.kind in DECIDING]


UNIFORM, HAND = "uniform", "hand recipe"
DECIDING = {UNIFORM: "uniform plan", HAND: "hand recipe"}  # kind → what one of them is called
