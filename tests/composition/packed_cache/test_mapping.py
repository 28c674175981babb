"""Weights mapped from memory compute the same bits, and what does not agree is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from amalgam.checkpoint.packed_file import ALIGNMENT
from amalgam.kernels.backends.cpu import extension, mapped, panels, products
from amalgam.kernels.layouts import dense
from tests.cases import each_case
from tests.errors import raises
from tests.kernels import weights as made

pytestmark = pytest.mark.skipif(not extension.is_available(), reason="the native kernels are not built")


@pytest.mark.parametrize("shape", [(48, 384), (33, 200), (1, 200)])
@pytest.mark.parametrize("activation", ["int8", "bf16"])
def test_a_restored_weight_computes_the_same_bits(shape: tuple[int, int], activation: panels.ActivationType) -> None:
    with each_case() as case:
        for name, layout in made.every_layout(shape).items():
            with case(name):
                weight = panels.prepare(layout, activation)
                assert mapped.can_be_mapped(weight)
                description = json.loads(json.dumps(mapped.describe(weight)))
                # Memory of their own, so that the first weight's can go.
                memory = [aligned(run) for run in mapped.runs(weight)]
                restored = mapped.restore(description, memory, activation)
                del memory
                assert restored.nbytes == weight.nbytes
                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.randn((3, shape[1]), generator=torch.Generator().manual_seed(1)).to(dtype)
                    assert torch.equal(products.linear(x, restored), products.linear(x, weight))
                assert torch.equal(restored.dequantize(), weight.dequantize())


def aligned(run: torch.Tensor) -> torch.Tensor:
    spare = torch.empty(run.numel() + ALIGNMENT, dtype=torch.uint8)
    start = -spare.data_ptr() % ALIGNMENT
    return spare[start : start + run.numel()].copy_(run)


def change(description: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(description))
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layout",), "panels_int8"),
        (("layout",), "panels_fp32"),
        (("layout",), "panels_int5"),
        (("layout",), "dense"),
        (("layout",), 7),
        (("shape",), [384]),
        (("shape", 0), 64),
        (("shape", 0), -48),
        (("shape", 0), 0),
        (("shape", 0), 2**31),
        (("shape", 0), 48.0),
        (("shape", 1), 2**60),
        (("block",), None),
        (("block", 1), 0),
        (("block", 1), -64),
        (("block", 1), 12),
        (("block", 1), 128),
        (("parts", "scale", 0), "uint8"),
        (("parts", "scale", 0), "float32"),
        (("parts", "scale", 0), "complex"),
        (("parts", "scale", 1, 1), 7),
        (("parts", "scale", 1, 1), 0),
        (("parts", "scale", 1, 2), 3),
        (("parts", "scale", 1, 2), 1),
        (("parts", "scale", 1), [6]),
        (("parts", "group"), ["int32", [384]]),
        (("parts",), []),
    ],
)
def test_impossible_descriptions_are_refused(path: tuple[Any, ...], value: Any) -> None:
    weight = panels.prepare(made.int4((48, 384), 64, has_zero=True))
    memory = [aligned(run) for run in mapped.runs(weight)]
    with raises(ValueError):
        mapped.restore(change(mapped.describe(weight), path, value), memory, "int8")


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (64, 1),  # the first panel's exceptions begin
        (64 + 4, 2**31 - 1),  # the second's
        (64 + 4, -1),
        (64 + 12, 0),  # the last's end
        (128, 384),  # a column
        (128, -1),
        (132, 16),  # a lane
    ],
)
def test_exceptions_of_a_coded_weight_lie_within_it(offset: int, value: int) -> None:
    weight = panels.prepare(made.coded((48, 384)))
    [memory] = [aligned(run) for run in mapped.runs(weight)]
    description = mapped.describe(weight)
    assert mapped.restore(description, [memory], "int8").parts["exceptions"].numel() > 128
    tail = memory[weight.parts["weight"].numel() :]
    size = 2 if offset == 132 else 4
    tail[offset : offset + size] = torch.tensor([value]).view(torch.uint8)[:size]
    with raises(ValueError):
        mapped.restore(description, [memory], "int8")


def test_a_coded_weight_is_as_long_as_its_exceptions() -> None:
    weight = panels.prepare(made.coded((48, 384)))
    [memory] = mapped.runs(weight)
    for length in (0, 64, weight.parts["weight"].numel(), memory.numel() - 8, memory.numel() - 3):
        with raises(ValueError):
            mapped.restore(mapped.describe(weight), [aligned(memory[:length])], "int8")
    longer = torch.cat([memory, torch.zeros(8 * 48 * 384, dtype=torch.uint8)])
    with raises(ValueError):
        mapped.restore(mapped.describe(weight), [aligned(longer)], "int8")


def test_a_dense_weight_is_as_long_as_it_says() -> None:
    """Its address is all that a kernel gets."""
    description = mapped.describe(dense(torch.zeros(2048, dtype=torch.bfloat16)))
    changed = change(change(description, ("parts", "weight", 1), [1]), ("runs",), [2])
    with raises(ValueError, (2048,)):
        mapped.restore(changed, [aligned(torch.zeros(2, dtype=torch.uint8))], "int8")


@pytest.mark.parametrize(
    "codebooks",
    [
        ["float32", [2, 256, 8]],  # twice the bytes
        ["float16", [2, 255, 8]],
        ["float16", [4, 128, 8]],
        ["float16", [2, 128, 16]],
        ["float16", [2, 512, 4]],
        ["float16", [0, 256, 8]],
        ["float16", [2, 256, 1, 8]],
        ["int16", [2, 256, 8]],
    ],
)
def test_codebooks_are_those_of_the_bytes(codebooks: list[Any]) -> None:
    weight = panels.prepare(made.codebooks((48, 384), 2, 8, 8, torch.float16))
    memory = [aligned(run) for run in mapped.runs(weight)]
    with raises(ValueError):
        mapped.restore(change(mapped.describe(weight), ("parts", "codebooks"), codebooks), memory, "int8")


def test_codes_of_a_damaged_file_name_no_vector_outside() -> None:
    weight = panels.prepare(made.codebooks((48, 384), 1, 9, 16, torch.float16))
    memory = aligned(mapped.runs(weight)[0])
    memory[: weight.parts["weight"].numel()] = 255
    books = weight.parts["codebooks"].float()
    values = mapped.restore(mapped.describe(weight), [memory], "int8").dequantize()
    assert torch.equal(values[0], (books[0, -1] * weight.parts["scale"][0, 0, 0].float()).repeat(24))


def test_panels_must_be_aligned() -> None:
    weight = panels.prepare(made.int4((48, 384), 64))
    [run] = mapped.runs(weight)
    shifted = aligned(torch.cat([torch.zeros(1, dtype=torch.uint8), run]))[1:]
    with raises(ValueError, "64-byte"):
        mapped.restore(mapped.describe(weight), [shifted], "int8")
