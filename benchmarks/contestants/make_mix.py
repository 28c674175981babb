"""Shape S, or one of `shapes.py`, with random weights in int4 and half of the experts in fp8, as a checkpoint folder.

    make_mix.py SHAPE FOLDER experts    half of each layer's experts are fp8
    make_mix.py SHAPE FOLDER layers     all experts of every second layer are, for engines with one type for a layer

Both have the same values before they are rounded, so that tokens go the same ways. compressed-tensors' layout: int4 in
groups of 128, fp8 with a scale for each row. Norms, routers, convolutions, rates and embeddings stay wide.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
from shapes import SHAPES
from torch import Tensor

from amalgam.checkpoint.writer import write_checkpoint
from amalgam.formats.contract import Scheme
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.models.registry import read_spec
from amalgam.models.spec import Slot
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.tools import bench
from amalgam.tools.export.targets.compressed import quantization_config

_OPTIONS = {"int4": QuantizeOptions(group_size=128), "fp8": QuantizeOptions(scale="channel")}


def format_of(slot: Slot, unit: str) -> str | None:
    """None: it stays wide."""
    if not slot.is_linear:
        return None
    if slot.role != "expert":
        return "int4"
    layer, expert = (int(part) for part in slot.name.split(".") if part.isdigit())
    return "fp8" if (layer if unit == "layers" else expert) % 2 else "int4"


@cache
def encoded(shape: tuple[int, ...], name: str) -> tuple[Mapping[str, Tensor], Scheme]:
    """One random matrix in a format, and how it is declared; outputs are about as large as inputs."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / math.sqrt(shape[1])
    form = writable_format(name)
    grid = form.grid((shape[0], shape[1]), torch.bfloat16, _OPTIONS[name])
    return form.encode(round_to_nearest(values, grid)).tensors, form.scheme(grid)


def rolled(tensors: Mapping[str, Tensor], rows: int, by: int) -> dict[str, Tensor]:
    """The matrix with its rows moved on: another one, which is not drawn and rounded again."""
    return {suffix: part.roll(by, 0) if len(part) == rows else part for suffix, part in tensors.items()}


def wide(slot: Slot, seed: int, *, norms_add_one: bool) -> Tensor:
    """Values that keep a model of random weights alive: norms near 1, decays near those of a new model.

    Args:
        norms_add_one: all but those of gated delta nets are stored without the 1 that is added to them.
    """
    generator = torch.Generator().manual_seed(seed)
    if slot.role == "norm":
        is_whole = not norms_add_one or slot.name.endswith("attention.norm")
        return torch.randn(slot.shape, generator=generator) * 0.1 + is_whole
    if slot.name.endswith("log_rate"):
        return torch.rand(slot.shape, generator=generator).mul_(15).add_(1).log_()
    if slot.name.endswith("decay_bias"):
        return torch.ones(slot.shape)
    scale = 1.0 if slot.role == "embedding" else slot.shape[-1] ** -0.5
    return torch.randn(slot.shape, generator=generator).mul_(scale).bfloat16()


def make(shape: str, folder: str, unit: str) -> None:
    described = {**bench.SHAPES, **SHAPES}[shape]
    family, spec = read_spec(described, f"shape {shape}")
    norms_add_one = getattr(spec.norm, "adds_one", False)
    groups: dict[str, list[str]] = defaultdict(list)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for slot in spec.slots:
            name, seed = family.logical_name(slot), zlib.crc32(slot.name.encode())
            module = name.removesuffix(".weight")
            if (chosen := format_of(slot, unit)) is None:
                yield name, wide(slot, seed, norms_add_one=norms_add_one)
                continue
            parts, scheme = encoded(slot.shape, chosen)
            group = {"weights": dict(scheme.arguments), "input_activations": None, "output_activations": None}
            groups[json.dumps(group | {"format": scheme.layout})].append(module)
            for suffix, part in rolled(parts, slot.shape[0], seed % slot.shape[0]).items():
                yield f"{module}.{suffix}", part

    write_checkpoint(Path(folder), tensors(), max_shard_bytes=2 << 30)
    left = [family.logical_name(slot).removesuffix(".weight") for slot in spec.slots if slot.decides]
    config = {**described, **quantization_config(groups, left, None)}
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    make(*sys.argv[1:])
