"""Damaged or contradictory weights of every published layout: each is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from amalgam.composition.source import Source
from amalgam.errors import CheckpointError, UnsupportedError
from amalgam.formats.registry import all_formats
from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.layouts import dense
from tests.cases import each_case
from tests.errors import raises
from tests.formats.layouts import LAYOUTS, Layout, Tensors

ROWS, COLUMNS = 64, 128
QUANTIZED = {name: layout for name, layout in LAYOUTS.items() if layout.quantization}
FORMATS = {weight_format.name: weight_format for weight_format in all_formats()}
Damage = Callable[[Tensors], None]


def open_layout(folder: Path, layout: Layout, tensors: Tensors) -> Source:
    save_file({f"x.{suffix}": t.contiguous() for suffix, t in tensors.items()}, folder / "model.safetensors")
    config = {"quantization_config": layout.quantization} if layout.quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    return Source.open("test", str(folder))


@pytest.mark.parametrize("name", LAYOUTS)
def test_undamaged_weights_load(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    torch.manual_seed(2)
    source = open_layout(tmp_path, layout, layout.make(ROWS, COLUMNS))
    (stored,) = source.weights.values()
    assert (stored.format.name, stored.shape) == (layout.format, (ROWS, COLUMNS))
    packed = source.load(stored)
    restored = packed.dequantize()
    assert restored.shape == (ROWS, COLUMNS) and bool(torch.isfinite(restored).all())
    assert bool((restored != restored[0, 0]).any())
    x = torch.randn(3, COLUMNS, dtype=restored.dtype)
    assert torch.equal(reference.linear(x, packed), reference.linear(x, dense(restored)))
    # An estimate: HQQ's bits, for instance, are told by each weight.
    assert 0.4 < stored.format.nbytes((ROWS, COLUMNS)) / packed.nbytes < 2.5
    assert packed.to(torch.device("cpu")) is packed


def damages(layout: Layout) -> Iterator[tuple[str, Damage]]:
    """What can be wrong with a layout's tensors."""
    tensors = layout.make(ROWS, COLUMNS)
    required = FORMATS[layout.format].required | set(layout.scales) - {"pre_quant_scale"}
    for suffix in sorted(required):
        yield f"no {suffix}", lambda t, s=suffix: t.pop(s)  # type: ignore[misc]
        yield f"{suffix} of the wrong type", lambda t, s=suffix: t.update({s: retyped(t[s])})  # type: ignore[misc]
    for suffix in layout.scales:
        yield f"{suffix} of the wrong shape", lambda t, s=suffix: t.update({s: longer(t[s])})  # type: ignore[misc]
        yield f"{suffix} with NaN", lambda t, s=suffix: poison(t[s], float("nan"))  # type: ignore[misc]
        if tensors[suffix].dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield f"{suffix} infinite", lambda t, s=suffix: poison(t[s], float("inf"))  # type: ignore[misc]
    for suffix in layout.grouped:
        yield f"{suffix} whose groups do not divide", lambda t, s=suffix: t.update({s: three_groups(t[s])})  # type: ignore[misc]
    if layout.format == "hqq":
        for code in (-1, 0x110000):
            yield f"packing with code {code}", lambda t, c=code: t.update(packing=torch.tensor([c]))  # type: ignore[misc]
    if layout.format == "aqlm" and tensors["codes"].dtype == torch.int16:
        for code in (-257, 512):
            yield f"code {code} of 2^9", lambda t, c=code: t["codes"].view(-1)[3:4].fill_(c)  # type: ignore[misc]
    if layout.index:
        yield "group out of range", lambda t: t[layout.index].view(-1)[3:4].fill_(COLUMNS)  # type: ignore[index]
        yield "negative group", lambda t: t[layout.index].view(-1)[3:4].fill_(-1)  # type: ignore[index]
        yield "group index too short", lambda t: t.update({layout.index: t[layout.index][:-1]})  # type: ignore


def retyped(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.dtype in (torch.int64, torch.int32) else torch.float64)


def longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.reshape(1), tensor.reshape(1)]) if tensor.dim() == 0 else torch.cat([tensor, tensor[:1]])


def poison(tensor: Tensor, value: float) -> None:
    if tensor.dtype in (torch.uint8, torch.float8_e8m0fnu):
        tensor.view(torch.uint8).view(-1)[0] = 255
    else:
        tensor.view(-1)[0] = value


def three_groups(tensor: Tensor) -> Tensor:
    """128 inputs have no 3 groups."""
    return tensor[:3] if tensor.shape[0] == COLUMNS // 32 else tensor[:, :3]


@pytest.mark.parametrize("name", QUANTIZED)
def test_damage_is_refused_by_name(name: str, tmp_path: Path) -> None:
    layout = QUANTIZED[name]
    torch.manual_seed(5)
    undamaged = layout.make(ROWS, COLUMNS)
    with each_case() as case:
        for what, damage in damages(layout):
            with case(what):
                tensors = {suffix: tensor.clone() for suffix, tensor in undamaged.items()}
                damage(tensors)
                folder = tmp_path / str(case.count)
                folder.mkdir()
                with raises((CheckpointError, UnsupportedError), "x") as refused:
                    source = open_layout(folder, layout, tensors)
                    for stored in source.weights.values():
                        source.load(stored)
                assert len(str(refused.value)) < 1500
