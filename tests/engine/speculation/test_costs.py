"""The cost model against machines and texts that are as a formula says."""

from __future__ import annotations

from functools import partial

import pytest

from amalgam.engine.speculation.costs import Candidate, CostModel, Experts, Fit
from amalgam.engine.speculation.looking import Looking
from amalgam.tools.speculation_costs import Costs, speed_up, tokens_of_step
from tests.engine.speculation.simulation import Traffic, simulate

ROWS = (1, 4)
MOE = partial(Costs, expert_share=0.6, num_experts=128, num_active=8)
MIXES = {
    "dense, one stream, a good draft": (Costs(draft=0.1, per_row=0.02), Traffic(1, [0.85])),
    "dense, one stream, a poor draft": (Costs(draft=0.3, per_row=0.02), Traffic(1, [0.3])),
    "dense, limited by arithmetic": (Costs(draft=0.3, draft_per_row=0.2, per_row=0.9), Traffic(16, [0.7])),
    "dense, many streams, copies": (Costs(per_row=0.02), Traffic(16, [0.9], coverage=0.7)),
    "dense, itself in 4 bits": (Costs(draft=0.3, per_row=0.02), Traffic(1, [0.95])),
    "experts, one stream, chat": (MOE(per_row=0.01), Traffic(1, [0.4], coverage=0.5)),
    "experts, one stream, copies": (MOE(per_row=0.01), Traffic(1, [0.97])),
    "experts, itself in 4 bits": (MOE(draft=0.35, per_row=0.01), Traffic(1, [0.9])),
    "experts that are read anyway": (MOE(per_row=0.01), Traffic(32, [0.8])),
    "experts, half of the requests copy": (MOE(per_row=0.05), Traffic(8, [0.98, 0.05])),
    "short steps, hardly anything to copy": (Costs(per_row=0.05), Traffic(4, [0.9], coverage=0.03, looking=0.12)),
    "short steps, much to copy": (Costs(per_row=0.05), Traffic(4, [0.9], coverage=0.6, looking=0.12)),
}


def test_a_sum_of_features_is_found_and_unknown_ones_are_0() -> None:
    fit = Fit(2)
    for rows in (1, 5, 2, 9, 4, 1, 3):
        fit.add((rows, rows**2), 3 + 2 * rows + 0.5 * rows**2)
    assert fit.predict(6, 36) == pytest.approx(33, rel=0.02)
    same = Fit(1)
    for _ in range(5):
        same.add((4,), 7.0)
    assert same.coefficients == pytest.approx((7.0, 0.0), abs=1e-9)
    falling = Fit(1)
    for x in (1, 2, 3):
        falling.add((x,), 10 - x)
    assert falling.coefficients[1] == 0


def test_who_looks_at_the_costs_does_not_disturb_the_step_thread() -> None:
    class Busy(Fit):
        """Another thread adds as soon as the coefficients are known."""

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "_coefficients" and value is not None:
                self.add((1,), 1.0)

    assert len(Busy(1).coefficients) == 2


def test_an_older_machine_is_forgotten() -> None:
    fit = Fit(1)
    for seconds in (1.0, 2.0):
        for index in range(400):
            fit.add((1 + index % 4,), seconds * (1 + index % 4))
    assert fit.predict(2) == pytest.approx(4.0, rel=0.02)


def test_a_machine_that_stood_still_is_the_same_afterwards() -> None:
    model = CostModel()
    for _ in range(50):
        for rows in (1, 2, 5):
            model.add_step(rows, 0.02 + 0.001 * rows)
            model.add_guess(rows, rows, 0.001 * rows)
    for _ in range(20):
        model.add_outcome(7, 4, 4)
    model.add_step(5, 60.0)
    model.add_guess(4, 4, 60.0)
    assert model.choose(1, 1, [Candidate(7, 4)]) == {7: 4}
    for _ in range(300):
        model.add_step(5, 2.0)
    assert model.seconds(5) == pytest.approx(2.0, rel=0.02), "it has become slower"


def test_rows_of_one_text_need_fewer_experts() -> None:
    experts = Experts(128, 8)
    assert [experts.predict(rows) for rows in ROWS] == pytest.approx([8, 29.1], rel=0.01)
    for _ in range(100):
        experts.add(1, 8.0)
        experts.add(4, 20.0)
    assert [experts.predict(rows) for rows in ROWS] == pytest.approx([8, 20], rel=0.01)
    assert [Experts(0, 0).predict(rows) for rows in ROWS] == [0, 0]


def test_what_costs_nothing_is_guessed_and_what_costs_too_much_is_not() -> None:
    for per_row, expected in ((0.0, 4), (2.0, 0)):
        model = CostModel()
        for _ in range(8):
            for rows in (1, 2, 5):
                model.add_step(rows, 1 + per_row * (rows - 1))
        assert model.choose(1, 1, [Candidate(7, 4)]).get(7, 0) == expected


def test_requests_are_told_apart() -> None:
    model = CostModel()
    for _ in range(20):
        for rows in (2, 6, 10):
            model.add_step(rows, 1 + 0.3 * rows)
        model.add_outcome(1, 4, 4)
        model.add_outcome(2, 4, 0)
    chosen = model.choose(2, 2, [Candidate(1, 4), Candidate(2, 4)])
    assert chosen == {1: 4}
    model.forget(1)
    assert model.chance(1) < 0.9, "a new request of the same number has no past"


def test_a_request_that_is_given_up_gets_another_chance() -> None:
    model = CostModel()
    for _ in range(20):
        for rows in (1, 2, 5):
            model.add_step(rows, 1 + 0.3 * rows)
        model.add_outcome(1, 4, 0)
    chosen = [model.choose(1, 1, [Candidate(1, 4)]) for _ in range(100)]
    assert 2 <= chosen.count({1: 1}) <= 4 and chosen.count({}) == 100 - chosen.count({1: 1})


def test_a_slow_first_guess_is_not_the_last() -> None:
    model = CostModel()
    for _ in range(20):
        for rows in (1, 2, 5):
            model.add_step(rows, 1.0)
    for _ in range(2):
        model.add_guess(4, 4, 50.0)
    assert model.choose(1, 1, [Candidate(1, 4)]) == {1: 4}
    model.add_guess(4, 4, 50.0)  # the machine stood still for once
    chosen = [model.choose(1, 1, [Candidate(1, 4)]) for _ in range(400)]
    assert chosen.count({1: 1}) == 5, "each 32nd of those after the 256th"


def test_long_prompts_are_not_computed_for_short_answers() -> None:
    model = CostModel()
    for _ in range(20):
        for rows in (1, 2, 5):
            model.add_step(rows, 1.0)
        model.add_guess(4, 4, 0.4)
        model.add_guess(4, 24, 0.6)
    assert model.choose(1, 1, [Candidate(1, 4, num_missing=2000, num_left=5)]) == {}
    assert model.choose(1, 1, [Candidate(2, 4, num_missing=2000, num_left=2000)]) == {2: 4}


def test_the_better_of_on_and_off_is_chosen() -> None:
    won = {}
    for name, (costs, traffic) in MIXES.items():
        off, on, adaptive = (simulate(costs, traffic, mode, num_steps=500) for mode in ("off", "always", "adaptive"))
        won[name] = adaptive / max(off, on)
    assert sum(ratio > 0.97 for ratio in won.values()) >= 11, won
    assert won["experts, half of the requests copy"] > 1.02, "neither is best: each request has its own"


def test_looking_in_vain_takes_a_hundredth_of_the_time() -> None:
    looking = Looking()
    for _ in range(8):
        looking.add_plain(2, 1.0)
    looks = rests = 0
    for _ in range(4000):
        if looking.rests():
            rests += 1
        else:
            looks += 1
            looking.add_trial(2, 2, 1.25)
    assert looking.gain == pytest.approx(0.8)
    assert 0.005 < 0.25 * looks / (1.25 * looks + rests) < 0.013, "the last trial is without its rest"
    for _ in range(2000):  # then it brings something
        if not looking.rests():
            looking.add_trial(2, 4, 1.25)
    assert looking.gain == pytest.approx(1.6) and not looking.rests()


def test_long_steps_are_always_looked_at() -> None:
    looking = Looking()
    looking.add_plain(1, 1.0)
    for _ in range(500):
        assert not looking.rests()
        looking.add_trial(1, 1, 1.009)


@pytest.mark.parametrize("stalled", ["without guesses", "with guesses"])
def test_a_machine_that_stood_still_says_nothing_of_looking(stalled: str) -> None:
    model = CostModel()
    for number in range(40):
        model.add_step(1 + number % 2, 1.0)
        model.add_plain(1, 1000.0 if stalled == "without guesses" and number == 30 else 1.0)
    for number in range(32):
        model.add_trial(1, 2, 2, 1000.0 if stalled == "with guesses" and number == 7 else 1.25)
    assert model.describe()["gain"] == pytest.approx(1.6, rel=0.1)


def test_the_arithmetic_of_one_sequence() -> None:
    assert tokens_of_step(0.5, 2) == 1.75
    assert tokens_of_step(1.0, 4) == 5
    dense = Costs(draft=0.1)
    assert speed_up(dense, 0.8, 5) == pytest.approx((1 - 0.8**6) / 0.2 / 1.5)
    # Verifying 4 rows of a layer with 128 experts, of which a token needs 8, reads 3.6 times as many.
    moe = Costs(expert_share=1.0, num_experts=128, num_active=8)
    assert moe.step(4) == pytest.approx(3.64, abs=0.01)
    assert speed_up(moe, 0.9, 3) < 1
