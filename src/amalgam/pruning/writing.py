"""The checkpoint of a smaller model.

In: a wide model, what remains of it. Out: a folder that `amalgam`, transformers and others read, whole or not at all.
Must never know: how it was chosen, how well it does.

What an interrupted run has finished is kept beside the folder, and the next run goes on from there, as `amalgam
quantize` does (`composition/quantizing/shards.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from amalgam.base.files import resumable_folder, writing
from amalgam.calibration.stream import Stream
from amalgam.composition.carry import (
    carry_files,
    drafts_among,
    left_out_tensors,
    weights_besides,
    without_drafts,
    write_json,
)
from amalgam.composition.opening import CONFIG_NAME
from amalgam.composition.progress import Progress
from amalgam.composition.quantizing.shards import Shards, has_shards
from amalgam.composition.wide import WideModel, layer_of
from amalgam.models.spec import Slot
from amalgam.pruning.amounts import Sparsity
from amalgam.pruning.pruned import Pruned
from amalgam.pruning.sparsity import sparse_layer
from amalgam.pruning.storing import stored_as, tensors_of
from amalgam.version import __version__

SHARD_BYTES = 2 * 2**30
RECORD = "pruning.json"


class Maker(Protocol):
    """Makes a smaller model's weights, one layer after the other."""

    @property
    def model(self) -> WideModel: ...

    @property
    def pruned(self) -> Pruned: ...

    def make(self, layer_id: int | None, slots: Sequence[Slot]) -> dict[str, Tensor]:
        """The values of all slots of a layer, or of those outside of the layers (None), `[out, in]`."""

    def skip(self, layer_id: int | None, slots: Sequence[Slot]) -> None:
        """The layer is written already."""


@dataclass(frozen=True, eq=False)
class CutMaker:
    """Makes what a cut leaves."""

    model: WideModel
    pruned: Pruned

    def make(self, layer_id: int | None, slots: Sequence[Slot]) -> dict[str, Tensor]:
        return {slot.name: self.pruned.values(slot, lambda name: self.model.load(name).dense) for slot in slots}

    def skip(self, layer_id: int | None, slots: Sequence[Slot]) -> None:
        pass


@dataclass(eq=False)
class SparseMaker:
    """Makes weights with zeros; layers in their order.

    Attributes:
        token_ids: of the texts; None: by magnitude.
        zeros: of the linear weights made so far; `values`: all of those.
    """

    model: WideModel
    pruned: Pruned
    sparsity: Sparsity
    token_ids: Sequence[Sequence[int]] | None
    zeros: int = 0
    values: int = 0
    _stream: Stream | None = field(default=None, repr=False)

    def make(self, layer_id: int | None, slots: Sequence[Slot]) -> dict[str, Tensor]:
        if layer_id is None:
            return {slot.name: self.model.load(slot.name).dense for slot in slots}
        if self.token_ids is not None and self._stream is None:
            self._stream = Stream(self.model.spec, self.token_ids, self.model.outside())
        weights = self.model.layer(layer_id)
        found = sparse_layer(self.model.spec, layer_id, weights, self.sparsity, self._stream)
        for weight in found.values():
            self.zeros += int((weight == 0).sum())
            self.values += weight.numel()
        return {slot.name: found.get(slot.name, weights[slot.name].dense) for slot in slots}

    def skip(self, layer_id: int | None, slots: Sequence[Slot]) -> None:
        if layer_id is not None:
            self.make(layer_id, slots)

    def all_sparse(self) -> dict[str, Tensor]:
        """All weights with zeros, by slot; all of the model's, in memory."""
        fresh = SparseMaker(self.model, self.pruned, self.sparsity, self.token_ids)
        found: dict[str, Tensor] = {}
        for layer_id, slots in groupby(self.pruned.spec.slots, layer_of):
            linear = [slot for slot in slots if slot.is_linear and slot.role != "head"]
            if layer_id is not None:
                found |= fresh.make(layer_id, linear)
        return found


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        carried: weights beside the model's, copied as they are.
        left_out_tensors, left_out_files: of the checkpoint, that are not in the folder and were not cut either.
        num_resumed: files that an earlier, interrupted run had finished.
    """

    folder: Path
    carried: Sequence[str]
    left_out_tensors: Sequence[str]
    left_out_files: Sequence[str]
    num_resumed: int


@dataclass(frozen=True)
class _Unit:
    """Weights that are made together: a layer's, or those before or behind all of them; or one beside the model's.

    Attributes:
        layer_id: of the smaller model; None outside of the layers.
        nbytes: about.
    """

    layer_id: int | None
    slots: Sequence[Slot]
    nbytes: int
    carried: str | None = None


def write_pruned(
    model: WideModel,
    maker: Maker,
    out_folder: Path,
    record: Mapping[str, Any],
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """
    Args:
        record: what was cut and why, JSON values; it stands in the folder, and tells runs apart.
        shard_bytes: of the weights in one file, about; layers are never divided.

    Raises:
        CheckpointError: the folder exists; the checkpoint is damaged, or holds weights that the model has no place for;
            the disk is full.
        ConflictError: another process is writing the folder, or a run with other options has left a part.
    """
    source, pruned = model.source, maker.pruned
    others = weights_besides(source, model.family, model.spec, set(model.slots))
    drafts = set(drafts_among(others, model.spec))
    carried = [name for name in others if name not in drafts]
    left_out = left_out_tensors(source, {*model.slots, *carried})
    parts = _parts(_units(model, pruned, carried), shard_bytes)
    with resumable_folder(out_folder, has_shards) as folder, writing(out_folder):
        shards = Shards(folder, len(parts), _settings(model, record, carried, shard_bytes))
        num_resumed = shards.num_complete
        for number, part in enumerate(parts):
            if progress is not None:
                progress("Writing, file", number, len(parts))
            if number < num_resumed:
                for unit in part:
                    maker.skip(unit.layer_id, unit.slots)
                continue
            tensors: dict[str, Tensor] = {}
            for unit in part:
                tensors |= _tensors(model, maker, unit)
            shards.add(tensors, {})
        shards.finish()
        config = {**pruned.config, **without_drafts(source.config, left_out, model.spec)}
        if source.store.metadata and "dtype" not in config:
            config["dtype"] = model.main_dtype
        left_out_files = carry_files(source.store, folder)
        write_json(folder / CONFIG_NAME, config)
        write_json(folder / RECORD, {**record, "tool": f"amalgam {__version__}"})
    return Written(out_folder, carried, left_out, left_out_files, num_resumed)


def bytes_of(model: WideModel, pruned: Pruned, slot: Slot) -> int:
    """Of a weight of the smaller model, as stored."""
    origin = pruned.origins[slot.name]
    stored = model.source.weights[model.by_slot[origin.name]]
    return stored.nbytes * math.prod(slot.shape) // math.prod(origin.shape)


def _tensors(model: WideModel, maker: Maker, unit: _Unit) -> dict[str, Tensor]:
    if unit.carried is not None:
        return {unit.carried: model.source.load(model.source.weights[unit.carried]).dense}
    values = maker.make(unit.layer_id, unit.slots)
    origins = maker.pruned.origins
    return tensors_of((slot, stored_as(model, slot, origins[slot.name]), values[slot.name]) for slot in unit.slots)


def _units(model: WideModel, pruned: Pruned, carried: Sequence[str]) -> Iterator[_Unit]:
    for layer_id, group in groupby(pruned.spec.slots, layer_of):
        slots = list(group)
        yield _Unit(layer_id, slots, sum(bytes_of(model, pruned, slot) for slot in slots))
    for name in carried:
        yield _Unit(None, (), model.source.weights[name].nbytes, name)


def _parts(units: Iterator[_Unit], shard_bytes: int) -> list[list[_Unit]]:
    """Units by the file that they go to."""
    parts: list[list[_Unit]] = []
    room = 0
    for unit in units:
        if not parts or room < unit.nbytes:
            parts.append([])
            room = shard_bytes
        parts[-1].append(unit)
        room -= unit.nbytes
    return parts


def _settings(model: WideModel, record: Mapping[str, Any], carried: Sequence[str], shard_bytes: int) -> dict[str, Any]:
    """What the files' bytes depend on."""
    identities = [model.source.identity(model.source.weights[name]) for name in (*model.slots, *carried)]
    return {
        "checkpoint": str(model.source.folder),
        "weights": hashlib.sha256(repr(identities).encode()).hexdigest()[:16],
        "cut": hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16],
        "shard_bytes": shard_bytes,
        "version": __version__,
    }
