"""Norms, rotations, activations, cache writes and routing in Triton, interpreted, mean what the reference says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from amalgam.kernels.backends.reference.operators import Operators
from amalgam.kernels.layouts import dense
from amalgam.kernels.program import Route, Rows
from amalgam.kernels.step import AttentionBatch, CachedAttention, LayerCache
from amalgam.kernels.weights import GEGLU, SWIGLU, GatedActivation

pytest.importorskip("triton")

from amalgam.kernels.backends.triton import heads, routing
from amalgam.kernels.backends.triton.steps import StepOperators

# Of the result's type: the reference rounds at the same places, from values that differ by float32's last bits.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
TYPES = tuple(BOUNDS)
CODES = (torch.int8, torch.float8_e4m3fn)


def assert_same(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype
    bound = BOUNDS[expected.dtype]
    torch.testing.assert_close(result, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", TYPES)
def test_norms(dtype: torch.dtype) -> None:
    wide = torch.randn(5, 100).to(dtype)
    x, delta = wide[:, 3:80], torch.randn(5, 77).to(dtype)
    weight, bias = torch.randn(77).to(dtype), torch.randn(77)
    assert_same(StepOperators.rms_norm(x, weight, 1e-5), Operators.rms_norm(x, weight, 1e-5))
    assert_same(StepOperators.rms_norm(x.float(), weight, 1e-5), Operators.rms_norm(x.float(), weight, 1e-5))
    results, expected = (kind.add_rms_norm(x, delta, weight, 1e-5) for kind in (StepOperators, Operators))
    assert torch.equal(results[0], expected[0])
    assert_same(results[1], expected[1])
    assert_same(StepOperators.layer_norm(x, weight, bias, 1e-5), Operators.layer_norm(x, weight, bias, 1e-5))
    heads_of = wide[:, :96].view(5, 6, 16)
    assert_same(StepOperators.rms_norm(heads_of, weight[:16], 1e-5), Operators.rms_norm(heads_of, weight[:16], 1e-5))


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        (SWIGLU, torch.bfloat16),
        (SWIGLU, torch.float16),
        (GEGLU, torch.float32),
        (GatedActivation(1.702, 1.0, 0.7), torch.bfloat16),
        (GatedActivation(limit=0.5, limits_last=True), torch.float16),
        (GatedActivation(is_gelu=True, offset=1.0), torch.bfloat16),
    ],
)
def test_activations(activation: GatedActivation, dtype: torch.dtype) -> None:
    both = 3 * torch.randn(3, 80).to(dtype)
    gate, up = both[:, :40], both[:, 40:]
    assert_same(StepOperators.gated(gate, up, activation), Operators.gated(gate, up, activation))


def test_gelu_and_rotation() -> None:
    x = 4 * torch.randn(3, 50)
    assert_same(StepOperators.gelu(x[:, 5:]), Operators.gelu(x[:, 5:]))
    cos, sin = torch.randn(2, 3, 6)
    parts = torch.randn(3, 5, 17).bfloat16()[:, :4]
    assert_same(StepOperators.rotate(parts, cos, sin), Operators.rotate(parts, cos, sin))


def new_cache(dtype: torch.dtype, kv_heads: int = 2, dim: int = 18, value_dim: int = 10) -> LayerCache:
    scales = torch.zeros(7, kv_heads) if dtype in CODES else None
    of_values = torch.zeros(7, kv_heads if value_dim else 0) if dtype in CODES else None
    return LayerCache(
        torch.zeros(7, kv_heads, dim, dtype=dtype), torch.zeros(7, kv_heads, value_dim, dtype=dtype), scales, of_values
    )


def bytes_of(cache: LayerCache) -> list[torch.Tensor]:
    return [part.contiguous().view(torch.uint8) for part in cache if part is not None]


def hard_values(*shape: int) -> torch.Tensor:
    """Of all magnitudes, zeros, and one row each with NaN and infinity."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-20, 8, shape).float())
    x[0, 0], x[1, 0, 3], x[1, 1, 4] = 0.0, torch.nan, -torch.inf
    return x


@pytest.mark.parametrize(
    ("cache_type", "value_dim"), [*((kind, 10) for kind in (*TYPES, *CODES)), (torch.bfloat16, 0), (torch.int8, 0)]
)
def test_writes_are_the_same_bits(cache_type: torch.dtype, value_dim: int) -> None:
    key, value, slots = hard_values(3, 2, 18), torch.randn(3, 2, value_dim), torch.tensor([4, 0, 6])
    ours, theirs = new_cache(cache_type, value_dim=value_dim), new_cache(cache_type, value_dim=value_dim)
    StepOperators.write_kv(ours, key, value, slots)
    Operators.write_kv(theirs, key, value, slots)
    for got, expected in zip(ours, theirs, strict=True):
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            got, expected = got.float(), expected.float()
            assert torch.equal(got.isnan(), expected.isnan())
            assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("cache_type", [torch.float32, *CODES])
def test_a_negative_slot_is_not_written(cache_type: torch.dtype) -> None:
    cache = new_cache(cache_type)
    heads.write(cache, torch.randn(2, 2, 18), torch.randn(2, 2, 10), torch.tensor([-1, -1]))
    assert not any(part.any() for part in bytes_of(cache))


HOWS = [
    {"norms": True},
    {"norms": True, "rounds_last": True, "rotary": 9},
    {"norms": True, "norms_last": True, "is_interleaved": True, "rotary": 6},
    {"rotary": 7, "is_interleaved": True},
    {},
]


@pytest.mark.parametrize(
    ("how", "dtype"), [*((how, torch.float32) for how in HOWS), *((how, torch.bfloat16) for how in HOWS[:3])]
)
def test_heads_are_placed_as_the_reference_does(how: dict[str, object], dtype: torch.dtype) -> None:
    tokens, half = 3, how.get("rotary")
    batch = AttentionBatch(torch.tensor([0, 3]), torch.tensor([3]), torch.tensor([[1, 0]]), 2)
    attention = CachedAttention(
        new_cache(dtype),
        torch.tensor([2, 3, 0]),
        batch,
        18**-0.5,
        norms=(torch.randn(18).to(dtype), torch.randn(18).to(dtype)) if how.get("norms") else None,
        norm_eps=1e-6,
        rotary=tuple(torch.randn(2, tokens, half)) if isinstance(half, int) else None,  # type: ignore[arg-type]
        rounds_last=bool(how.get("rounds_last")),
        norms_last=bool(how.get("norms_last")),
        is_interleaved=bool(how.get("is_interleaved")),
    )
    rows = [torch.randn(tokens, width + 5).to(dtype)[:, 5:] for width in (72, 36, 20)]
    result = StepOperators.cached_attention(*rows, attention)
    theirs = replace(attention, cache=new_cache(dtype))
    expected = Operators.cached_attention(*(row.contiguous() for row in rows), theirs)
    assert_same(attention.cache.keys, theirs.cache.keys)
    assert torch.equal(attention.cache.values, theirs.cache.values)
    torch.testing.assert_close(result, expected, rtol=2 * BOUNDS[dtype], atol=2 * BOUNDS[dtype])


ROUTE = Route(Rows("x", 4, 0, 4), dense(torch.zeros(1)), 0, 3)
ROUTES = [
    ROUTE,
    replace(ROUTE, normalises=True, sum_eps=1e-3, scaling=2.5, factors=torch.rand(24)),
    replace(ROUTE, num_groups=4, num_kept=2),
    replace(ROUTE, scoring="sigmoid", num_groups=6, num_kept=3, correction=torch.randn(24), normalises=True),
    replace(ROUTE, scoring="sigmoid", k=1),
    replace(ROUTE, scoring="chosen", k=4),
    replace(ROUTE, scoring="apart", k=1),
    replace(ROUTE, scoring="mixer", k=2, jitter=0.1),
    replace(ROUTE, k=24),
]


@pytest.mark.parametrize("one", ROUTES)
def test_routing(one: Route) -> None:
    scores = 2 * torch.randn(3, 24)
    ids, weights = StepOperators.choose_experts(scores, one)
    expected_ids, expected_weights = Operators.choose_experts(scores, one)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)


def test_plain_routing_with_its_product() -> None:
    x, weight = torch.randn(2, 16).bfloat16(), dense(torch.randn(24, 16))
    ids, weights = StepOperators.route(x, weight, 3, normalises=True, sum_eps=1e-3)
    expected_ids, expected_weights = Operators.route(x, weight, 3, normalises=True, sum_eps=1e-3)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)


def test_of_equal_scores_the_smaller_id_is_chosen_and_nan_is_largest() -> None:
    scores = torch.zeros(3, 20)
    scores[1, [4, 9]] = 1.0
    scores[2, 7], scores[2, 3] = torch.nan, torch.inf
    ids, _ = routing.choose_experts(scores, replace(ROUTE, scoring="chosen"))
    assert ids.tolist() == [[0, 1, 2], [4, 9, 0], [7, 3, 0]]
    ids, _ = routing.choose_experts(torch.full((1, 20), -torch.inf), replace(ROUTE, scoring="apart"))
    assert ids.tolist() == [[0, 1, 2]]
