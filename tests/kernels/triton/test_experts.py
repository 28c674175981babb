"""Mixtures of experts of different precisions on the kernels of a GPU, against the reference; what a re-map changes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.layouts import AFFINE4, dense
from amalgam.kernels.weights import GEGLU, SWIGLU, Expert, ExpertTable, GatedActivation, PackedWeight
from tests.kernels.weights import affine, int4, scaled8
from tests.kernels.weights import dense as floats

pytest.importorskip("triton")

from amalgam.kernels.backends.triton import experts as mixtures
from amalgam.kernels.backends.triton.experts import Sizes, TritonExperts, launches_of, prepare_experts
from amalgam.kernels.backends.triton.kinds import TritonWeight
from amalgam.kernels.backends.triton.operators import TritonOperators
from tests.kernels.triton.weights import mxfp4, random, ready

HIDDEN, WIDTH = 64, 96
MAKERS = {
    "bf16": lambda shape, seed: floats(shape, torch.bfloat16, seed),
    "fp8": lambda shape, seed: scaled8(shape, torch.float8_e4m3fn, (1, shape[1]), seed),
    "int8": lambda shape, seed: scaled8(shape, torch.int8, (1, shape[1]), seed),
    "int4": lambda shape, seed: int4(shape, 32, has_zero=True, seed=seed),
    "hqq": lambda shape, seed: affine(AFFINE4, shape, 32, torch.float16, seed),
    "mxfp4": mxfp4,
}


def experts_of(names: Sequence[str | tuple[str, str, str]], *, has_bias: bool = False) -> ExpertTable:
    """Experts by what their projections are stored in, all three of them or each."""
    experts = []
    for seed, name in enumerate(names):
        kinds = (name,) * 3 if isinstance(name, str) else name
        shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
        # Values of about the same size, so that no expert drowns the others' errors.
        weights = [scaled(MAKERS[kind](shape, seed)) for kind, shape in zip(kinds, shapes, strict=True)]
        biases = [random(shape[0], seed=seed) for shape in shapes] if has_bias else [None] * 3
        experts.append(Expert(*weights, *biases))
    return ExpertTable(experts)


def scaled(weight: PackedWeight) -> PackedWeight:
    size = weight.dequantize(torch.float32).square().mean().sqrt() * 8
    name = "scale" if "scale" in weight.parts and weight.layout.name != "table4" else "weight"
    if weight.layout.name == "table4":
        return weight
    part = weight.parts[name]
    return replace(weight, parts={**weight.parts, name: (part.float() / size).to(part.dtype)})


def read(experts: ExpertTable) -> ExpertTable:
    """With weights that kernels read."""
    return ExpertTable(
        [replace(one, gate=ready(one.gate), up=ready(one.up), down=ready(one.down)) for one in experts.experts]
    )


def prepared(experts: ExpertTable, beside: TritonExperts | None = None) -> TritonExperts:
    experts = read(experts)
    launches = launches_of(experts, () if beside is None else beside.launches)
    assert launches is not None
    return prepare_experts(experts, launches)


def routing(tokens: int, experts: int, k: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    return ids, torch.rand((tokens, k), generator=generator)


def error(
    out: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertTable,
    how: GatedActivation,
) -> float:
    """The largest difference from float64, relative to the largest value."""
    wide = [
        replace(
            one,
            gate=dense(one.gate.dequantize(torch.float64)),
            up=dense(one.up.dequantize(torch.float64)),
            down=dense(one.down.dequantize(torch.float64)),
        )
        for one in experts.experts
    ]
    expected = reference.moe(x.double(), ids, weights, ExpertTable(wide), how)
    return float((out - expected).abs().max() / expected.abs().max())


CASES = {
    "one token": (["bf16", "int4", "mxfp4"], 1, 2, False, SWIGLU),
    "each its own": (["bf16", "fp8", "int4", "hqq", "int8", "mxfp4"], 3, 3, False, SWIGLU),
    "projections": ([("int4", "bf16", "fp8"), ("int4", "int4", "int4"), "bf16"], 4, 2, False, SWIGLU),
    "biases, limits": (["bf16", "mxfp4"], 3, 2, True, GatedActivation(1.702, 1.0, 7.0)),
    "limits last": (["bf16", "fp8"], 3, 1, False, GatedActivation(limit=0.5, limits_last=True)),
    "gelu": (["int8", "int4"], 3, 2, False, GEGLU),
    "many rows": (["bf16", "int4"], 20, 2, False, SWIGLU),
}


@pytest.mark.parametrize("case", CASES)
def test_mixture(case: str) -> None:
    names, tokens, k, has_bias, how = CASES[case]
    experts = experts_of(names, has_bias=has_bias)
    ids, weights = routing(tokens, len(names), k)
    x = random(tokens, HIDDEN).bfloat16()
    out = TritonOperators.moe(x, ids, weights, prepared(experts), how)
    ours = error(out.double(), x, ids, weights, experts, how)
    theirs = error(reference.moe(x, ids, weights, experts, how).double(), x, ids, weights, experts, how)
    assert out.dtype is torch.bfloat16
    assert ours < 0.02 and ours < 1.5 * theirs + 2**-9


def test_float32() -> None:
    experts = experts_of(["bf16", "int4", "fp8"])
    ids, weights = routing(4, 3, 2)
    x = random(4, HIDDEN)
    out = TritonOperators.moe(x, ids, weights, prepared(experts))
    assert error(out.double(), x, ids, weights, experts, SWIGLU) < 5e-6


def test_one_launch_for_each_kind_and_projection() -> None:
    table = prepared(experts_of(["bf16", "int4", "bf16", "fp8", "int4"]))
    assert [launch.is_first for launch in table.launches] == [True] * 3 + [False] * 3


def test_tiles_for_any_routing() -> None:
    """Grids have room for the worst routing: one row more than fills tiles with as many experts as there can be."""
    for tokens, k, experts in itertools.product((1, 3, 16, 64, 200), (1, 2, 8), (8, 60, 128)):
        sizes = Sizes(tokens, k, experts)
        active = min(sizes.slots, experts)
        alone = [1] * (active - 1) + [sizes.slots - active + 1]
        level = [sizes.slots // active + (place < sizes.slots % active) for place in range(active)]
        for rows in (alone, level):
            assert sum(-(-count // sizes.rows) for count in rows) <= sizes.num_tiles


def test_all_tokens_choose_one_expert() -> None:
    experts = experts_of(["bf16", "int4", "bf16"])
    ids, weights = torch.full((20, 1), 1), torch.ones(20, 1)
    x = random(20, HIDDEN).bfloat16()
    out = TritonOperators.moe(x, ids, weights, prepared(experts))
    assert error(out.double(), x, ids, weights, experts, SWIGLU) < 0.02


@pytest.mark.usefixtures("nan_in_new_memory")
def test_outputs_of_some_experts_and_their_sum() -> None:
    """What devices that have some of the experts each do, and the one that adds: the bits of all in one place."""
    experts = experts_of(["bf16", "int4", "fp8"])
    ids, weights = routing(4, 3, 2)
    x = random(4, HIDDEN).bfloat16()
    out = torch.full((4, 2, HIDDEN), torch.nan)
    for own in ((0, 2), (1,)):
        places = torch.tensor([own.index(one) if one in own else -1 for one in range(3)])[ids]
        before = out.clone()
        table = prepared(ExpertTable([experts[one] for one in own]))
        TritonOperators.expert_outputs(x, places, table, SWIGLU, out)
        torch.testing.assert_close(out[places < 0], before[places < 0], rtol=0, atol=0, equal_nan=True)
        assert out[places >= 0].isfinite().all()
    added = TritonOperators.weighted_sum(out, ids, weights, torch.bfloat16)
    assert torch.equal(added, TritonOperators.moe(x, ids, weights, prepared(experts)))
    assert torch.equal(added, reference.weighted_sum(out, ids, weights, torch.bfloat16))


@pytest.mark.usefixtures("nan_in_new_memory")
def test_an_id_of_no_expert_adds_nothing() -> None:
    """Whatever its gate weight is."""
    experts = experts_of(["bf16", "int4", "fp8"])
    x, (ids, weights) = random(3, HIDDEN), routing(3, 3, 2)
    expected = TritonOperators.moe(
        x, ids, weights * torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), prepared(experts)
    )
    for place in ((0, 0), (1, 1), (2, 0), (2, 1)):
        ids[place], weights[place] = -1, torch.nan
    assert torch.equal(TritonOperators.moe(x, ids, weights, prepared(experts)), expected)


def test_no_tokens() -> None:
    out = TritonOperators.moe(
        random(0, HIDDEN), torch.empty((0, 2), dtype=torch.int64), random(0, 2), prepared(experts_of(["bf16", "fp8"]))
    )
    assert out.shape == (0, HIDDEN)


def test_experts_that_no_kernel_reads_are_left_to_torch() -> None:
    experts = experts_of(["bf16", "bf16"])
    assert launches_of(experts) is None
    assert not mixtures.supports_moe(random(1, HIDDEN), experts)
    assert isinstance(ready(experts[0].gate), TritonWeight)
