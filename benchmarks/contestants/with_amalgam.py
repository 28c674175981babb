"""amalgam over shape S with random weights: `with_amalgam.py WEIGHTS`, as `amalgam bench --shape S` takes them.

Beside the common scenarios: `read` (a plain read of as many bytes as one decoding step of one sequence reads, from the
same buffers) and `context` (one decoding step after so many tokens).
"""

from __future__ import annotations

import random
import sys
import time
from contextlib import ExitStack
from itertools import count

import torch
from protocol import Measure, answer

from amalgam import _native
from amalgam.config import load_settings
from amalgam.tools import bench

MAX_TOKENS, MAX_BATCH = 8192 + 64, 16
STEPS = 24


def load(stack: ExitStack) -> Measure:
    settings = load_settings(None, {"model.base_path": "", "engine.kv_cache_bytes": 2 << 30}, {})
    engine, spec = stack.enter_context(
        bench.shape_engine("S", sys.argv[1], settings, max_tokens=MAX_TOKENS, max_batch=MAX_BATCH)
    )
    seeds = count()
    others = [engine.version[slot.name] for slot in spec.slots if slot.is_linear and slot.role != "expert"]
    names = [f"layers.{layer}.mlp.experts" for layer in spec.moe_layer_ids]

    def read() -> float:
        """The wide part, and of each layer the experts that one token takes."""
        weights = list(others)
        for name in names:
            for expert in random.sample(range(spec.num_experts), spec.num_active_experts):
                weights += [engine.version[f"{name}.{expert}.{part}"] for part in ("gate", "up", "down")]
        matrices = [weight.native for weight in weights]
        started = time.perf_counter()
        _native.checksum(matrices, torch.get_num_threads())
        return time.perf_counter() - started

    def measure(scenario: str, size: int) -> float:
        if scenario == "prompt":
            return bench.prompt_seconds(engine, spec, size, next(seeds))
        if scenario == "decode":
            return bench.step_seconds(engine, spec, size, STEPS, next(seeds))
        if scenario == "context":
            return bench.step_seconds(engine, spec, 1, STEPS, next(seeds), context=size)
        return read()

    return measure


with ExitStack() as running:
    answer(lambda: load(running))
