"""Steady time and the wall clock."""

from __future__ import annotations

import time
from functools import partial

import pytest

from amalgam.base.clock import Clock, steady_seconds


def test_the_system_s_clocks_agree() -> None:
    clock = Clock()
    assert abs(clock.now() - time.time()) < 1
    assert clock.shift() == 0
    boot_time = getattr(time, "CLOCK_BOOTTIME", None)
    read = time.monotonic if boot_time is None else partial(time.clock_gettime, boot_time)
    before = read()
    assert before <= steady_seconds() <= read()


@pytest.mark.parametrize("step", [-86400.0, -0.5, 0.5, 86400.0])
def test_the_wall_clock_is_set(step: float) -> None:
    wall, steady = 1000.0, 5.0
    clock = Clock(lambda: wall, lambda: steady)
    assert (clock.now(), clock.shift()) == (1000.0, 0.0)
    steady += 10
    wall += 10 + step
    assert (clock.now(), clock.shift()) == (1010.0, step)


def test_noise_moves_nothing() -> None:
    wall = 1000.0
    clock = Clock(lambda: wall, lambda: 5.0)
    wall += 0.01
    assert clock.shift() == 0
