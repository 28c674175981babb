"""A server in miniature, whose steps and guesses take what a formula says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from amalgam.engine.speculation.costs import Candidate, CostModel
from amalgam.tools.speculation_costs import Costs

Mode = Literal["off", "always", "adaptive"]


@dataclass(frozen=True)
class Traffic:
    """Requests that are always there.

    Attributes:
        num_streams: that run at a time.
        chances: that a guess comes true, of each kind of request; kinds come equally often.
        answer_tokens: of a request, on average.
        coverage: how often there is something to guess.
        looking: what it takes to look for guesses, in the time of a step of one row.
    """

    num_streams: int
    chances: Sequence[float]
    answer_tokens: int = 200
    coverage: float = 1.0
    looking: float = 0.0


def simulate(
    costs: Costs, traffic: Traffic, mode: Mode, num_tokens: int = 4, num_steps: int = 2000, seed: int = 0
) -> float:
    """Tokens in the time of a step of one row.

    Args:
        mode: no guesses; all that may be made; or those that a cost model chooses that learns from what it sees.
        num_tokens: most guesses for a request in a step.
    """
    rng = random.Random(seed)
    model = CostModel(costs.num_experts, costs.num_active)
    is_free = not costs.draft
    next_id = 0
    streams: dict[int, tuple[float, int]] = {}  # request → its chance, and tokens left
    num_given, elapsed = 0, 0.0
    for _ in range(num_steps):
        while len(streams) < traffic.num_streams:
            length = 1 + int(rng.expovariate(1 / traffic.answer_tokens))
            streams[next_id] = rng.choice(traffic.chances), length
            next_id += 1
        candidates = [
            Candidate(request_id, min(num_tokens, left - 1), 0 if is_free else 1, left)
            for request_id, (_, left) in streams.items()
            if left > 1 and rng.random() < traffic.coverage
        ]
        looks = mode == "always" or (mode == "adaptive" and not model.rests())
        chosen = {one.request_id: one.num_tokens for one in candidates} if mode == "always" else {}
        if looks and mode == "adaptive":
            chosen = model.choose(len(streams), len(streams), candidates)
        guess_seconds = costs.guess(max(chosen.values(), default=0), sum(chosen.values()))
        num_rows = len(streams) + sum(chosen.values())
        if mode == "adaptive" and chosen and not is_free:
            model.add_guess(max(chosen.values()), sum(chosen.values()), guess_seconds)
        looking = traffic.looking if looks else 0.0
        elapsed += looking + guess_seconds + costs.step(num_rows)
        num_before, num_streams = num_given, len(streams)
        if mode == "adaptive" and looks:
            model.add_step(num_rows, costs.step(num_rows))
        if mode == "adaptive" and not chosen:
            model.add_plain(num_streams, costs.step(num_rows))
        for request_id, (chance, left) in list(streams.items()):
            num_proposed = chosen.get(request_id, 0)
            num_true = 0
            while num_true < num_proposed and rng.random() < chance:
                num_true += 1
            num_given += 1 + num_true
            if left > 1 + num_true:
                streams[request_id] = chance, left - 1 - num_true
                if num_proposed:
                    model.add_outcome(request_id, num_proposed, num_true)
            else:
                del streams[request_id]
                model.forget(request_id)
        if mode == "adaptive" and looks:
            seconds = looking + guess_seconds + costs.step(num_rows)
            model.add_trial(num_streams, num_rows, num_given - num_before, seconds)
    return num_given / elapsed
