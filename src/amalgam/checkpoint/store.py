"""A checkpoint as one lazy mapping from tensor names to tensors.

In: a folder or a `.gguf` file. Out: `TensorStore`. Decides which files are the checkpoint, checks that they agree with
the index and with each other, and leaves the bytes to the shards. Must never know what a tensor's name means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from amalgam.base.files import reading
from amalgam.base.folders import member, read_json
from amalgam.checkpoint.gguf import SUFFIX as GGUF_SUFFIX
from amalgam.checkpoint.gguf import GgufShard, list_split, open_split
from amalgam.checkpoint.safetensors_header import TensorEntry
from amalgam.checkpoint.shards import Identity, PickleShard, SafetensorsShard, Shard, identify
from amalgam.errors import CheckpointError, describe

__all__ = ["TensorEntry", "TensorStore"]

MAX_INDEX_BYTES = 64 * 2**20
_NUMBERED = re.compile(r"(.{1,200})-(\d{5})-of-(\d{5,6})(\.safetensors|\.bin)")


class TensorStore(Mapping[str, TensorEntry]):
    """The tensors of a checkpoint. Threads may read it at the same time.

    Opening reads headers only (`.bin`: the pickles, with torch's weights-only unpickler).

    Attributes:
        folder: the checkpoint's folder; the `.gguf` file itself where one was named.
        metadata: what a GGUF checkpoint says about its model, by key; empty for other containers.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.metadata: Mapping[str, Any] = shards[0].metadata if isinstance(shards[0], GgufShard) else {}
        self.files = tuple(shard.file for shard in shards)
        self._shards = {shard.file: shard for shard in shards}
        self._entries: dict[str, TensorEntry] = {}
        for shard in shards:
            for entry in shard.entries:
                other = self._entries.setdefault(entry.name, entry)
                if other is not entry:
                    raise CheckpointError(
                        f"Tensor {describe(entry.name)} is both in {other.file} and in {entry.file.name}.",
                        remedy="Keep one copy of the weights in the folder, or add the index that chooses.",
                    )

    @classmethod
    def open(cls, folder: Path) -> TensorStore:
        """Index the checkpoint in `folder`, or a `.gguf` file together with the other parts if it is split.

        Of a folder the first of these that exists: `model.safetensors.index.json`, `model.safetensors`, another
        `*.safetensors.index.json`, all `*.safetensors`, `pytorch_model.bin.index.json`, `pytorch_model.bin`, all
        `pytorch_model-*.bin`, the one model in `*.gguf`.

        Raises:
            CheckpointError: no folder, or one that cannot be read, no weights, a missing or damaged file, or an index
                that its files contradict.
        """
        with reading(folder):
            return cls(folder, _open_shards(folder))

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, tensor: str | TensorEntry) -> torch.Tensor:
        """A CPU tensor that shares the file's pages (a copy if its elements are not aligned in the file).

        The file stays mapped while the tensor lives, also after `close`.

        Args:
            tensor: its name, or an entry that describes part of a tensor (`TensorEntry.part`).

        Raises:
            CheckpointError: no such tensor, or its file has changed since it was opened.
        """
        entry, shard = self._find(tensor)
        return shard.read(entry)

    def check(self, tensor: str | TensorEntry) -> None:
        """To be called when what `read` gave has been used, and before that use counts.

        Raises:
            CheckpointError: the tensor's file has changed, or lost pages, since it was opened.
        """
        self._find(tensor)[1].check()

    def release(self, tensor: str | TensorEntry) -> None:
        """Give back the memory of a tensor's pages; they are read again from the file when touched again."""
        entry, shard = self._find(tensor)
        shard.release(entry)

    def identity(self, tensor: str | TensorEntry) -> Identity:
        """(file, mtime in ns, bytes, inode) of the tensor's file now: differs once the file has changed.

        Take it *before* `read`, which fails when the file has changed since `open`: then it belongs to what was read.
        """
        return identify(self._find(tensor)[0].file)

    def has_changed(self) -> bool:
        """Whether a file is another one than when it was opened, or gone."""
        try:
            return any(identify(shard.file) != shard.identity for shard in self._shards.values())
        except CheckpointError:
            return True

    def close(self) -> None:
        """Let go of the files; views that were handed out stay valid. Reading again maps them again."""
        for shard in self._shards.values():
            shard.close()

    def _find(self, tensor: str | TensorEntry) -> tuple[TensorEntry, Shard]:
        name = tensor if isinstance(tensor, str) else tensor.name
        entry = self._entries.get(name) if isinstance(tensor, str) else tensor
        if entry is None:
            raise CheckpointError(f"{self.folder} has no tensor {describe(name)}.", remedy="Correct the name.")
        return entry, self._shards[entry.file]


@dataclass(frozen=True)
class _Listing:
    names: list[str]
    index: str = ""
    weight_map: dict[str, str] | None = None


def _open_shards(folder: Path) -> Sequence[Shard]:
    """
    Raises:
        CheckpointError: see `TensorStore.open`.
        OSError: the folder cannot be read.
    """
    if folder.suffix == GGUF_SUFFIX and folder.is_file():
        return open_split(list_split(folder))
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.", remedy="Correct the path of the checkpoint.")
    listing = _list_files(folder)
    if listing.names[0].endswith(GGUF_SUFFIX):
        return open_split([member(folder, name) for name in listing.names])
    opener = SafetensorsShard if listing.names[0].endswith(".safetensors") else PickleShard
    shards: list[Shard] = [opener(member(folder, name)) for name in listing.names]
    if listing.weight_map is not None:
        _check_index(folder / listing.index, listing.weight_map, shards)
    _check_shards(folder, listing.names)
    if not any(shard.entries for shard in shards):
        raise CheckpointError(f"{folder} holds no tensors, only empty files.", remedy="Download it again.")
    return shards


def _list_files(folder: Path) -> _Listing:
    present = sorted(path.name for path in folder.iterdir())
    for single, suffix, shard_prefix in (
        ("model.safetensors", ".safetensors", ""),
        ("pytorch_model.bin", ".bin", "pytorch_model-"),
    ):
        if f"{single}.index.json" in present:
            return _read_index(folder, f"{single}.index.json", suffix)
        if single in present:
            return _Listing([single])
        indices = [name for name in present if name.startswith(shard_prefix) and name.endswith(f"{suffix}.index.json")]
        if len(indices) > 1:
            _refuse(folder, f"has several index files: {', '.join(map(describe, indices))}", "Keep the one to use.")
        if indices:
            return _read_index(folder, indices[0], suffix)
        shards = [name for name in present if name.startswith(shard_prefix) and name.endswith(suffix)]
        if shards:
            return _Listing(shards)
    ggufs = [name for name in present if name.endswith(GGUF_SUFFIX)]
    if ggufs:
        names = [file.name for file in list_split(folder / ggufs[0])]
        if names != ggufs:
            _refuse(
                folder, f"holds several GGUF models: {', '.join(map(describe, ggufs))}", "Give the path of one file."
            )
        return _Listing(names)
    raise CheckpointError(
        f"{folder} has no weights; it holds {describe(present, 300) if present else 'nothing'}.",
        remedy="Give a folder with *.safetensors, pytorch_model*.bin or *.gguf files.",
    )


def _read_index(folder: Path, index: str, suffix: str) -> _Listing:
    weight_map = read_json(folder, index, MAX_INDEX_BYTES).get("weight_map")
    file = folder / index
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(file, f"has weight_map {describe(weight_map)} instead of an object from tensor to file")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(suffix):
            _refuse(file, f"puts tensor {describe(tensor)} in {describe(name)} instead of in a *{suffix} file")
    return _Listing(sorted(set(weight_map.values())), index, weight_map)


def _check_index(index: Path, weight_map: dict[str, str], shards: list[Shard]) -> None:
    found = {(entry.name, name) for shard in shards for name in [shard.file.name] for entry in shard.entries}
    listed = set(weight_map.items())
    for tensor, name in sorted(listed - found)[:1]:
        _refuse(index, f"puts tensor {describe(tensor)} in {describe(name)}, which does not have it")
    for tensor, name in sorted(found - listed)[:1]:
        other = weight_map.get(tensor)
        where = f"puts it in {describe(other)}" if other else "does not list it"
        _refuse(index, f"does not fit: {describe(name)} has tensor {describe(tensor)}, the index {where}")


def _check_shards(folder: Path, names: Sequence[str]) -> None:
    """Raise CheckpointError if shards that count themselves, `model-00002-of-00005.safetensors`, are not all used."""
    used = set(names)
    for series in {(found[1], found[3], found[4]) for name in names if (found := _NUMBERED.fullmatch(name))}:
        stem, count, suffix = series
        present = {
            path.name
            for path in folder.iterdir()
            if (found := _NUMBERED.fullmatch(path.name)) and (found[1], found[3], found[4]) == series
        }
        for name in sorted(present - used)[:1]:
            _refuse(folder, f"has the shard {describe(name)}, which its index does not name")
        for number in range(1, min(int(count), len(present) + 1) + 1):
            if (name := f"{stem}-{number:05}-of-{count}{suffix}") not in present:
                _refuse(folder, f"has no shard {describe(name)}, but others of its {int(count)}")


def _refuse(path: Path, what: str, remedy: str = "Download the checkpoint again: its files must fit.") -> NoReturn:
    raise CheckpointError(f"{path} {what}.", remedy=remedy)
