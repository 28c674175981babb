"""Operators of the reference that no other test compares with torch directly."""

from __future__ import annotations

import pytest
import torch

from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.weights import SWIGLU, GatedActivation

GENERATOR = torch.Generator().manual_seed(1)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_head_is_a_product_for_each_head(dtype: torch.dtype) -> None:
    x, weight = random(13, 4, 24, dtype=dtype), random(4, 24, 40, dtype=dtype)
    result = reference.per_head(x, weight)
    assert result.dtype == dtype
    expected = torch.einsum("thi,hio->tho", x.double(), weight.double())
    torch.testing.assert_close(result.double(), expected, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0.02)


def test_rows_do_not_notice_each_other() -> None:
    x, weight = random(21, 4, 24), random(4, 40, 24).transpose(1, 2)
    norm_weight, bias = random(24), random(24)
    heads, norms = reference.per_head(x, weight), reference.layer_norm(x, norm_weight, bias, 1e-5)
    for row in range(len(x)):
        assert torch.equal(reference.per_head(x[row : row + 1], weight)[0], heads[row])
        assert torch.equal(reference.layer_norm(x[row : row + 1], norm_weight, bias, 1e-5)[0], norms[row])


def test_layer_norm_of_half_types_is_computed_in_float32() -> None:
    x, weight, bias = random(9, 64, dtype=torch.bfloat16), random(64), random(64)
    wide = torch.nn.functional.layer_norm(x.float(), (64,), weight, bias, 1e-5)
    assert torch.equal(reference.layer_norm(x, weight, bias, 1e-5), wide.to(torch.bfloat16))


@pytest.mark.parametrize(
    "activation",
    [SWIGLU, GatedActivation(1.702, 1.0, 7.0), GatedActivation(1.2, 0.5), GatedActivation(limit=0.5)],
    ids=str,
)
def test_gated_follows_the_formula(activation: GatedActivation) -> None:
    gate, up = random(7, 33) * 8, random(7, 33) * 8
    g, u = gate.double(), up.double()
    if activation.limit is not None:
        g, u = g.clamp(max=activation.limit), u.clamp(-activation.limit, activation.limit)
    expected = g * torch.sigmoid(activation.alpha * g) * (u + activation.offset)
    torch.testing.assert_close(reference.gated(gate, up, activation).double(), expected, atol=1e-4, rtol=1e-5)
    if activation == SWIGLU:
        assert torch.equal(reference.gated(gate, up, activation), reference.swiglu(gate, up))
