"""What speculation brings: by arithmetic before anybody tries, and measured, with and without in turns.

In: costs, or a running engine. Out: tables as rows. Must never know: files, HTTP.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from amalgam.composition.progress import Progress
from amalgam.engine.core import Engine
from amalgam.engine.meter import SpeculationCounts
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Request
from amalgam.engine.speculation.costs import CostModel
from amalgam.engine.speculation.proposer import Wanted
from amalgam.engine.speculation.speculator import Speculator
from amalgam.errors import ConfigError
from amalgam.models.spec import ModelSpec
from amalgam.tools.speculation_costs import Costs, speed_up

CHANCES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
LENGTHS = (1, 2, 3, 4, 6, 8)
Mode = Literal["off", "always", "adaptive"]
MODES: tuple[Mode, ...] = ("off", "always", "adaptive")

_CODE = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius * shape.radius
    if shape.kind == "square":
        return shape.side * shape.side
    if shape.kind == "triangle":
        return shape.base * shape.height / 2
    return 0
"""
PROMPTS = {  # what is guessed well, and what is not
    "copies": f"Here is some code:\n\n{_CODE}\nThe same code once more, word for word:\n\n{_CODE[:60]}",
    "prose": "The old man had lived by the sea for all of his life, and every morning he went down to the harbour. One",
}


def simulated(costs: Costs) -> list[tuple[float, list[float]]]:
    """For each of `CHANCES` the speed-up of one sequence with each of `LENGTHS` guesses."""
    return [(chance, [speed_up(costs, chance, length) for length in LENGTHS]) for chance in CHANCES]


def costs_of(spec: ModelSpec, draft: float, per_row: float) -> Costs:
    """A model whose steps take as long as reading what they need, experts chosen independently.

    Args:
        draft, per_row: see `Costs`.
    """
    if not spec.num_experts:
        return Costs(draft=draft, per_row=per_row)
    experts = sum(math.prod(slot.shape) for slot in spec.slots if ".experts." in slot.name)
    active = experts * spec.num_active_experts / spec.num_experts
    share = active / spec.num_active_parameters
    return Costs(draft, 0.0, per_row, share, spec.num_experts, spec.num_active_experts)


@dataclass(frozen=True)
class Measured:
    """One mode of one kind of prompt, so many sequences together.

    Attributes:
        tokens_per_second: of all of them, prompts left out; the median of the rounds.
        by_off: the median of its ratios to the same round without guesses.
        acceptance: share of the guesses that came true; None: there were none.
        declined: share of the times that guesses would not have paid; None: nothing was guessed.
        num_tokens_per_step: what a request got of a step, on average.
    """

    prompt: str
    num_sequences: int
    mode: Mode
    tokens_per_second: float
    by_off: float
    acceptance: float | None
    declined: float | None
    num_tokens_per_step: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Round:
    tokens_per_second: float
    token_ids: list[tuple[int, ...]]


class KnownAnswers:
    """Guesses answers that it has been told, each token right with a given chance: the same `Proposer` for any model.

    Args:
        chance: that a guess comes true, if those before it do.
        vocab_size: of the model.
    """

    is_free = True
    num_computed = 0

    def __init__(self, chance: float, vocab_size: int) -> None:
        self._rng = random.Random(0)
        self._chance = chance
        self._vocab_size = vocab_size
        self.answers: dict[int, tuple[int, ...]] = {}  # by the request's seed

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Sequence[int]]:
        """See `Proposer.propose`."""
        return {request.request_id: self._guess(request, num_tokens) for request, num_tokens in wanted}

    def num_missing(self, request: Request) -> int:
        """See `Proposer.num_missing`."""
        return 0

    def forget(self, request_id: int) -> None:
        """See `Proposer.forget`."""

    def _guess(self, request: Request, num_tokens: int) -> list[int]:
        start = request.num_new_tokens
        known = self.answers.get(request.seed, ())[start : start + num_tokens]
        return [
            token_id if self._rng.random() < self._chance else (token_id + 1) % self._vocab_size for token_id in known
        ]


def measure_chances(
    engine: Engine,
    spec: ModelSpec,
    prompts: Mapping[str, Sequence[int]],
    chances: Sequence[float],
    num_guesses: int,
    **chosen: Any,
) -> list[Measured]:
    """What guesses would bring that come true with each of `chances`, and cost nothing themselves.

    Args:
        num_guesses: most of them for a sequence in a step.
        chosen: see `measure`.
    """
    before, rows = engine.speculator, []
    try:
        for chance in chances:
            proposer = KnownAnswers(chance, spec.vocab_size)
            costs = CostModel(spec.num_experts, spec.num_active_experts)
            engine.speculator = Speculator("known", proposer, num_guesses, spec.vocab_size, costs)
            for name, prompt_ids in prompts.items():
                proposer.answers = {}
                longest = _run(engine, prompt_ids, max(chosen["batches"]), chosen["num_tokens"], guesses=False)
                proposer.answers = dict(enumerate(longest.token_ids))
                rows += measure(engine, {f"{name}, {chance:.0%} true": prompt_ids}, **chosen)
    finally:
        engine.speculator = before
    return rows


def measure(
    engine: Engine,
    prompts: Mapping[str, Sequence[int]],
    *,
    batches: Sequence[int],
    num_tokens: int,
    repeats: int,
    progress: Progress,
) -> list[Measured]:
    """Answers to each prompt, without guesses, with all, and with those that pay, in turns. Nothing else may run.

    Raises:
        ConfigError: the engine guesses nothing.
        AssertionError: an answer differs.
    """
    speculator = engine.speculator
    if speculator is None:
        raise ConfigError("Nothing is guessed.", remedy="Give --speculation ngram, self or draft.")
    model = speculator.costs
    done, total = 0, len(prompts) * len(batches) * (repeats + 1) * len(MODES)
    rows: list[Measured] = []
    for name, prompt_ids in prompts.items():
        for count in batches:
            rounds: dict[Mode, list[_Round]] = {"off": [], "always": [], "adaptive": []}
            spent: dict[Mode, SpeculationCounts] = dict.fromkeys(rounds, SpeculationCounts())
            for index in range(repeats + 1):  # the first one warms up, and lets the costs be learned
                for mode in MODES[:: 1 if index % 2 else -1]:  # on and off change places
                    # Only while nothing runs, so that the step thread does not see the change amid a step.
                    speculator.costs = None if mode == "always" else model
                    before = speculator.counts
                    found = _run(engine, prompt_ids, count, num_tokens, guesses=mode != "off")
                    if index:
                        rounds[mode].append(found)
                        spent[mode] = _sum(spent[mode], before, speculator.counts)
                    done += 1
                    progress("rounds", done, total)
            speculator.costs = model
            answers = {tuple(one.token_ids) for kept in rounds.values() for one in kept}
            assert len(answers) == 1, f"answers to {name!r} differ with and without guesses"
            rows += [_measured(name, count, mode, rounds, spent[mode]) for mode in rounds]
    return rows


def _run(engine: Engine, prompt_ids: Sequence[int], count: int, num_tokens: int, *, guesses: bool) -> _Round:
    """Sampled, but for the first sequence, so that each has a text of its own."""
    params = [
        SamplingParams(
            max_new_tokens=num_tokens, do_sample=index > 0, temperature=1.0, seed=index, ignore_eos=True,
            speculate=guesses,
        )
        for index in range(count)
    ]  # fmt: skip
    started = time.perf_counter()
    answers = engine.generate([prompt_ids] * count, params)
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    seconds = time.perf_counter() - started - max(answer.usage.first_token_seconds for answer in answers)
    given = sum(len(answer.token_ids) - 1 for answer in answers)
    return _Round(given / max(seconds, 1e-9), [answer.token_ids for answer in answers])


def _sum(total: SpeculationCounts, before: SpeculationCounts, after: SpeculationCounts) -> SpeculationCounts:
    return SpeculationCounts(
        num_drafts=total.num_drafts + after.num_drafts - before.num_drafts,
        num_proposed=total.num_proposed + after.num_proposed - before.num_proposed,
        num_accepted=total.num_accepted + after.num_accepted - before.num_accepted,
        num_declined=total.num_declined + after.num_declined - before.num_declined,
    )


def _measured(
    name: str, count: int, mode: Mode, rounds: dict[Mode, list[_Round]], spent: SpeculationCounts
) -> Measured:
    speeds, off = ([one.tokens_per_second for one in rounds[each]] for each in (mode, "off"))
    num_tokens = sum(len(token_ids) - 1 for one in rounds[mode] for token_ids in one.token_ids)
    asked = spent.num_drafts + spent.num_declined
    return Measured(
        prompt=name,
        num_sequences=count,
        mode=mode,
        tokens_per_second=median(speeds),
        by_off=median(mine / other for mine, other in zip(speeds, off, strict=True)),
        acceptance=spent.acceptance,
        declined=spent.num_declined / asked if asked else None,
        num_tokens_per_step=num_tokens / max(num_tokens - spent.num_accepted, 1),
    )
