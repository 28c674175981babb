"""What several replicas have measured, as one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from amalgam.base.clock import Clock
from amalgam.cluster.merging import Ledger, merge_readings, merge_saved_sets, merge_statuses
from amalgam.config.statistics import StatisticsSettings
from amalgam.engine.meter import Load, Meter
from amalgam.experts.history import Tally
from amalgam.experts.saved.files import from_bytes, to_bytes
from amalgam.experts.tracker import ExpertTracker
from tests.cluster.replicas import IDLE

NOW = 1_000_000.0


def meter(prompt: int, new: int, seconds: float, running: int, offset: float = 0.0) -> Meter:
    """That has had one step, and has `running` requests."""
    made = Meter(Clock(lambda: NOW + offset, lambda: 0.0))
    made.set_load(Load(running, 0, running))
    made.add_step(prompt, new, num_tokens=prompt + new, seconds=seconds)
    return made


def test_counters_and_histograms_are_added_up() -> None:
    merged = merge_readings([meter(10, 2, 0.002, 1).read(), meter(5, 3, 0.2, 2, offset=0.7).read()])
    assert (merged.num_prompt_tokens, merged.num_new_tokens) == (15, 5)
    assert sum(merged.step.counts) == 2
    assert np.isclose(merged.step.sum, 0.202)
    [*_, last] = merged.points
    assert sum(point.num_new_tokens for point in merged.points) == 5
    assert last.running.peak >= 2
    times = [point.time for point in merged.points]
    assert all(after - before == 2.0 for before, after in pairwise(times))


def test_a_replica_that_has_gone_still_counts() -> None:
    ledger = Ledger()
    assert ledger.total() is None
    ledger.note("a", meter(10, 2, 0.1, 0).read())
    ledger.note("b", meter(1, 1, 0.1, 0).read())
    ledger.retire("a")
    ledger.note("c", meter(4, 4, 0.1, 0).read())
    ledger.retire("c")
    ledger.retire("never known")
    total = ledger.total()
    assert total is not None
    assert (total.num_prompt_tokens, total.num_new_tokens, sum(total.step.counts)) == (15, 7, 3)


def test_a_cluster_without_replicas_lives() -> None:
    assert merge_statuses([]).is_alive
    both = merge_statuses([IDLE, IDLE])
    assert (both.num_blocks, both.versions) == (200, {1: 0})


def tracker(experts: list[int]) -> ExpertTracker:
    """That has counted so many uses of each of four experts of one layer."""
    made = ExpertTracker((0,), 4, 2, StatisticsSettings(), model="m")
    saved = made.saved_set(with_history=True)
    tally = Tally.zeros(1, 4)
    tally.counts[1, 0] = experts
    tally.num_tokens[1] = sum(experts) // 2
    saved.total.add(tally)
    made.restore(saved, "test")
    return made


def test_saved_sets_are_one_traffic() -> None:
    sets = [
        from_bytes(to_bytes(tracker(experts).saved_set(with_history=True)), "test")
        for experts in ([4, 0, 0, 0], [1, 3, 0, 0])
    ]
    merged = merge_saved_sets(sets)
    assert merged.total.counts[1, 0].tolist() == [5, 3, 0, 0]
    assert int(merged.total.num_tokens.sum()) == 4


def test_rates_go_on_where_they_were() -> None:
    made, rates = tracker([1, 1, 0, 0]), np.array([[2.0, 0.5, 0.0, 0.0]])
    made.restore_rates(rates)
    assert np.allclose(made.snapshot().decaying_rate, rates, rtol=1e-3)
