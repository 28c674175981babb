"""A deployment of the size of a large model's, without the model: real statistics and precisions, hostile names.

Run as a script it serves: `large.py PORT`.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from amalgam.config.statistics import StatisticsSettings
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.routing import TokenSpan
from amalgam.models.weights import Origin
from amalgam.server import run
from tests.server.fakes import FakeDeployment, FakeEngine, FakeVersion, WeightChange, fake_settings

NUM_LAYERS, NUM_EXPERTS, TOP_K = 94, 128, 8
SHAPE = (1536, 4096)
HOSTILE = "<img src=x onerror=\"window.hacked='%s'\">"
LABELS = (HOSTILE % "label", "宋词 & <b>verse</b>")
BITS = {"fp8": 8, "int4": 4, HOSTILE % "format": 16}


def source_of(format_name: str) -> str:
    return HOSTILE % "source" if format_name == "int4" else f"source-{BITS[format_name]}"


class LargeVersion(FakeVersion):
    """int4, but for every tenth expert in fp8 and every fiftieth in the hostile format."""

    def __init__(self, version_id: int, num_layers: int = NUM_LAYERS, num_experts: int = NUM_EXPERTS) -> None:
        super().__init__(version_id)
        for index in range(num_layers * num_experts):
            layer_id, expert_id = divmod(index, num_experts)
            format_name = HOSTILE % "format" if index % 50 == 0 else "fp8" if index % 10 == 0 else "int4"
            for part in ("gate", "up", "down"):
                slot = f"layers.{layer_id}.mlp.experts.{expert_id}.{part}"
                name = f"model.layers.{layer_id}.mlp.experts.{expert_id}.{part}_proj.weight"
                nbytes = SHAPE[0] * SHAPE[1] * BITS[format_name] // 8
                source = source_of(format_name)
                self.origins[slot] = Origin(name, slot, source, format_name, format_name, SHAPE, HOSTILE, ())
                self.weights[slot] = SimpleNamespace(nbytes=nbytes)


class LargeDeployment(FakeDeployment):
    """Serves what `FakeEngine` answers; its tracker has counted a thousand tokens.

    With fewer layers and experts it is a page for tests that look at something else.
    """

    def __init__(self, num_layers: int = NUM_LAYERS, num_experts: int = NUM_EXPERTS) -> None:
        version, tracker = LargeVersion(1, num_layers, num_experts), make_tracker(num_layers, num_experts)
        super().__init__(FakeEngine(version=version), tracker, num_experts, HOSTILE % "model")
        self.num_layers = num_layers

    def changed(self, name: str, source: str) -> WeightChange:
        bits = {source_of(format_name): BITS[format_name] for format_name in BITS}
        size = SHAPE[0] * SHAPE[1] // 8
        return WeightChange(name, HOSTILE % "source", source, "int4", "fp8", size * BITS["int4"], size * bits[source])

    def model_info(self) -> dict[str, Any]:
        weights = [origin.format for origin in self.version.origins.values()]
        rows = {}
        for name, bits in BITS.items():
            count = weights.count(name)
            size = SHAPE[0] * SHAPE[1]
            rows[name] = {"weights": count, "parameters": count * size, "bytes": count * size * bits // 8}
        total = sum(row["bytes"] for row in rows.values())
        return {
            "sizes": {
                "layers": self.num_layers,
                "experts_per_layer": self.num_experts,
                "active_experts_per_token": TOP_K,
            },
            "sources": {source_of(name): {"path": HOSTILE % "path", **row} for name, row in rows.items()},
            "precisions": rows,
            "memory": {"weights_bytes": total, "kv_cache_bytes": 0, "process_peak_bytes": 0},
        }


def make_tracker(num_layers: int = NUM_LAYERS, num_experts: int = NUM_EXPERTS, num_tokens: int = 500) -> ExpertTracker:
    """`num_tokens` random tokens of each label, with some experts more likely than others."""
    tracker = ExpertTracker(range(num_layers), num_experts, TOP_K, StatisticsSettings())
    count_tokens(tracker, num_layers, num_experts, num_tokens)
    return tracker


def count_tokens(tracker: ExpertTracker, num_layers: int, num_experts: int, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    for request_id, label in enumerate(LABELS):
        tracker.admit(request_id, label, 0)
        tracker.count_request(label)
        tracker.begin_step([TokenSpan(request_id, 0, num_tokens, 0, num_tokens // 2, label=label)])
        liking = rng.gamma(0.6, 1.0, (num_layers, num_experts))
        for layer_id in range(num_layers):
            scores = rng.gumbel(size=(num_tokens, num_experts)) + np.log(liking[layer_id])
            expert_ids = np.argsort(-scores, axis=-1)[:, :TOP_K].copy()
            gate_weights = rng.dirichlet(np.ones(TOP_K), num_tokens).astype(np.float32)
            tracker.observe(layer_id, torch.from_numpy(expert_ids), torch.from_numpy(gate_weights))
        tracker.end_step()


if __name__ == "__main__":
    run(fake_settings(port=int(sys.argv[1])), LargeDeployment)
