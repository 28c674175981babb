"""The block of experts that contestants compute: shape S's, the same tokens and routes for everyone.

In: layers, as functions. Out: what `protocol.answer` asks for. Needs torch alone, as the engines' environments have it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

HIDDEN, WIDTH, NUM_EXPERTS, NUM_ACTIVE, NUM_LAYERS = 2048, 768, 64, 8, 8
FEW_ROWS, MOST_ROWS = 2, 512
BLOCK = 128  # rows and columns of fp8 that share a scale
MOST_ERROR = 0.4  # of the outputs' size

# x [rows, hidden] bfloat16, experts' ids [rows, active] int64, their weights float32 → [rows, hidden] bfloat16
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Experts = tuple[Tensor, Tensor, Tensor]  # gate and up [experts, width, hidden], down [experts, hidden, width], bfloat16


def num_threads() -> int:
    """As many as contestants are given (`engines.Child`)."""
    return int(os.environ["OMP_NUM_THREADS"])


def route(rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Experts' ids [rows, active] and their weights, at random."""
    ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:NUM_ACTIVE] for _ in range(rows)])
    return ids, torch.rand(rows, NUM_ACTIVE, generator=generator)


def fp8_by_block(values: Tensor) -> tuple[Tensor, Tensor]:
    """[experts, rows, columns] → E4M3 codes, float32 scales [experts, rows / BLOCK, columns / BLOCK]."""
    experts, rows, columns = values.shape
    blocks = values.float().view(experts, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((2, 4), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    codes = (blocks / scale).to(torch.float8_e4m3fn).view(values.shape)
    return codes, scale.view(experts, rows // BLOCK, columns // BLOCK)


def load(make: Callable[[Experts], Layer]) -> Callable[[str, int], float]:
    """All layers, each with weights of its own in memory; the values are the same, random ones.

    Returns:
        What measures `rows N`: seconds of all layers, each with a route of its own, after a pass that wakes threads up.

    Raises:
        ArithmeticError: a layer's outputs are wrong; they would be fast for nothing.
    """
    torch.set_num_threads(num_threads())
    generator = torch.Generator().manual_seed(0)
    shapes = (NUM_EXPERTS, WIDTH, HIDDEN), (NUM_EXPERTS, WIDTH, HIDDEN), (NUM_EXPERTS, HIDDEN, WIDTH)
    gate, up, down = (torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for shape in shapes)
    layers = [make((gate, up, down)) for _ in range(NUM_LAYERS)]
    _check(layers[0], (gate, up, down))
    seeds = itertools.count()

    def measure(scenario: str, size: int) -> float:
        assert scenario == "rows", scenario
        generator = torch.Generator().manual_seed(next(seeds))
        x = torch.randn(size, HIDDEN, generator=generator).bfloat16()
        routes = [route(size, generator) for _ in layers]

        def run() -> float:
            started = time.perf_counter()
            for layer, (ids, weights) in zip(layers, routes, strict=True):
                layer(x, ids, weights)
            return time.perf_counter() - started

        run()
        return run()

    return measure


def _check(layer: Layer, experts: Experts) -> None:
    """Few rows and many, as engines have a kernel for each, against float32. int4 with one scale a row has to pass."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(MOST_ROWS, HIDDEN, generator=generator).bfloat16()
    ids, weights = route(len(x), generator)
    expected = torch.zeros(FEW_ROWS, HIDDEN)
    for row, token in enumerate(x[:FEW_ROWS].float()):
        for expert, share in zip(ids[row].tolist(), weights[row], strict=True):
            gate, up, down = (matrix[expert].float() for matrix in experts)
            expected[row] += share * (down @ (torch.nn.functional.silu(gate @ token) * (up @ token)))
    for count in (FEW_ROWS, MOST_ROWS):
        out = layer(x[:count], ids[:count], weights[:count])[:FEW_ROWS].float()
        error = float((out - expected).norm() / expected.norm())
        if not error < MOST_ERROR:
            raise ArithmeticError(f"of {count} rows, outputs are {error:.2f} of their size away from those in float32")
