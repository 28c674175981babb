"""The fused mixture of experts, against experts computed one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension, panels, products
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.layouts import DENSE
from amalgam.kernels.weights import SWIGLU, Expert, ExpertTable, GatedActivation, PackedWeight
from tests.errors import raises
from tests.kernels.weights import every_layout

HIDDEN, WIDTH = 72, 120  # 24 and 40 divide one of them, 8 both
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 0.03}

moe = CpuOperators.moe

pytestmark = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixed_experts(count: int, *, has_bias: bool = False, only: str | None = None) -> list[Expert]:
    """Experts whose projections all have layouts of their own."""
    experts = []
    for index in range(count):
        up, down = every_layout((WIDTH, HIDDEN), index), every_layout((HIDDEN, WIDTH), index)
        names = [sorted(layouts)[(index * 3 + shift) % len(layouts)] for shift, layouts in enumerate((up, up, down))]
        gate_name, up_name, down_name = names if only is None else (only,) * 3
        biases = [random(size, seed=index) for size in (WIDTH, WIDTH, HIDDEN)] if has_bias else [None] * 3
        experts.append(Expert(up[gate_name], up[up_name], down[down_name], *biases))
    return experts


def packed(experts: list[Expert]) -> ExpertTable:
    table = []
    for expert in experts:
        gate, up, down = (panels.prepare(weight) for weight in (expert.gate, expert.up, expert.down))
        table.append(replace(expert, gate=gate, up=up, down=down))
    return products.prepare_experts(ExpertTable(table))


def routing(tokens: int, experts: int, k: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    return ids, torch.rand((tokens, k), generator=generator)


def exact(
    x: Tensor, ids: Tensor, weights: Tensor, experts: list[Expert], activation: GatedActivation = SWIGLU
) -> Tensor:
    def product(inputs: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        result = inputs @ weight.dequantize(torch.float64).T
        return result if bias is None else result + bias.double()

    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for expert_id, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            expert = experts[expert_id]
            gate = product(x[token].double(), expert.gate, expert.gate_bias)
            up = product(x[token].double(), expert.up, expert.up_bias)
            if activation.limit is not None:
                gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
            inner = gate * torch.sigmoid(activation.alpha * gate) * (up + activation.offset)
            result[token] += weight * product(inner, expert.down, expert.down_bias)
    return result


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.usefixtures("isa")
def test_every_projection_has_its_own_layout(dtype: torch.dtype, has_bias: bool) -> None:
    experts = mixed_experts(9, has_bias=has_bias)
    table = packed(experts)
    assert products.supports_moe(torch.ones(1, HIDDEN), table)
    for tokens in (1, 3, 40):
        x = random(tokens, HIDDEN).to(dtype)
        ids, weights = routing(tokens, len(experts), 3)
        result = moe(x, ids, weights, table)
        assert result.dtype == dtype
        assert error(result, exact(x, ids, weights, experts)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.usefixtures("isa")
def test_every_layout(dtype: torch.dtype) -> None:
    ids, weights = routing(5, 2, 1)
    x = random(5, HIDDEN).to(dtype)
    for name in every_layout((WIDTH, HIDDEN)).keys() & every_layout((HIDDEN, WIDTH)).keys():
        experts = mixed_experts(2, only=name)
        assert error(moe(x, ids, weights, packed(experts)), exact(x, ids, weights, experts)) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.usefixtures("isa")
def test_other_activations(dtype: torch.dtype) -> None:
    experts = mixed_experts(3, has_bias=True)
    x = random(5, HIDDEN).to(dtype)
    ids, weights = routing(5, 3, 2)
    for activation in (GatedActivation(1.702, 1.0, 7.0), GatedActivation(0.5, 0.0, 0.25), GatedActivation(offset=-2.0)):
        result = moe(x, ids, weights, packed(experts), activation)
        assert error(result, exact(x, ids, weights, experts, activation)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("isa")
def test_one_expert_may_take_all_tokens_or_none() -> None:
    experts = mixed_experts(4)
    x = random(200, HIDDEN)
    weights = torch.ones(200, 1)
    result = moe(x, torch.full((200, 1), 2), weights, packed(experts))
    assert error(result, exact(x, torch.full((200, 1), 2), weights, experts)) < TOLERANCE[torch.float32]
    none = moe(x[:0], torch.empty(0, 1, dtype=torch.int64), weights[:0], packed(experts))
    assert none.shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.usefixtures("isa")
def test_a_token_is_the_same_alone_in_a_batch_and_on_any_number_of_threads(
    use_threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    table = packed(mixed_experts(7, has_bias=True))
    x = random(60, HIDDEN).to(dtype)
    ids, weights = routing(60, 7, 3)
    use_threads(1)
    together = moe(x, ids, weights, table)
    for token in range(0, 60, 5):
        row = slice(token, token + 1)
        assert torch.equal(moe(x[row], ids[row], weights[row], table), together[row])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    for threads in (2, 3, 8, 64):
        use_threads(threads)
        assert torch.equal(moe(x, ids, weights, table), together)
        assert torch.equal(moe(x[order], ids[order], weights[order], table), together[order])


@pytest.mark.usefixtures("isa")
def test_float32_results_do_not_depend_on_the_layout() -> None:
    def values(weight: PackedWeight) -> PackedWeight:
        return PackedWeight(DENSE, weight.shape, {"weight": weight.dequantize(torch.float32)})

    experts = mixed_experts(8)
    plain = [Expert(values(e.gate), values(e.up), values(e.down)) for e in experts]
    x = random(30, HIDDEN)
    ids, weights = routing(30, 8, 2)
    assert torch.equal(moe(x, ids, weights, packed(experts)), moe(x, ids, weights, packed(plain)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("operator", [moe, reference.moe])
def test_an_id_of_no_expert_adds_nothing(operator: Callable[..., Tensor], nan_in_new_memory: None) -> None:
    """Whatever its gate weight is, and as if the others were all."""
    experts = packed(mixed_experts(3))
    x, (ids, weights) = random(3, HIDDEN), routing(3, 3, 2)
    ids[0, 0], weights[0, 0] = -1, torch.nan
    ids[1, 1], weights[1, 1] = -1, torch.inf
    ids[2] = -1
    found = operator(x, ids, weights, experts)
    assert torch.equal(found[:1], operator(x[:1], ids[:1, 1:], weights[:1, 1:], experts))
    assert torch.equal(found[1:2], operator(x[1:2], ids[1:2, :1], weights[1:2, :1], experts))
    assert torch.equal(found[2], torch.zeros(HIDDEN))
    assert torch.equal(operator(x[2:], ids[2:], weights[2:], experts), torch.zeros(1, HIDDEN))


def test_the_sum_runs_in_the_order_of_k() -> None:
    experts = packed(mixed_experts(6, only="fp32"))
    x = random(4, HIDDEN)
    ids, weights = routing(4, 6, 5)
    total = torch.zeros(4, HIDDEN)
    for slot in range(5):
        total = total + moe(x, ids[:, slot : slot + 1], torch.ones(4, 1), experts) * weights[:, slot : slot + 1]
    assert torch.equal(moe(x, ids, weights, experts), total)


@pytest.mark.parametrize("change", [lambda x: x.to("meta"), lambda x: x.double(), lambda x: x.long()])
def test_activations_of_other_places_and_types_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    table, x = packed(mixed_experts(3)), random(4, HIDDEN)
    ids, weights = routing(4, 3, 2)
    with raises(ValueError, "x"):
        products.moe(change(x), ids, weights, table)
    for name, other in (("expert_ids", (ids.to("meta"), weights)), ("gate_weights", (ids, weights.to("meta")))):
        with raises(ValueError, name):
            products.moe(x, *other, table)


def test_unpacked_experts_take_the_reference() -> None:
    experts = mixed_experts(3, only="bf16")
    mixture = [*packed(experts[:2]).experts, experts[2]]
    ids, weights = routing(4, 3, 2)
    x = random(4, HIDDEN)
    table = ExpertTable(mixture)
    assert products.prepare_experts(table) is table and not products.supports_moe(x, table)
    expected = reference.moe(x, ids, weights, ExpertTable(experts))
    torch.testing.assert_close(moe(x, ids, weights, table), expected)


def test_what_cannot_be_read_is_refused() -> None:
    table = packed(mixed_experts(3))
    x, weights = random(2, HIDDEN), torch.ones(2, 1)
    for wrong in (-2, 3):
        with raises(IndexError, wrong, 3):
            moe(x, torch.tensor([[0], [wrong]]), weights, table)
    with raises(ValueError, "x", (2, HIDDEN + 1), HIDDEN):
        moe(random(2, HIDDEN + 1), torch.zeros(2, 1, dtype=torch.int64), weights, table)
    with raises(ValueError, "gate_weights", (2, 2), (2, 1)):
        moe(x, torch.zeros(2, 2, dtype=torch.int64), weights, table)
    assert moe(x.half(), torch.zeros(2, 1, dtype=torch.int64), weights, table).dtype == torch.float16
