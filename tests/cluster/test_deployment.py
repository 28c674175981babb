"""All replicas as one deployment, of scripted replicas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from amalgam.cluster.deployment import ClusterStatistics
from amalgam.cluster.members import Outcomes
from amalgam.cluster.routing import Routing


def test_counts_do_not_fall_when_an_older_answer_comes_later() -> None:
    """Or Prometheus takes the counter for one that began anew."""
    told = iter([{("up", "int4"): 5}, {("up", "int4"): 3}, {("up", "int4"): 7, ("up", "fp8"): 0}])
    members: Any = SimpleNamespace(ids=lambda: ["a"], all=lambda *_: Outcomes({"a": next(told)}, {}, frozenset()))
    statistics = ClusterStatistics(members, Routing(4))
    counts = [statistics.activations_by_format() for _ in range(3)]
    assert counts == [{("up", "int4"): 5}, {("up", "int4"): 5}, {("up", "int4"): 7, ("up", "fp8"): 0}]
