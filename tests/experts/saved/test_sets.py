"""Saved sets merge, and refuse what is not theirs."""

from __future__ import annotations

import numpy as np

from amalgam.errors import ConfigError
from amalgam.experts.saved.sets import merge
from amalgam.experts.tracker import ExpertTracker
from tests.errors import raises
from tests.experts.routing import LAYER_IDS, TOP_K, Clock, busy_tracker, make_tracker


def test_merged_sets_are_the_traffic_of_both() -> None:
    first, second = busy_tracker(1).saved_set(), busy_tracker(2).saved_set()
    both = merge([first, second])
    np.testing.assert_array_equal(both.total.counts, first.total.counts + second.total.counts)
    np.testing.assert_array_equal(both.labels["zh"].counts, first.labels["zh"].counts + second.labels["zh"].counts)
    assert both.pairs is not None and both.pairs.num_tokens == 20
    assert first.total.num_tokens.sum() == 10  # the parts are as they were
    other = ExpertTracker((1, 2), 8, 2, make_tracker(Clock()).settings, Clock().system).saved_set()
    with raises(ConfigError, "2 layers of 8", "3 of 8"):
        merge([first, other])


def test_other_active_experts_are_another_model_s() -> None:
    settings = make_tracker(Clock()).settings
    first, other = (ExpertTracker(LAYER_IDS, 8, top_k, settings, Clock().system) for top_k in (TOP_K, 3))
    with raises(ConfigError, 3, 2):
        first.restore(other.saved_set(), "It")
    with raises(ConfigError, 3, 2):
        merge([first.saved_set(), other.saved_set()])
