"""Products on a matrix unit: Intel's AMX, which any machine can emulate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension, panels, products
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.cpu.panels import PanelWeight
from amalgam.kernels.weights import Expert, ExpertTable, PackedWeight
from tests.kernels.weights import dense, every_layout, int4

if TYPE_CHECKING:
    from amalgam import _native

# Chunks of whole steps, read as they lie; chunks that have to be padded.
SHAPES = ((80, 512), (33, 200))
# A tile of one row, a whole one, two, three, and more than a block of rows.
ROWS = (1, 16, 17, 40, 150)

linear, moe = CpuOperators.linear, CpuOperators.moe

pytestmark = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))


@pytest.fixture
def unit(use_isa: Callable[[str], None]) -> Iterator[_native.MatrixUnit]:
    """The emulated unit, in use; its choices are restored."""
    use_isa("amx_emulated")
    found = extension.kernels().unit
    assert found is not None
    kept = found.int8_rows, found.scales_weights
    yield found
    found.int8_rows, found.scales_weights = kept


def activations(rows: int, columns: int) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(rows)).bfloat16()


def packed(shape: tuple[int, int], activation: panels.ActivationType = "int8") -> dict[str, PackedWeight]:
    return {name: panels.prepare(weight, activation) for name, weight in every_layout(shape).items()}


@pytest.mark.parametrize(
    ("shape", "activation", "scales_weights"),  # each two of them meet
    [(SHAPES[0], "int8", False), (SHAPES[0], "bf16", True), (SHAPES[1], "int8", True), (SHAPES[1], "bf16", False)],
)
def test_any_number_of_rows_of_every_layout(
    unit: _native.MatrixUnit, shape: tuple[int, int], activation: panels.ActivationType, scales_weights: bool
) -> None:
    unit.scales_weights = scales_weights
    x = activations(max(ROWS), shape[1])
    for name, weight in packed(shape, activation).items():
        together = linear(x, weight)
        expected = x.double() @ weight.dequantize(torch.float64).T
        bound = 0.04 if name.startswith("int") and activation == "int8" else 0.01
        assert (together.double() - expected).abs().max() < bound * expected.abs().max(), name
        for rows in ROWS[:-1]:  # fewer than `together` has, from its beginning and from its end in turn
            part = slice(rows) if rows % 2 else slice(-rows, None)
            assert torch.equal(linear(x[part], weight), together[part]), (name, rows)


def takes_integers(weight: PackedWeight) -> bool:
    """Whether int8 activations multiply it on the unit, where groups have no parts with scales of their own."""
    if not isinstance(weight, PanelWeight):
        return False
    name = products.matrix_of(weight).format.name
    return name.startswith("int") or name == "table4"


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_have_the_bits_of_the_vector_loops(unit: _native.MatrixUnit, shape: tuple[int, int]) -> None:
    weights = {name: weight for name, weight in packed(shape).items() if takes_integers(weight)}
    assert {"int4-8", "int8-channel", "affine4-8", "affine8-8"} <= weights.keys()
    for rows in (*range(1, 19), 40, 150):
        x = activations(rows, shape[1])
        unit.int8_rows = 1
        found = {name: linear(x, weight) for name, weight in weights.items()}
        unit.int8_rows = rows + 1
        for name, weight in weights.items():
            assert torch.equal(linear(x, weight), found[name]), (name, rows)


def test_largest_integers(unit: _native.MatrixUnit) -> None:
    """Every sum of a step at its largest: nothing saturates."""
    unit.int8_rows = 1
    weight = int4((16, 512), 128, scale_type=torch.float32)
    weight.parts["weight"].fill_(0)  # -8
    weight.parts["scale"].fill_(1.0)
    x = torch.full((20, 512), 127.0, dtype=torch.bfloat16)
    assert torch.equal(
        linear(x, panels.prepare(weight)).float(), torch.full((20, 16), -8.0 * 127 * 512).bfloat16().float()
    )


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("tokens", [1, 4, 70])
def test_experts_take_their_tokens_wherever_they_lie(tokens: int) -> None:
    def table(*, is_packed: bool) -> ExpertTable:
        prepare: Callable[[PackedWeight], PackedWeight] = panels.prepare if is_packed else (lambda weight: weight)
        ups, downs = every_layout((64, 128)), every_layout((128, 64))
        names = [name for name in ups if name in downs]
        experts = [Expert(prepare(ups[n]), prepare(ups[n]), prepare(downs[n])) for n in names]
        return products.prepare_experts(ExpertTable(tuple(experts))) if is_packed else ExpertTable(tuple(experts))

    native = table(is_packed=True)
    x = activations(tokens, 128) / 8
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(len(native), generator=generator)[:8] for _ in range(tokens)])
    weights = torch.rand((tokens, 8), generator=generator)
    together = moe(x, ids, weights, native)
    for token in range(0, tokens, 9):
        row = slice(token, token + 1)
        assert torch.equal(moe(x[row], ids[row], weights[row], native), together[row])
    plain = table(is_packed=False)
    expected = torch.zeros(tokens, 128, dtype=torch.float64)
    for token in range(tokens):
        for expert_id, factor in zip(ids[token].tolist(), weights[token].double(), strict=True):
            gate, up, down = (
                weight.dequantize(torch.float64)
                for weight in (plain[expert_id].gate, plain[expert_id].up, plain[expert_id].down)
            )
            inner = torch.nn.functional.silu(x[token].double() @ gate.T) * (x[token].double() @ up.T)
            expected[token] += factor * (inner @ down.T)
    assert (together.double() - expected).abs().max() < 0.03 * expected.abs().max()


def by_the_manual(x: Tensor, weight: Tensor) -> Tensor:
    """TDPBF16PS one step of 32 inputs after the other, as Intel's manual has it, in double precision and rounded."""

    def normal(values: np.ndarray) -> np.ndarray:
        return np.where(np.abs(values) < 2.0**-126, np.copysign(0.0, values), values)

    def rounded(values: np.ndarray) -> np.ndarray:
        return normal(values.astype(np.float32).astype(np.float64))

    a, b = normal(x.double().numpy()), normal(weight.double().numpy())
    total = np.zeros((len(a), len(b)))
    for step in range(0, a.shape[1], 32):
        sums = [np.zeros_like(total), np.zeros_like(total)]
        for i in range(step, min(step + 32, a.shape[1])):
            sums[i % 2] = rounded(sums[i % 2] + np.outer(a[:, i], b[:, i]))
        total = rounded(total + rounded(sums[0] + sums[1]))
    return torch.from_numpy(total.astype(np.float32))


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("exponent", [0, -62, -66, -126])  # the last ones: products and values that are subnormal
def test_bfloat16_is_summed_as_the_manual_says(exponent: int) -> None:
    values = dense((32, 192), torch.bfloat16).dense.float()
    weight = torch.ldexp(values, torch.tensor(exponent)).bfloat16()
    x = torch.ldexp(activations(18, 192).float(), torch.tensor(max(exponent, -66))).bfloat16()
    packed_weight = panels.prepare(PackedWeight(dense((1, 8), torch.bfloat16).layout, (32, 192), {"weight": weight}))
    assert isinstance(packed_weight, PanelWeight)
    found = CpuOperators.linear(x, packed_weight, out_dtype=torch.float32)
    assert torch.equal(found, by_the_manual(x, weight))


def test_it_counts_its_operations(unit: _native.MatrixUnit) -> None:
    from amalgam import _native

    assert unit.run(_native.Format.int8, 3, 2) == 3 * 2 * 4 * 16 * 16 * 64 * 2
    assert unit.run(_native.Format.bf16, 1, 1) == 4 * 16 * 16 * 32 * 2


@pytest.mark.parametrize("scale", [1.0, 2.0**-63, 2.0**63])
def test_the_emulation_has_the_bits_of_the_processor(use_isa: Callable[[str], None], scale: float) -> None:
    """Activations whose products are ordinary, subnormal, beyond float32."""
    results = []
    for isa in ("amx", "amx_emulated"):
        use_isa(isa)
        for shape in SHAPES:
            x = (activations(150, shape[1]).float() * scale).bfloat16()
            for weight in packed(shape).values():
                results.append((isa, [linear(x[:rows], weight) for rows in ROWS]))
    half = len(results) // 2
    for (_, found), (_, expected) in zip(results[:half], results[half:], strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
