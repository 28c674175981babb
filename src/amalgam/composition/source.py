"""A source: a checkpoint with a name, its tensors grouped into logical weights.

In: a folder or a `.gguf` file, and which of its tensors are fused. Out: `Source.weights`, logical name →
`StoredWeight`, each recognised by exactly one format and in agreement with what the checkpoint declares.
Must never know: layers, families, plans.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amalgam.base.collector import collector_paused
from amalgam.checkpoint.hub import resolve
from amalgam.checkpoint.shards import Identity
from amalgam.checkpoint.store import TensorStore
from amalgam.composition.opening import FusedTable, read_config, reader, stored_weights
from amalgam.config.placement import BASE_SOURCE
from amalgam.errors import CheckpointError
from amalgam.formats.contract import StoredWeight, cut, owned
from amalgam.formats.fused import TensorPart, whole_of
from amalgam.kernels.weights import PackedWeight

Finish = Callable[[PackedWeight], PackedWeight]


@dataclass(frozen=True, eq=False)
class Source:
    """One opened checkpoint.

    Attributes:
        name: as the configuration calls it.
        folder: the checkpoint's folder; the `.gguf` file itself where one was named.
        config: its config.json, or what its metadata say instead; empty if it has neither.
        config_place: where `config` stands, for messages; why there is none, if it is empty.
        weights: logical name → the weight that it stores.
    """

    name: str
    folder: Path
    store: TensorStore
    config: Mapping[str, Any]
    config_place: str
    weights: Mapping[str, StoredWeight]

    @classmethod
    @collector_paused()
    def open(cls, name: str, path_or_hub_id: str, fused: FusedTable = lambda config: ()) -> Source:
        """Open a checkpoint; reads headers, and of some formats the small tensors that hold a weight's shape.

        Args:
            fused: config.json → its fused tensors (`amalgam.models.registry.fused_tensors`).

        Raises:
            CheckpointError: no such folder, damaged files, tensors that no format recognises, or that contradict what
                the checkpoint declares, by name.
            UnsupportedError: it declares a quantization that is not served.
        """
        try:
            folder = resolve(path_or_hub_id)
        except CheckpointError as error:
            if name == BASE_SOURCE:  # whose path is that of the model, which the user may have given alone
                raise
            raise CheckpointError(f"Source {name!r}: {error.what}", remedy=error.remedy) from None
        store = TensorStore.open(folder)
        config, place = read_config(store)
        return cls(name, folder, store, config, place, stored_weights(store, config, fused))

    def load(self, stored: StoredWeight, finish: Finish = lambda packed: packed) -> PackedWeight:
        """Read and pack one weight, and give the file's pages back; the result shares no memory with the file.

        Args:
            finish: what is to become of the packed weight while the pages are there; saves a copy of its own.

        Raises:
            CheckpointError: its file has changed since it was opened, or its data contradict its header.
        """
        with self.opened(stored) as packed:
            finished = finish(packed)
            views = {id(part) for part in packed.parts.values()} if stored.is_wide else set()
            if any(id(part) in views for part in finished.parts.values()):
                parts = {role: owned(part) for role, part in finished.parts.items()}
                finished = replace(finished, parts=parts)
            return finished

    def rows(self, stored: StoredWeight, runs: Sequence[range]) -> Tensor:
        """Runs of a matrix's rows, one after the other, float32; reads no more where the format has rows apart.

        Raises the errors of `load`, but those of the data only for what it reads.
        """
        cuts = [cut(stored, run.start, run.stop) for run in runs]
        if all(part is not None for part in cuts):
            parts = [self._dequantized(part) for part in cuts if part is not None]
            return torch.cat(parts)
        rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        with self.opened(stored) as packed:
            if packed.has_own_rows:
                return packed.take_rows(rows).dequantize(torch.float32)
            return packed.dequantize()[rows].to(torch.float32)

    def _dequantized(self, stored: StoredWeight) -> Tensor:
        with self.opened(stored) as packed:
            return packed.dequantize().to(torch.float32, copy=True)

    def values(self, name: str) -> Tensor | None:
        """A weight's values, float32; None if there is no such weight. Raises the errors of `load`."""
        stored = self.weights.get(name)
        if stored is None:
            return None
        return self._dequantized(stored)

    @contextmanager
    def opened(self, stored: StoredWeight) -> Iterator[PackedWeight]:
        """A weight that may share the file's pages, which are given back at the end.

        Raises:
            CheckpointError: when it ends, too: its file has changed or become shorter meanwhile.
        """
        plain = reader(self.store)

        def read(part: TensorPart) -> Tensor:
            return plain(part) if stored.arrange is None else stored.arrange(plain(part))

        try:
            packed = stored.format.load(stored, read)
            layout = packed.layout.base or packed.layout
            assert layout in stored.format.layouts, (stored.format.name, layout.name)
            yield packed
        finally:
            self.release(*stored.parts.values())  # whatever else has gone wrong may come from a file that has changed

    def read(self, part: TensorPart) -> Tensor:
        """A part's data as the file has it; shares the file's pages."""
        return reader(self.store)(part)

    def release(self, *parts: TensorPart) -> None:
        """Give back the memory of parts that have been read.

        Raises:
            CheckpointError: a file has changed or become shorter meanwhile: what was read does not count.
        """
        tensors = [whole_of(part) for part in parts]
        for tensor in tensors:
            self.store.release(tensor)
        for tensor in {tensor.file: tensor for tensor in tensors}.values():
            self.store.check(tensor)

    def identity(self, stored: StoredWeight) -> tuple[Any, ...]:
        """Equal for two weights exactly if they come from the same unchanged bytes."""
        files: dict[Path, Identity] = {}  # a weight's parts mostly lie in one file: ask for its state once
        for part in stored.parts.values():
            if part.file not in files:
                files[part.file] = self.store.identity(whole_of(part))
        parts = ((part.name, part.offset, part.nbytes, files[part.file]) for part in stored.parts.values())
        return (stored.name, stored.format.name, *parts)

    def files_of(self, stored: StoredWeight) -> set[Identity]:
        """The files that a weight's parts stand in, as they are now."""
        return {self.store.identity(whole_of(part)) for part in stored.parts.values()}

    @cached_property
    def config_digest(self) -> str:
        """Tells configurations apart: what a tensor's bytes mean can depend on them."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True, default=repr).encode()).hexdigest()
