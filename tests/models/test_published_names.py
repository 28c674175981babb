"""The tensors of published checkpoints, by their names: each is a weight of ours, and each of ours is there.

`tests/data/published_names/` has a file for each: where its names are from, the configuration that goes with them, and
the names, `[0-31]` standing for each of these numbers. A suffix of quantized weights goes with its weight.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from amalgam.models.registry import read_spec
from amalgam.models.spec import Family, ModelSpec

FOLDER = Path(__file__).parents[1] / "data" / "published_names"
_RANGE = re.compile(r"\[([\d,-]+)\]")
_EXPERTS = re.compile(r"(?<=experts\.)\[0-(\d+)\]")
_EXPERT = re.compile(r"(?<=experts\.)\d+")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_SCALES = re.compile(r"_scale_inv$|(?<!per_expert)_scale$|_scales$|_blocks$")  # Gemma 4 has factors of that name


@dataclass(frozen=True)
class Published:
    """One file."""

    origin: str
    config: dict[str, Any]
    names: list[str]

    @classmethod
    def read(cls, path: Path) -> Published:
        lines = path.read_text().splitlines()
        header = {line.split(": ")[0]: line.split(": ", 1)[1] for line in lines if line.startswith("# ")}
        names = [name for line in lines if line and not line.startswith("#") for name in expand(line)]
        return cls(header["# origin"], json.loads(header["# config"]), names)


def expand(pattern: str) -> list[str]:
    """`layers.[0-1,4].x` → the names of layers 0, 1 and 4. Of a layer's experts only the first two and the last one:
    they are hundreds, and each has its name like any other."""
    pattern = _EXPERTS.sub(lambda found: f"[0,1,{found[1]}]", pattern)
    stem = _RANGE.sub("{}", pattern)
    return [stem.format(*numbers) for numbers in product(*map(numbers_of, _RANGE.findall(pattern)))]


def numbers_of(ranges: str) -> list[int]:
    bounds = [part.split("-") for part in ranges.split(",")]
    return [number for bound in bounds for number in range(int(bound[0]), int(bound[-1]) + 1)]


def some_experts(spec: ModelSpec) -> set[str]:
    return {"0", "1", str(spec.num_experts - 1)}


def logical_names(name: str, family: Family, spec: ModelSpec) -> set[str]:
    """The weights of ours that a tensor holds, or is a part of."""
    numbers = _NUMBER.findall(name)
    for fused in family.fused:
        if not name.startswith(fused.stored.partition("{}")[0]):
            continue
        stem = fused.stored.format(*numbers) if fused.stored.count("{}") == len(numbers) else None
        if stem is None or not (name == stem or name.startswith((f"{stem}.", f"{stem}_"))):
            continue
        last = "bias" if name.endswith("bias") else "weight"
        experts = [(number,) for number in sorted(some_experts(spec))] if fused.is_stacked else [()]
        return {f"{module.format(*numbers, *expert)}.{last}" for module in fused.modules for expert in experts}
    return {_SCALES.sub("", name)}


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.iterdir()))
def test_names_map_without_a_leftover(file: str) -> None:
    published = Published.read(FOLDER / file)
    family, spec = read_spec(published.config, file)
    assert published.origin
    experts = some_experts(spec)
    slots = [slot for slot in spec.slots if (number := _EXPERT.search(slot.name)) is None or number[0] in experts]
    ours = {family.logical_name(slot) for slot in slots}
    found: set[str] = set()
    for name in published.names:
        (whole,) = family.with_whole_names({name: None}, ours)
        logical = logical_names(whole, family, spec)
        if not logical <= ours and family.is_ignored(name, spec):
            continue
        if spec.has_tied_head and logical == {"lm_head.weight"}:
            continue  # written twice
        assert logical <= ours, f"{name} is no weight of ours: {sorted(logical - ours)[:3]}"
        found |= logical
    assert not ours - found, f"not published: {sorted(ours - found)[:5]}"
