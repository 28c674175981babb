"""The pace against machines whose steps take what a formula says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amalgam.engine.pace import Pace


def run(pace: Pace, seconds: Callable[[int, int], float], num_streams: int, num_steps: int) -> list[int]:
    """Prompt tokens of each step, while there is always a prompt."""
    taken = []
    for _ in range(num_steps):
        taken.append(pace.prompt_tokens_beside(num_streams))
        pace.add(num_streams, taken[-1], seconds(num_streams, taken[-1]))
    return taken


@pytest.mark.parametrize("cost", [0.00001, 0.0005, 0.01])
def test_steps_take_what_they_may(cost: float) -> None:
    def seconds(num_streams: int, num_prompt_tokens: int) -> float:
        return 0.02 + 0.001 * num_streams + cost * num_prompt_tokens

    for slowdown in (1.5, 2.0, 3.0):
        taken = run(Pace(slowdown, 1, 512), seconds, 32, 100)
        expected = min(max(int((slowdown - 1) * 0.052 / cost), 1), 512)
        assert max(taken[50:]) == pytest.approx(expected, abs=1)


def test_a_step_without_prompts_comes_first_and_now_and_then() -> None:
    taken = run(Pace(2.0, 16, 512), lambda streams, tokens: 0.1 + 0.001 * tokens, 8, 100)
    alone = [index for index, count in enumerate(taken) if count == 0]
    assert alone[0] == 0 and 0.02 < len(alone) / len(taken) < 0.1


def test_other_numbers_of_streams_have_their_own_times() -> None:
    def seconds(num_streams: int, num_prompt_tokens: int) -> float:
        return 0.004 * num_streams + 0.001 * num_prompt_tokens

    pace = Pace(2.0, 1, 512)
    few, many = run(pace, seconds, 4, 60), run(pace, seconds, 32, 60)
    assert (max(few[30:]), max(many[30:])) == (16, 128)
    assert max(run(pace, seconds, 4, 60)) == 16


def test_a_spoilt_measurement_is_not_believed_for_long() -> None:
    def seconds(num_streams: int, num_prompt_tokens: int) -> float:
        return 0.05 + 0.001 * num_prompt_tokens

    pace = Pace(2.0, 1, 512)
    run(pace, seconds, 8, 50)
    pace.add(8, 50, 30.0)
    assert pace.prompt_tokens_beside(8) in (0, *range(30, 51))
    assert max(run(pace, seconds, 8, 30)[20:]) == pytest.approx(50, abs=1)


def test_prompts_go_on_where_they_are_dear() -> None:
    taken = run(Pace(2.0, 16, 512), lambda streams, tokens: 0.001 + 1.0 * tokens, 1, 100)
    assert min(count for count in taken if count) == 16
