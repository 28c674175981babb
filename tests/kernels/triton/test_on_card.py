"""The same on a card, where there is one: `TRITON_INTERPRET=0 pytest -m gpu tests/kernels/triton`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from amalgam.kernels.weights import ExpertTable
from tests.kernels.triton.test_experts import error, experts_of, prepared, routing
from tests.kernels.triton.test_products import IS_EXACT, WEIGHTS

pytest.importorskip("triton")

from amalgam.kernels.backends.triton.launching import IS_INTERPRETED
from amalgam.kernels.backends.triton.operators import TritonOperators
from amalgam.kernels.weights import SWIGLU
from tests.kernels.triton.weights import HALF_STEP, SUMS, exact, random, ready

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_INTERPRETED, reason="kernels are interpreted; TRITON_INTERPRET=0 has them compiled"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CARD = torch.device("cuda")


def on_card(experts: ExpertTable) -> ExpertTable:
    return ExpertTable(
        [replace(one, gate=one.gate.to(CARD), up=one.up.to(CARD), down=one.down.to(CARD)) for one in experts.experts]
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_product(name: str) -> None:
    weight = WEIGHTS[name]((320, 1536))
    read = ready(weight.to(CARD))
    # A card may cut where it aligns the products of an instruction.
    bound = 4 * SUMS + (0 if name in IS_EXACT else HALF_STEP[torch.bfloat16])
    for rows in (1, 7, 16, 33, 64, 200):
        x = random(rows, 1536).bfloat16()
        out = TritonOperators.linear(x.to(CARD), read, out_dtype=torch.float32).cpu()
        expected, magnitude = exact(x, weight)
        assert ((out - expected).abs() <= bound * magnitude).all(), rows


@pytest.mark.parametrize("name", ["bf16", "fp8 block", "int4 128 zero", "MXFP4"])
def test_neighbours_do_not_matter(name: str) -> None:
    """Among as many rows; and ranges that are summed apart leave the same bits every time."""
    weight, x = ready(WEIGHTS[name]((256, 2048)).to(CARD)), random(8, 2048).bfloat16().to(CARD)
    once = TritonOperators.linear(x, weight)
    for _ in range(10):
        assert torch.equal(TritonOperators.linear(x, weight), once)
    others = random(8, 2048, seed=9).bfloat16().to(CARD)
    others[3] = x[3]
    assert torch.equal(TritonOperators.linear(others, weight)[3], once[3])


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_mixture(tokens: int) -> None:
    experts = experts_of(["bf16", "fp8", "int4", "hqq", "int8", "mxfp4"])
    ids, weights = routing(tokens, 6, 3)
    x = random(tokens, experts[0].gate.shape[1]).bfloat16()
    out = TritonOperators.moe(x.to(CARD), ids.to(CARD), weights.to(CARD), prepared(on_card(experts)))
    assert error(out.cpu().double(), x, ids, weights, experts, SWIGLU) < 0.02


def test_a_captured_graph_survives_a_remap() -> None:
    before, after = experts_of(["bf16", "int4", "fp8", "int4"]), experts_of(["int4", "bf16", "int4", "fp8"])
    first = prepared(on_card(before))
    second = prepared(on_card(after), beside=first)
    ids, weights = (part.to(CARD) for part in routing(5, 4, 2))
    x = random(5, before[0].gate.shape[1]).bfloat16().to(CARD)
    expected = [TritonOperators.moe(x, ids, weights, one) for one in (first, second)]
    shown = first.table.clone()
    of_graph = replace(first, table=shown)
    TritonOperators.moe(x, ids, weights, of_graph)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = TritonOperators.moe(x, ids, weights, of_graph)
    for one, its in zip((second, first), reversed(expected), strict=True):
        shown.copy_(one.table)
        graph.replay()
        assert torch.equal(out, its)
