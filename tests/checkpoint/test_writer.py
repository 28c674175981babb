"""Writing a checkpoint: any reader gets back the bytes, and nobody sees half a folder."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.errors import raises

from amalgam.checkpoint import TensorStore, write_checkpoint
from amalgam.checkpoint.safetensors_header import DTYPES
from amalgam.checkpoint.writer import shard_name, write_index, write_shard
from amalgam.errors import CheckpointError


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(3, 5, generator=generator).abs()
    return {f"t.{name}": numbers.to(dtype) for name, dtype in DTYPES.items()}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200])
def test_round_trip_of_every_dtype(max_shard_bytes: int, tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = every_dtype() | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "transposed": base.T,
        "slice": base[1],
        "tied": base[1],
        "parameter": torch.nn.Parameter(base),
    }
    write_checkpoint(tmp_path, tensors.items(), {"made_by": "test"}, max_shard_bytes)
    store = TensorStore.open(tmp_path)
    assert set(store) == set(tensors)
    for name, tensor in tensors.items():
        back = store.read(name)
        assert (back.dtype, back.shape, raw(back)) == (tensor.dtype, tensor.shape, raw(tensor.detach())), name
        if store[name].nbytes:
            assert store[name].offset % tensor.dtype.itemsize == 0  # so that every reader can map it
    for file in store.files:
        with safe_open(file, "pt") as reference:
            assert reference.metadata() == {"format": "pt", "made_by": "test"}
            for name in reference.keys():  # noqa: SIM118, not a mapping
                assert raw(reference.get_tensor(name)) == raw(tensors[name].detach())


def test_shards_are_numbered_bounded_and_indexed(tmp_path: Path) -> None:
    sizes = [40, 40, 40, 500, 10]
    tensors = [(f"t{i}", torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    write_checkpoint(tmp_path, iter(tensors), max_shard_bytes=100)
    names = [f"model-{number:05}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert [index["weight_map"][f"t{i}"] for i in range(5)] == [names[0], names[0], names[1], names[2], names[3]]


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    produced: list[weakref.ref[torch.Tensor]] = []

    def produce() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(20):
            assert sum(ref() is not None for ref in produced) <= 1
            tensor = torch.zeros(10)
            produced.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor

    write_checkpoint(tmp_path, produce())
    assert len(TensorStore.open(tmp_path)) == 20


@pytest.mark.parametrize(
    ("tensors", "value"),
    [
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], "'a'"),
        ([("__metadata__", torch.zeros(1))], "'__metadata__'"),
        ([("a\nb", torch.zeros(1))], r"'a\nb'"),
        ([("a", torch.zeros(1, dtype=torch.complex64))], "complex64"),
        ([], "tensors"),
    ],
)
def test_refused_tensors_leave_the_folder_empty(
    tensors: list[tuple[str, torch.Tensor]], value: str, tmp_path: Path
) -> None:
    with raises(CheckpointError, value):
        write_checkpoint(tmp_path, tensors)
    assert not list(tmp_path.iterdir())


def test_existing_weights_are_not_overwritten(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [("a", torch.ones(1))])
    with raises(CheckpointError, tmp_path):
        write_checkpoint(tmp_path, [("a", torch.zeros(1))])
    assert TensorStore.open(tmp_path).read("a").item() == 1


def test_files_written_one_by_one_are_a_checkpoint(tmp_path: Path) -> None:
    tensors = every_dtype()
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    shards = {shard_name(number, 2): part for number, part in enumerate(parts, 1)}
    total = sum(write_shard(tmp_path / name, part) for name, part in shards.items())
    write_index(tmp_path, shards, total)
    store = TensorStore.open(tmp_path)
    assert {name: raw(store.read(name)) for name in store} == {name: raw(t) for name, t in tensors.items()}
    whole = tmp_path / "whole"
    write_checkpoint(whole, tensors.items())
    write_shard(tmp_path / "alone.safetensors", tensors)
    assert (tmp_path / "alone.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with raises(CheckpointError, "torch.complex64"):
        write_shard(tmp_path / "x", {"a": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "x").exists()
