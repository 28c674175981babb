"""The registry of runtime layouts says of each what other rooms ask."""

from __future__ import annotations

import pytest
import torch

from amalgam.kernels.backends.cpu import extension, mapped, panels
from amalgam.kernels.layouts import DENSE, INT4, LAYOUTS, dense, is_known, scale_columns, with_columns
from amalgam.kernels.weights import Layout
from tests.errors import raises
from tests.kernels.weights import int4


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_an_entry_does_not_contradict_itself(name: str) -> None:
    layout = LAYOUTS[name]
    assert layout.name == name and is_known(layout)
    assert "weight" in layout.parts and not layout.parts & layout.optional
    assert layout.shared <= layout.parts | layout.optional
    assert (layout.unpack is None) == (layout.reader is not None), "somebody expands it"
    for target in layout.panels.values():
        assert target.reader == "cpu" and target.is_floating == layout.is_floating


def test_what_the_extension_knows_and_what_the_registry_says_agree() -> None:
    if not extension.is_available():
        pytest.skip(str(extension.why_unavailable()))
    from amalgam import _native

    named = {name.removeprefix("panels_") for name, layout in LAYOUTS.items() if layout.reader == "cpu"}
    assert named == set(_native.Format.__members__)


def test_columns_multiply_what_another_layout_means() -> None:
    weight, columns = int4((33, 64), 32), torch.rand(64)
    scaled = scale_columns(weight, columns)
    assert scaled.layout is with_columns(INT4) is LAYOUTS["int4_columns"] and scaled.layout.base is INT4
    assert torch.equal(scaled.dequantize(), weight.dequantize() * columns)
    assert panels.prepare(scaled) is scaled
    rows = torch.tensor([4, 0, 32])
    assert torch.equal(scaled.take_rows(rows).dequantize(), scaled.dequantize()[rows])


def test_a_layout_of_the_same_name_is_another() -> None:
    assert not is_known(Layout("dense", DENSE.unpack))


def test_a_weight_is_restored_from_the_parts_of_its_layout_alone() -> None:
    weight = dense(torch.ones(2, 16))
    description, [run] = mapped.describe(weight), mapped.runs(weight)
    assert torch.equal(mapped.restore(description, [run], "int8").dense, weight.dense)
    for parts in ({}, {**description["parts"], "scale": ["float32", [16]]}):
        with raises(ValueError, "dense"):
            mapped.restore({**description, "parts": parts}, [run] * len(parts), "int8")
    with raises(ValueError, "dense_of_tomorrow"):
        mapped.restore({**description, "layout": "dense_of_tomorrow"}, [run], "int8")
