"""Weights that learn begin as what is stored, and end as what they say they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from amalgam.errors import ConfigError
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.models.spec import Slot
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.training.adam import Adam
from amalgam.training.codes import codes_of, range_of
from amalgam.training.selection import Selection, trained_weights
from amalgam.training.weights import Trained, TrainedCodes, TrainedScales, TrainedValues
from tests.errors import raises

SHAPE = (48, 64)
FORMATS = [
    ("int4", QuantizeOptions(32), 4),
    ("int4", QuantizeOptions(32, has_zero_points=True), 4),
    ("int3", QuantizeOptions(32), 3),
    ("int2", QuantizeOptions(32, has_zero_points=True), 2),
    ("int8", QuantizeOptions(), 8),
    ("int8-packed", QuantizeOptions(32, has_zero_points=True), 8),
    ("fp8", QuantizeOptions(scale="block"), 8),
    ("fp8", QuantizeOptions(scale="channel"), 8),
]
names = [f"{name}-{options.scale or options.group_size}{'z' * options.has_zero_points}" for name, options, _ in FORMATS]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def weight_of(name: str, options: QuantizeOptions) -> tuple[Tensor, PackedWeight]:
    wide = torch.randn(SHAPE, generator=generator()).to(torch.bfloat16)
    made = writable_format(name)
    return wide, made.pack(quantize(wide, made, round_to_nearest, options))


def distance(value: Tensor, goal: Tensor) -> Tensor:
    """As few inputs see it: errors of one output's values can make up for each other."""
    inputs = torch.randn(SHAPE[1], 8, generator=generator())
    return ((value - goal) @ inputs).square().sum()


def descend(trained: Trained, goal: Tensor, rate: float, steps: int = 40) -> None:
    adam = Adam(trained.parameters)
    for step in range(steps):
        adam.forget_gradients()
        distance(trained.value(), goal).backward()
        adam.step(rate * (1 - step / steps))


@pytest.mark.parametrize(("name", "options", "bits"), FORMATS, ids=names)
@pytest.mark.parametrize("learns_codes", [False, True])
def test_a_quantized_weight_comes_nearer_in_its_own_layout(
    name: str, options: QuantizeOptions, bits: int, learns_codes: bool
) -> None:
    wide, packed = weight_of(name, options)
    allowed = range_of(packed, bits)
    assert allowed is not None
    trained: Trained = TrainedScales(packed)
    if learns_codes:
        trained = TrainedCodes(packed, allowed, wide.float(), generator=generator())
    start = packed.dequantize(torch.float32)
    torch.testing.assert_close(trained.value(), start)
    for part, tensor in trained.packed().parts.items():
        assert torch.equal(tensor.float(), packed.parts[part].float()), part

    goal = 1.2 * wide.float() + 0.1 * torch.randn(SHAPE, generator=generator())
    descend(trained, goal, 0.02)
    made = trained.packed()
    torch.testing.assert_close(made.dequantize(torch.float32), trained.value().detach(), rtol=1e-5, atol=1e-5)
    assert distance(made.dequantize(torch.float32), goal) < 0.8 * distance(start, goal)
    assert made.layout is packed.layout and {p: (t.dtype, t.shape) for p, t in made.parts.items()} == {
        p: (t.dtype, t.shape) for p, t in packed.parts.items()
    }
    codes = codes_of(made)
    assert allowed.low <= codes.min() and codes.max() <= allowed.high
    assert torch.equal(codes, codes_of(packed)) is not learns_codes


def test_what_a_float_learns_is_rounded_to_its_type() -> None:
    trained = TrainedValues(dense(torch.ones(SHAPE, dtype=torch.bfloat16)), generator=generator())
    descend(trained, torch.full(SHAPE, 1.1), 0.01)
    made = trained.packed().dense
    assert made.dtype is torch.bfloat16 and torch.equal(made.float(), trained.value().detach())
    assert not torch.equal(made, torch.ones_like(made))


@pytest.mark.parametrize("learns_codes", [False, True])
def test_a_scale_that_outgrows_fp8_is_its_largest(learns_codes: bool) -> None:
    """What NVFP4's scales are stored in has no infinity: a cast alone would make NaN of them."""
    _, packed = weight_of("fp8", QuantizeOptions(scale="channel"))
    scale = torch.full_like(packed.parts["scale"], 300).to(torch.float8_e4m3fn)
    packed = replace(packed, parts={**packed.parts, "scale": scale})
    allowed = range_of(packed, 8)
    assert allowed is not None
    trained: Trained = TrainedScales(packed)
    if learns_codes:
        trained = TrainedCodes(packed, allowed, None, generator=generator())
    trained.parameters["growth"].data.fill_(1.0)
    assert bool(trained.value().isfinite().all())
    assert torch.equal(trained.packed().parts["scale"].float(), torch.full(scale.shape, 448.0))


def of_rank(packed: PackedWeight, wide: Tensor) -> TrainedCodes:
    allowed = range_of(packed, 4)
    assert allowed is not None
    return TrainedCodes(packed, allowed, wide.float(), 2, generator=generator())


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_low_rank_begins_at_nothing_and_learns_little(is_quantized: bool) -> None:
    wide, packed = weight_of("int4", QuantizeOptions(32))
    start = packed if is_quantized else dense(wide)
    trained: Trained = TrainedValues(start, 2, generator=generator()) if not is_quantized else of_rank(packed, wide)
    torch.testing.assert_close(trained.value(), start.dequantize(torch.float32))
    assert sum(leaf.numel() for leaf in trained.parameters.values()) < wide.numel() / 2
    goal = wide.float() + torch.outer(torch.linspace(-1, 1, SHAPE[0]), torch.linspace(-1, 1, SHAPE[1]))
    before = distance(trained.value().detach(), goal)
    descend(trained, goal, 0.05)
    assert distance(trained.packed().dequantize(torch.float32), goal) < 0.7 * before


SLOTS = [Slot("layers.0.attention.q", SHAPE, "attention"), Slot("norm", (64,), "norm"), Slot("head", SHAPE, "head")]


def test_kinds_say_what_learns() -> None:
    _, packed = weight_of("int4", QuantizeOptions(32))
    weights = {SLOTS[0].name: packed, "norm": dense(torch.ones(64)), "head": dense(torch.ones(SHAPE))}
    of = {
        kinds: trained_weights(SLOTS, weights, {SLOTS[0].name: 4}, Selection(frozenset(kinds)), lambda slot: None, 0)
        for kinds in [("scales",), ("codes", "norms"), ("wide",)]
    }
    assert [type(weight) for weight in of["scales",].values()] == [TrainedScales]
    assert [type(weight) for weight in of["codes", "norms"].values()] == [TrainedCodes, TrainedValues]
    assert list(of["wide",]) == ["head"]


def test_powers_of_two_do_not_learn() -> None:
    made = writable_format("mxfp4")
    packed = made.pack(quantize(torch.randn(SHAPE, generator=generator()), made, round_to_nearest))
    slots, weights = SLOTS[:1], {SLOTS[0].name: packed}
    with raises(ConfigError, "scales"):
        trained_weights(slots, weights, {SLOTS[0].name: 4}, Selection(frozenset({"scales"})), lambda slot: None, 0)


@pytest.mark.parametrize(
    ("kinds", "rank", "named"), [((), None, ""), (("flavour",), None, "flavour"), (("norms",), 4, "4")]
)
def test_what_cannot_be_trained_is_named(kinds: tuple[str, ...], rank: int | None, named: str) -> None:
    with raises(ConfigError, named):
        Selection(frozenset(kinds), rank)  # type: ignore[arg-type]
