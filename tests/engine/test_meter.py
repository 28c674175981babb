"""The meter counts, keeps ten minutes, and no more."""

from __future__ import annotations

import pytest

from amalgam.base import clock as base
from amalgam.engine.meter import NUM_LATENCIES, NUM_POINTS, POINT_SECONDS, Counts, Level, Load, Meter
from amalgam.engine.request import FinishReason, RequestOutput, Usage


class Clock:
    now = 1000.0
    ahead = 0.0  # what the wall clock has been set forward by

    @property
    def system(self) -> base.Clock:
        return base.Clock(lambda: self.now + self.ahead, lambda: self.now - 77)


def finished(num_new: int = 5, first: float = 0.2, total: float = 1.0) -> RequestOutput:
    return RequestOutput(1, "", (), FinishReason.LENGTH, usage=Usage(3, num_new, 0.0, first, total, 1))


def test_steps_of_one_point_are_added_up() -> None:
    clock = Clock()
    meter = Meter(clock.system)
    meter.add_step(10, 1)
    clock.now += POINT_SECONDS / 2
    meter.add_step(0, 2)
    reading = meter.read()
    [point] = reading.points
    assert (point.num_prompt_tokens, point.num_new_tokens) == (10, 3)
    assert (reading.num_prompt_tokens, reading.num_new_tokens) == (10, 3)


def test_the_load_is_weighted_by_time_and_keeps_its_peak() -> None:
    """Half a second of eight requests is no "8" and no "0", whoever looks and when."""
    clock = Clock()
    meter = Meter(clock.system)
    clock.now += 0.5
    meter.set_load(Load(8, 3, 40))
    clock.now += 0.25
    watched = [meter.read() for _ in range(3)]  # reading changes nothing
    clock.now += 0.25
    meter.set_load(Load(0, 0, 4))
    clock.now += 1.5
    first, second = meter.read().points
    assert all(reading.points[0].running == Level(8 / 3, 8) for reading in watched)
    assert (first.running, first.waiting) == (Level(8 * 0.5 / POINT_SECONDS, 8), Level(3 * 0.5 / POINT_SECONDS, 3))
    assert first.used_blocks == Level((40 * 0.5 + 4 * 1.0) / POINT_SECONDS, 40)
    assert (second.running, second.used_blocks) == (Level(0, 0), Level(4, 4))


def test_a_load_over_several_points_counts_in_each() -> None:
    clock = Clock()
    clock.now += 1.5
    meter = Meter(clock.system)  # begins within a point: what was before does not lower the mean
    meter.set_load(Load(2))
    clock.now += 2 * POINT_SECONDS
    meter.set_load(Load(6))
    clock.now += 0.5
    points = meter.read().points
    assert [point.time for point in points] == [1000, 1002, 1004, 1006]
    assert [point.running for point in points] == [
        Level(2, 2),
        Level(2, 2),
        Level((2 * 1.5 + 6 * 0.5) / 2, 6),
        Level(6, 6),
    ]


def test_gaps_are_filled_with_nothing_computed_in_the_same_state() -> None:
    clock = Clock()
    meter = Meter(clock.system)
    meter.set_load(Load(2, 3, 4))
    meter.add_step(10, 1)
    clock.now += 5 * POINT_SECONDS
    points = meter.read().points
    assert [point.time for point in points] == [1000 + POINT_SECONDS * index for index in range(6)]
    assert [point.num_new_tokens for point in points] == [1, 0, 0, 0, 0, 0]
    assert {point.running for point in points} == {Level(2, 2)}


def test_memory_is_bounded_and_old_points_leave() -> None:
    clock = Clock()
    meter = Meter(clock.system)
    for _ in range(1000):
        clock.now += POINT_SECONDS
        meter.add_step(1, 1)
        for _ in range(5):
            meter.add_finished(finished())
    reading = meter.read()
    assert len(reading.points) == NUM_POINTS
    assert len(reading.latencies) <= NUM_LATENCIES
    assert reading.points[-1].time - reading.points[0].time == (NUM_POINTS - 1) * POINT_SECONDS
    clock.now += 3600
    reading = meter.read()
    assert len(reading.points) == NUM_POINTS and not any(point.num_new_tokens for point in reading.points)
    assert reading.latencies == []
    assert reading.num_new_tokens == 1000 and reading.finished == {FinishReason.LENGTH: 5000}


def test_latencies_of_requests_with_tokens_only() -> None:
    meter = Meter(Clock().system)
    meter.add_finished(finished())
    meter.add_finished(finished(num_new=1, first=0.3, total=0.3))
    meter.add_finished(finished(num_new=0))
    meter.add_finished(RequestOutput(1, "", (), FinishReason.ERROR))
    reading = meter.read()
    assert [latency.per_token for latency in reading.latencies] == [0.2, None]
    assert sum(reading.first_token.counts) == 2 and sum(reading.per_token.counts) == 1
    assert reading.first_token.sum == 0.5
    assert reading.finished == {FinishReason.LENGTH: 3, FinishReason.ERROR: 1}


@pytest.mark.parametrize("step", [-3600.0, -5.0, 5.0, 3600.0])
def test_a_clock_that_is_set_moves_all_points_alike(step: float) -> None:
    clock = Clock()
    meter = Meter(clock.system)
    clock.now += 100
    meter.add_step(1, 1)
    meter.add_finished(finished())
    before = meter.read()
    clock.ahead = step
    clock.now += 10 * POINT_SECONDS
    meter.add_step(1, 1)
    reading = meter.read()
    assert reading.now == before.now + 10 * POINT_SECONDS + step
    assert reading.points[0].time == before.points[0].time + step
    assert len(reading.points) == len(before.points) + 10 and sum(point.num_new_tokens for point in reading.points) == 2
    assert len(reading.latencies) == 1


def test_where_a_request_spent_its_time() -> None:
    meter = Meter(Clock().system)
    meter.add_finished(RequestOutput(1, "", (), FinishReason.STOP, usage=Usage(30, 5, 0.5, 2.0, 6.0, 1)))
    meter.add_finished(RequestOutput(2, "", (), FinishReason.CANCELLED, usage=Usage(30, 0, 9.0, 9.0, 9.0, 0)))
    reading = meter.read()
    sums = [part.sum for part in (reading.queue, reading.prompt, reading.answer, reading.first_token, reading.total)]
    assert sums == [0.5, 1.5, 4.0, 2.0, 6.0]  # the second one never had a step
    assert reading.inference.sum == 5.5  # prompt and answer
    assert (reading.prompt_lengths.sum, reading.answer_lengths.sum) == (30, 5)


def test_steps_and_what_the_scheduler_did() -> None:
    meter = Meter(Clock().system)
    meter.add_step(3, 2, num_tokens=40, seconds=0.25, gaps=[0.25, 0.5])
    meter.add_step(0, 1)  # failed: it has no duration
    meter.set_load(Load(), Counts(1, 20, 16))
    meter.set_load(Load(2))
    reading = meter.read()
    assert (reading.step.sum, sum(reading.step.counts), reading.step_tokens.sum) == (0.25, 1, 40)
    assert (reading.inter_token.sum, sum(reading.inter_token.counts)) == (0.75, 2)
    assert reading.counts == Counts(1, 20, 16)
    assert reading.distinct_experts is None


def test_latencies_begin_before_the_prompt_is_encoded_and_the_queue_behind_it():
    meter = Meter()
    usage = Usage(30, 5, 0.5, 4.0, 8.0, 1, encoding_seconds=2.0)
    meter.add_finished(RequestOutput(1, "", (), FinishReason.STOP, usage=usage))
    reading = meter.read()
    sums = [histogram.sum for histogram in (reading.first_token, reading.total, reading.queue, reading.prompt)]
    assert sums == [4.0, 8.0, 0.5, 1.5]
