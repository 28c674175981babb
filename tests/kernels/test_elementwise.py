"""Rotary embedding, SwiGLU and the pool that they share with the products."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from amalgam.kernels.backends.cpu import elementwise, extension, panels, products, sampling
from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import GEGLU, SWIGLU, GatedActivation
from tests.errors import raises
from tests.kernels.conftest import supported_isas

TYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("isa")
def test_rotate(dtype: torch.dtype) -> None:
    for tokens, heads, head_dim, rotated in ((1, 1, 2, 2), (5, 3, 24, 24), (7, 4, 64, 32), (300, 8, 128, 128)):
        x = sample(tokens, heads, head_dim, dtype=dtype)
        angles = sample(tokens, rotated // 2, seed=1)
        cos, sin = angles.cos(), angles.sin()
        assert torch.equal(elementwise.rotate(x, cos, sin), reference.rotate(x, cos, sin))
    parts = sample(6, 3 * 64, dtype=dtype)[:, 64:128].view(6, 2, 32)  # a view into a wider product
    cos, sin = sample(6, 16).cos(), sample(6, 16).sin()
    assert torch.equal(elementwise.rotate(parts, cos, sin), reference.rotate(parts, cos, sin))
    assert elementwise.rotate(x[:0], cos[:0, :64].repeat(1, 4), sin[:0, :64].repeat(1, 4)).shape == (0, 8, 128)
    assert not elementwise.supports_rotate(x, cos, sin)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    "activation",
    [SWIGLU, GEGLU, GatedActivation(1.702, 1.0, 2.0), GatedActivation(limit=2.0, is_gelu=True)],
    ids=["swiglu", "geglu", "clamped", "clamped geglu"],
)
def test_gated(dtype: torch.dtype, activation: GatedActivation) -> None:
    for size in (1, 15, 17, 1000):
        gate, up = sample(3, size, dtype=dtype) * 5, sample(3, size, dtype=dtype, seed=1)
        expected = reference.gated(gate, up, activation)
        torch.testing.assert_close(elementwise.gated(gate, up, activation), expected)
    extremes = torch.tensor([0.0, -0.0, 1e-20, 88.0, -88.0, 1e4, -1e4, 3e38, -3e38, torch.inf, torch.nan]).to(dtype)
    ones = torch.ones_like(extremes)
    found, expected = elementwise.gated(extremes, ones, activation), reference.gated(extremes, ones, activation)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-30, rtol=1e-6)


def test_elements_have_the_same_bits_wherever_they_stand(use_isa: Callable[[str], None]) -> None:
    gate, up = sample(100_003) * 4, sample(100_003, seed=1)
    use_isa("portable")
    expected = elementwise.gated(gate, up, SWIGLU)
    assert torch.equal(elementwise.gated(gate[5:77], up[5:77], SWIGLU), expected[5:77])
    for isa in supported_isas():
        use_isa(isa)
        assert torch.equal(elementwise.gated(gate, up, SWIGLU), expected)


@pytest.mark.usefixtures("isa")
def test_long_rms_norm_runs_in_parallel_with_the_same_bits(use_threads: Callable[[int], None]) -> None:
    x, weight = sample(500, 256), sample(256, seed=1)
    use_threads(1)
    expected = elementwise.rms_norm(x, weight, 1e-6)
    use_threads(3)
    assert torch.equal(elementwise.rms_norm(x, weight, 1e-6), expected)


def test_many_threads_may_call_at_once(use_threads: Callable[[int], None]) -> None:
    use_threads(3)
    gate, up = sample(300_000), sample(300_000, seed=1)
    expected = elementwise.gated(gate, up, SWIGLU)
    results: list[bool] = []

    def work() -> None:
        for _ in range(20):
            results.append(torch.equal(elementwise.gated(gate, up, SWIGLU), expected))

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 100 and all(results)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("isa")
def test_add_rms_norm(dtype: torch.dtype) -> None:
    for rows, hidden in ((1, 5), (3, 64), (40, 1030)):
        x, delta, weight = sample(rows, hidden, dtype=dtype), sample(rows, hidden, dtype=dtype, seed=1), sample(hidden)
        total, normed = elementwise.add_rms_norm(x, delta, weight, 1e-6)
        assert torch.equal(total, x + delta)
        assert torch.equal(normed, elementwise.rms_norm(total, weight, 1e-6))
    with raises(ValueError, "delta", (rows, hidden), (rows, 5)):
        elementwise.add_rms_norm(x, delta[:, :5], weight, 1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normalises", [False, True])
@pytest.mark.usefixtures("isa")
def test_route(dtype: torch.dtype, normalises: bool) -> None:
    for tokens, experts, hidden, k in (
        (1, 1, 8, 1),
        (3, 8, 24, 2),
        (70, 64, 32, 8),
        (200, 128, 16, 128),
        (5, 130, 40, 7),
    ):
        x, weight = sample(tokens, hidden, dtype=dtype), dense(sample(experts, hidden, seed=1))
        packed = panels.prepare(weight)
        ids, weights = products.route(x, packed, k, normalises=normalises, sum_eps=1e-3)
        expected_ids, expected = reference.route(x, weight, k, normalises=normalises, sum_eps=1e-3)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-7)
        alone, _ = products.route(x[-1:], packed, k, normalises=normalises, sum_eps=1e-3)
        assert torch.equal(alone[0], ids[-1])


def test_route_of_what_has_no_order() -> None:
    eye = panels.prepare(dense(torch.eye(8)))
    ids, weights = products.route(torch.zeros(1, 8), eye, 3, normalises=True, sum_eps=0.0)
    assert (ids.tolist(), weights.tolist()) == ([[0, 1, 2]], [[pytest.approx(1 / 3)] * 3])
    odd = torch.tensor([[float("nan")] * 8, [1.0, float("nan"), 2.0, float("inf"), 0.0, -float("inf"), 3.0, 4.0]])
    ids, _ = products.route(odd, eye, 4, normalises=True, sum_eps=0.0)
    assert all(len(set(row)) == 4 and set(row) <= set(range(8)) for row in ids.tolist())
    with raises(ValueError, "ids", (1, 9), 8):
        products.route(torch.zeros(1, 8), eye, 9, normalises=True, sum_eps=0.0)
    assert products.route(torch.zeros(0, 8), eye, 2, normalises=True, sum_eps=0.0)[0].shape == (0, 2)


def test_tokens_are_drawn_alike_on_every_instruction_set(use_isa: Callable[[str], None]) -> None:
    rows, vocab_size = 64, 1003
    logits = sample(rows, vocab_size) * torch.linspace(0.01, 1e3, rows)[:, None]  # from level to steep

    params = [
        ((300 if row % 2 else 0, 0.1 + row / 20, 0.9 if row % 3 else 1.0, 0.0 if row % 5 else 0.01), row, row)
        for row in range(rows)
    ]
    use_isa("portable")
    expected = sampling.draw(logits, params)
    assert len(set(expected)) > rows / 2
    for isa in supported_isas():
        use_isa(isa)
        assert sampling.draw(logits, params) == expected
