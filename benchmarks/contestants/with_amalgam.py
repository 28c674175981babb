"""amalgam over a shape with random weights: `with_amalgam.py WEIGHTS [SETTING=VALUE ...]`; see `amalgam bench`.

WEIGHTS are those of shape S; `SHAPE:WEIGHTS` of another (`shapes.py`); a mixture of experts in a GGUF file or a
checkpoint folder.

Beside the common scenarios: `read` (a plain read of the weights that one decoding step of so many sequences reads, from
the same buffers) and `context` (one decoding step after so many tokens).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import torch
from protocol import Measure, answer
from shapes import SHAPES
from torch import Tensor

from amalgam import _native
from amalgam.base.histogram import Histogram
from amalgam.config.reading import load_settings
from amalgam.kernels.backends.cpu.products import matrix_of
from amalgam.models.routing import RoutingTrace, TokenSpan
from amalgam.tools import bench

MAX_TOKENS, MAX_BATCH = 8192 + 64, 16
STEPS = 24


class LastStep:
    """An observer that knows which experts the last step used; the layers run in one call."""

    def __init__(self) -> None:
        self.expert_ids: Tensor | None = None

    def begin_step(self, spans: Sequence[TokenSpan]) -> None: ...

    def observe(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None: ...

    def observe_all(self, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self.expert_ids = expert_ids

    def end_step(self, rejected: Mapping[int, int] | None = None) -> None: ...

    def admit(self, request_id: int, label: str | None, num_traced_tokens: int) -> None: ...

    def count_request(self, label: str | None) -> None: ...

    def distinct_experts(self) -> Histogram:
        return Histogram((), (0,), 0.0)

    def take_trace(self, request_id: int) -> RoutingTrace | None: ...

    def close(self) -> None: ...


def load(stack: ExitStack) -> Measure:
    chosen = dict(option.split("=", 1) for option in sys.argv[2:])
    settings = load_settings(None, {"model.base_path": "", "engine.kv_cache_bytes": 2 << 30, **chosen}, {})
    last_step = LastStep()
    sizes = {"max_tokens": MAX_TOKENS, "max_batch": MAX_BATCH}
    bench.SHAPES = {**bench.SHAPES, **SHAPES}
    given = sys.argv[1]
    shape, _, weights = given.rpartition(":")
    engine, spec = stack.enter_context(
        bench.file_engine(given, settings, **sizes, observer=last_step)
        if Path(given).exists()
        else bench.shape_engine(shape or "S", weights, settings, **sizes, observer=last_step)
    )
    seeds = count()
    others = [
        engine.version[slot.name]
        for slot in spec.slots
        if slot.role == "router" or (slot.is_linear and slot.role != "expert")
    ]

    def plain_read(size: int) -> float:
        bench.step_seconds(engine, spec, size, 3, next(seeds))
        read = list(others)
        assert last_step.expert_ids is not None
        for layer_id, expert_ids in zip(spec.moe_layer_ids, last_step.expert_ids, strict=True):
            for expert in expert_ids.unique().tolist():
                name = f"layers.{layer_id}.mlp.experts.{expert}"
                read += [engine.version[f"{name}.{part}"] for part in ("gate", "up", "down")]
        matrices = [matrix_of(weight) for weight in read]
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
        return plain_read(size)

    return measure


with ExitStack() as running:
    answer(lambda: load(running))
