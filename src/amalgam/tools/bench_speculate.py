"""What speculation brings: by arithmetic before anybody tries, and measured, with and without in turns.

In: costs, or a running deployment that guesses. Out: tables as rows. Must never know: files, HTTP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from amalgam.composition.progress import Progress
from amalgam.engine.meter import SpeculationCounts
from amalgam.engine.params import SamplingParams
from amalgam.engine.speculation.simulation import Costs, speed_up
from amalgam.errors import ConfigError
from amalgam.models.spec import ModelSpec
from amalgam.runtime.deployment import Deployment

CHANCES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
LENGTHS = (1, 2, 3, 4, 6, 8)
MODES = ("off", "always", "adaptive")

Mode = Literal["off", "always", "adaptive"]

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


def measure(
    deployment: Deployment, batches: Sequence[int], num_tokens: int, repeats: int, progress: Progress
) -> list[Measured]:
    """Greedy answers to each of `PROMPTS`, without guesses, with all, and with those that pay, in turns.

    Raises:
        ConfigError: the deployment guesses nothing.
        AssertionError: an answer differs.
    """
    speculator = deployment.engine.speculator
    if speculator is None:
        raise ConfigError("Nothing is guessed.", remedy="Give --speculation ngram, self or draft.")
    model = speculator.costs
    done, total = 0, len(PROMPTS) * len(batches) * (repeats + 1) * len(MODES)
    rows: list[Measured] = []
    for name, text in PROMPTS.items():
        prompt_ids = deployment.tokenizer.encode(text)
        for count in batches:
            rounds: dict[Mode, list[_Round]] = {"off": [], "always": [], "adaptive": []}
            spent: dict[Mode, SpeculationCounts] = dict.fromkeys(rounds, SpeculationCounts())
            for index in range(repeats + 1):  # the first one warms up, and lets the costs be learned
                for mode, kept in rounds.items():
                    # Only while nothing runs, so that the step thread does not see the change amid a step.
                    speculator.costs = None if mode == "always" else model
                    before = speculator.counts
                    found = _run(deployment, prompt_ids, count, num_tokens, guesses=mode != "off")
                    if index:
                        kept.append(found)
                        spent[mode] = _sum(spent[mode], before, speculator.counts)
                    done += 1
                    progress("rounds", done, total)
            speculator.costs = model
            answers = {tuple(map(tuple, one.token_ids)) for kept in rounds.values() for one in kept}
            assert len(answers) == 1, f"answers to {name!r} differ with and without guesses"
            rows += [_measured(name, count, mode, rounds, spent[mode]) for mode in rounds]
    return rows


def _run(deployment: Deployment, prompt_ids: Sequence[int], count: int, num_tokens: int, *, guesses: bool) -> _Round:
    params = SamplingParams(max_new_tokens=num_tokens, do_sample=False, ignore_eos=True, speculate=guesses)
    started = time.perf_counter()
    answers = deployment.engine.generate([prompt_ids] * count, params)
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
