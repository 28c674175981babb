"""A source: a checkpoint with a name, its tensors grouped into logical weights.

In: a folder or a `.gguf` file. Out: `Source.weights`, logical name → `StoredWeight`, each recognised by exactly one
format.
Must never know: layers, families, plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from amalgam.checkpoint.source import read_json, resolve
from amalgam.checkpoint.store import TensorEntry, TensorStore
from amalgam.errors import CheckpointError, UnsupportedError
from amalgam.kernels.packed import PackedWeight
from amalgam.precision import gguf_config, gguf_names
from amalgam.precision.format import WEIGHT_SUFFIX, StoredWeight, WeightFormat, all_formats

CONFIG_NAME = "config.json"
# Suffixes that name a tensor of their own rather than a part of `<module>.weight`.
_WHOLE = frozenset({WEIGHT_SUFFIX, "bias"})


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
    def open(cls, name: str, path_or_hub_id: str) -> Source:
        """Open a checkpoint; reads headers only.

        Raises:
            CheckpointError: no such folder, damaged files, or tensors that no format recognises, by name.
        """
        folder = resolve(path_or_hub_id)
        store = TensorStore.open(folder)
        config, place = _read_config(store)
        quantization = config.get("quantization_config") or {}
        if not isinstance(quantization, Mapping):
            raise CheckpointError(f"quantization_config in {place} is not an object.")
        recognise = _recognise_gguf if store.metadata else _recognise_all
        return cls(name, folder, store, config, place, dict(recognise(store, quantization)))

    def load(self, stored: StoredWeight) -> PackedWeight:
        """Read and pack one weight, and give the file's pages back.

        Raises:
            CheckpointError: its file has changed since it was opened, or its data contradict its header.
        """

        def read(entry: TensorEntry) -> Tensor:
            tensor = self.store.read(entry)
            return tensor if stored.arrange is None else stored.arrange(tensor)

        try:
            return stored.format.load(stored, read)
        finally:
            for entry in stored.parts.values():
                self.store.release(entry)

    def identity(self, stored: StoredWeight) -> tuple[Any, ...]:
        """Equal for two weights exactly if they come from the same unchanged bytes."""
        parts = ((entry.offset, entry.nbytes, self.store.identity(entry)) for entry in stored.parts.values())
        return (stored.name, stored.format.name, *parts)


def _read_config(store: TensorStore) -> tuple[dict[str, Any], str]:
    """The configuration and where it stands, or an empty one and why there is none."""
    folder = store.folder
    if (folder / CONFIG_NAME).is_file():
        return read_json(folder, CONFIG_NAME), str(folder / CONFIG_NAME)
    if not store.metadata:
        return {}, f"{folder} has no {CONFIG_NAME}."
    try:
        return gguf_config.read_config(store), f"{store.files[0]} (metadata)"
    except UnsupportedError as error:
        return {}, str(error)


def _recognise_gguf(store: TensorStore, quantization: Mapping[str, Any]) -> Iterator[tuple[str, StoredWeight]]:
    """Every tensor is a whole weight, or a part of one that holds many; its type is in its header."""
    formats = all_formats()
    for name, piece in gguf_names.translate(store):
        stored = _recognise(name, piece.parts, {}, formats)
        yield name, replace(stored, arrange=piece.arrange)


def _recognise_all(store: TensorStore, quantization: Mapping[str, Any]) -> Iterator[tuple[str, StoredWeight]]:
    formats = all_formats()
    for name, parts in _group(store, formats).items():
        stored = _recognise(name, parts, quantization, formats)
        yield name, stored


def _group(store: TensorStore, formats: tuple[WeightFormat, ...]) -> dict[str, dict[str, TensorEntry]]:
    """Logical name → suffix → tensor. A module's weight and what belongs to it stand together, all else alone."""
    companions = {suffix for f in formats for suffix in f.required | f.optional} - _WHOLE
    groups: dict[str, dict[str, TensorEntry]] = {}
    for tensor_name, entry in store.items():
        module, _, suffix = tensor_name.rpartition(".")
        if module and suffix in companions:
            groups.setdefault(f"{module}.{WEIGHT_SUFFIX}", {})[suffix] = entry
        else:
            groups.setdefault(tensor_name, {})[WEIGHT_SUFFIX] = entry
    return groups


def _recognise(
    name: str,
    parts: Mapping[str, TensorEntry],
    quantization: Mapping[str, Any],
    formats: tuple[WeightFormat, ...],
) -> StoredWeight:
    suffixes = parts.keys()
    for weight_format in formats:
        if weight_format.required <= suffixes <= weight_format.required | weight_format.optional:
            stored = weight_format.recognise(name, parts, quantization)
            if stored is not None:
                return stored
    found = ", ".join(f"{suffix} {str(e.dtype).removeprefix('torch.')} {list(e.shape)}" for suffix, e in parts.items())
    raise CheckpointError(
        f"Weight {name!r} in {store_name(parts)} has tensors that no format recognises: {found}.",
        remedy=f"Known formats: {', '.join(sorted({f.name for f in formats}))}.",
    )


def store_name(parts: Mapping[str, TensorEntry]) -> str:
    """The files that a weight's tensors stand in, for messages."""
    return ", ".join(sorted({str(entry.file) for entry in parts.values()}))
