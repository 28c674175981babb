"""Tensors → a checkpoint folder.

In: named tensors, one at a time, so that a model larger than memory can be written. Out: safetensors shards and their
index. A reader sees all of them or none.
"""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from amalgam.base.files import new_file, replace_file, writing
from amalgam.checkpoint.safetensors_header import DTYPES, PREFIX_BYTES, TensorEntry
from amalgam.errors import CheckpointError, describe

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `tensors` as `model.safetensors`, or as numbered shards with an index when they do not fit one.

    Holds one tensor in memory at a time. Files get their names only when all are complete. For a whole folder that
    appears at once, write into `base.files.resumable_folder`.

    Args:
        folder: created if missing; must not hold safetensors yet.
        metadata: further strings for each file's `__metadata__`.
        max_shard_bytes: most bytes of data in one file; a larger tensor gets a file of its own.

    Raises:
        CheckpointError: the folder has weights already, a name repeats, a dtype has no safetensors name, disk full.
    """
    if any(folder.glob("*.safetensors*")):
        raise CheckpointError(f"{folder} holds safetensors already.", remedy="Choose an empty folder.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".shards-") as temporary:
            shards = _write_shards(Path(temporary), tensors, {"format": "pt", **(metadata or {})}, max_shard_bytes)
            if len(shards) == 1:
                shards[0].file.rename(folder / shard_name(1, 1))
                return
            names = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
            # The index first: a folder that was left halfway then misses files instead of looking complete.
            parts = {name: shard.names for name, shard in zip(names, shards, strict=True)}
            write_index(folder, parts, sum(shard.nbytes for shard in shards))
            for shard, name in zip(shards, names, strict=True):
                shard.file.rename(folder / name)


def write_shard(file: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Write one file of a checkpoint from tensors in memory, in place of one of that name; it appears complete.

    Returns:
        Bytes of the tensors.

    Raises:
        CheckpointError: a dtype has no safetensors name.
        OSError: there is no room.
    """
    for name, tensor in tensors.items():
        _check(name, tensor)
    entries = _arranged([TensorEntry(name, t.dtype, tuple(t.shape), file.parent, 0) for name, t in tensors.items()])
    header, end = _header(entries, {"format": "pt"})
    with new_file(file.parent, f".{file.name}.", ".partial") as out:
        out.write(header)
        offset = len(header)
        for entry in entries:
            out.write(_bytes_of(tensors[entry.name]), offset)
            offset += entry.nbytes
        out.commit(file)
    return end


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """The index of a checkpoint of several files: file name → names of its tensors."""
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    replace_file(folder / "model.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True))


def shard_name(number: int, count: int) -> str:
    """Of the files of a checkpoint, counted from 1."""
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _check(name: str, tensor: torch.Tensor) -> None:
    if name == "__metadata__" or not name or not name.isprintable():
        raise CheckpointError(f"Tensor name {describe(name)} is not allowed.", remedy="Rename it.")
    if tensor.dtype not in _NAMES:
        raise CheckpointError(
            f"Tensor {describe(name)} is {tensor.dtype}, which safetensors files here cannot hold.",
            remedy=f"Convert it to one of {', '.join(_NAMES.values())}.",
        )


def _arranged(entries: list[TensorEntry]) -> list[TensorEntry]:
    """Widest elements first, which keeps all of them aligned: the format allows no holes."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def _header(entries: list[TensorEntry], metadata: dict[str, str]) -> tuple[bytes, int]:
    """What stands before the data of arranged entries, and where those end."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw, end


@dataclass(frozen=True)
class _Written:
    file: Path
    names: list[str]
    nbytes: int


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], metadata: dict[str, str], max_shard_bytes: int
) -> list[_Written]:
    """Collect each shard's data in a spill file, because its header comes first but is known last."""
    shards: list[_Written] = []
    names: set[str] = set()
    entries: list[TensorEntry] = []
    with tempfile.TemporaryFile(dir=folder) as spill:

        def finish() -> None:
            spill.flush()
            file = folder / str(len(shards))
            _write_shard(file, entries, spill, metadata)
            shards.append(_Written(file, [entry.name for entry in entries], spill.tell()))
            entries.clear()
            spill.seek(0)
            spill.truncate()

        for name, tensor in tensors:
            if name in names:
                raise CheckpointError(f"Tensor name {describe(name)} is used twice.", remedy="Rename it.")
            _check(name, tensor)
            if entries and spill.tell() + tensor.nbytes > max_shard_bytes:
                finish()
            names.add(name)
            entries.append(TensorEntry(name, tensor.dtype, tuple(tensor.shape), folder, spill.tell()))
            spill.write(_bytes_of(tensor))
        if not names:
            raise CheckpointError(f"There are no tensors to write into {folder.parent}.", remedy="Check the source.")
        finish()
    return shards


def _write_shard(file: Path, entries: list[TensorEntry], spill: IO[bytes], metadata: dict[str, str]) -> None:
    entries = _arranged(entries)
    header, end = _header(entries, metadata)
    with file.open("wb") as out:
        out.write(header)
        if end:
            with mmap.mmap(spill.fileno(), end, access=mmap.ACCESS_READ) as pages, memoryview(pages) as view:
                for entry in entries:
                    assert entry.offset is not None
                    out.write(view[entry.offset : entry.offset + entry.nbytes])
