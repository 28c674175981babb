"""How long a step of one sequence takes under a plan: a cost model of this machine, measured.

In: a problem, a loaded plan. Out: seconds of every option, and of all that no choice changes. Must never know: losses.

A product of one row reads its weight once and does little else. Each kind of weight (its shape and its source) is timed
on copies that do not fit a cache together, and the rest of a step is what a real one takes beyond its products.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median

import torch

from amalgam.composition.progress import Progress
from amalgam.evaluation.running import BLOCK_SIZE, Contestant
from amalgam.kernels.backends import choose_backend, operators_of
from amalgam.kernels.step import SequenceState, StepContext, StepSequence
from amalgam.kernels.weights import PackedWeight
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.models.weights import WeightVersion
from amalgam.planning.losses import Floats, table
from amalgam.planning.problem import Item, Problem
from amalgam.planning.use import Use

_COPIES_BYTES = 64 * 2**20  # more than the caches of a processor hold for us
_MAX_COPIES = 256
_ROUNDS, _STEPS, _CONTEXT = 5, 24, 32
STEP_POSITIONS = _CONTEXT + _STEPS


@dataclass(frozen=True)
class SpeedModel:
    """Attributes:
    seconds: `[items, options]`, of a token on the mean: an expert's weights by how often they are used.
    rest: of a step, beside the products that have a choice.
    measured: of a step with the plan that it was fitted to.
    """

    seconds: Floats
    rest: float
    measured: float

    def tokens_per_second(self, choice: list[int]) -> float:
        """Expected of one sequence."""
        return 1.0 / (self.rest + sum(float(self.seconds[row, index]) for row, index in enumerate(choice)))


def measure_speed(
    problem: Problem, use: Use, plan: Contestant, choice: list[int], progress: Progress | None = None
) -> SpeedModel:
    """
    Args:
        plan: a loaded plan, to which the rest of a step is fitted.
        choice: of that plan.
    """
    loader = plan.loader
    kinds: dict[tuple[int, str, str, str], tuple[Item, str]] = {}
    for item in problem.items:
        for option in item.options:
            kinds.setdefault((item.num_weights, item.role, item.part, option.source), (item, option.source))
    times: dict[tuple[int, str, str, str], float] = {}
    for number, (kind, (item, source)) in enumerate(kinds.items()):
        if progress is not None:
            progress("Timing products", number, len(kinds))
        found = loader.candidate(item.name, source)
        assert found is not None, (item.name, source)
        weight = found.load(choose_backend(plan.decoder.dtype, loader.device))
        times[kind] = _seconds(weight, plan.decoder.dtype, loader.device)
    if progress is not None:
        progress("Timing products", len(kinds), len(kinds))
    values: dict[str, Mapping[str, float]] = {
        item.name: {
            option.source: _share(item, use) * times[item.num_weights, item.role, item.part, option.source]
            for option in item.options
        }
        for item in problem.items
    }
    seconds = table(problem, values)
    measured = step_seconds(plan.decoder, plan.version)
    products = sum(float(seconds[row, index]) for row, index in enumerate(choice))
    return SpeedModel(seconds, max(measured - products, 0.0), measured)


@torch.inference_mode()
def step_seconds(decoder: Decoder, version: WeightVersion) -> float:
    """The median step of one sequence with one token, behind a short context."""
    blocks = -(-STEP_POSITIONS // BLOCK_SIZE)
    cache = KVCache.allocate(decoder.spec, blocks, BLOCK_SIZE, decoder.dtype, decoder.device)
    tokens = [(7919 * place) % decoder.spec.vocab_size for place in range(STEP_POSITIONS)]
    compiled, times = decoder.compile(version), []
    has_states = bool(decoder.spec.state_bytes)
    state = SequenceState.of(0, 0) if has_states else None
    compiled.run(StepContext([StepSequence(tokens[:_CONTEXT], 0, range(blocks), 1, state)], cache))
    for place in range(_CONTEXT, STEP_POSITIONS):
        state = SequenceState.of(0, place) if has_states else None
        _wait_for(decoder.device)
        started = time.perf_counter()
        compiled.run(StepContext([StepSequence([tokens[place]], place, range(blocks), 1, state)], cache))
        _wait_for(decoder.device)
        times.append(time.perf_counter() - started)
    return median(times)


@torch.inference_mode()
def _seconds(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> float:
    """Of a product of one row with a weight, read from memory."""
    copies = copies_beyond_caches(weight)
    operators = operators_of(device)
    x = torch.ones((1, weight.shape[1]), dtype=dtype, device=device)
    best = []
    for _ in range(_ROUNDS):
        _wait_for(device)
        started = time.perf_counter()
        for copy in copies:
            operators.linear(x, copy)
        _wait_for(device)
        best.append((time.perf_counter() - started) / len(copies))
    empty = time.perf_counter()
    for _ in range(len(copies)):
        operators.linear(x[:0], weight)
    call = (time.perf_counter() - empty) / len(copies)  # Python's part, which a compiled step does not have
    return max(median(best) - call, 1e-9)


def copies_beyond_caches(weight: PackedWeight) -> list[PackedWeight]:
    """A weight and copies of it, so many that each is read from memory if they are read in turns."""
    return [weight, *(_copy(weight) for _ in range(min(_MAX_COPIES, _COPIES_BYTES // max(1, weight.nbytes))))]


def _copy(weight: PackedWeight) -> PackedWeight:
    return replace(weight, parts={name: part.clone() for name, part in weight.parts.items()})


def _wait_for(device: torch.device) -> None:
    """A GPU computes on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _share(item: Item, use: Use) -> float:
    """How often a token reads it."""
    if item.layer is None or item.expert is None:
        return 0.0 if item.role == "embedding" else 1.0
    return use.activations.get((item.layer, item.expert), 0.0)
