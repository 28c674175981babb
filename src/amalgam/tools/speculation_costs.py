"""What speculation would bring, before anybody tries: arithmetic for one sequence.

In: what steps and guesses take, how often guesses come true. Out: speed-ups. Must never know: models, clocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from amalgam.engine.speculation.costs import distinct_experts


def tokens_of_step(chance: float, num_tokens: int) -> float:
    """How many tokens a step gives on average that has so many guesses, each of which comes true with `chance` if those
    before it do: `1 + p + … + p^k` (Leviathan et al., 2023).
    """
    return float(sum(chance**place for place in range(num_tokens + 1)))


@dataclass(frozen=True)
class Costs:
    """What steps and guesses take, in units of a step of one row.

    A step reads its weights once: `expert_share` of what one row needs are experts, of which more rows need more, and
    the rest serves all rows. Each row beyond the first adds `per_row` for arithmetic.

    Attributes:
        draft: a step of the draft with one row.
        draft_per_row: each further row of it.
        num_experts, num_active: of a layer, and how many of them a token needs; 0: there are none.
    """

    draft: float = 0.0
    draft_per_row: float = 0.0
    per_row: float = 0.0
    expert_share: float = 0.0
    num_experts: int = 0
    num_active: int = 0

    def step(self, num_rows: int) -> float:
        """A step of so many rows."""
        experts = 1.0
        if self.num_experts:
            experts = distinct_experts(self.num_experts, self.num_active, num_rows) / self.num_active
        return 1 + self.expert_share * (experts - 1) + self.per_row * (num_rows - 1)

    def guess(self, num_steps: int, num_tokens: int) -> float:
        """So many steps of the draft, of so many rows in all."""
        return self.draft * num_steps + self.draft_per_row * (num_tokens - num_steps)


def speed_up(costs: Costs, chance: float, num_tokens: int) -> float:
    """Tokens a second of one sequence with guesses, by tokens a second without."""
    seconds = costs.step(1 + num_tokens) + costs.guess(num_tokens, num_tokens)
    return tokens_of_step(chance, num_tokens) / seconds
