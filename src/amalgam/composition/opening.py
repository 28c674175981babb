"""A checkpoint's configuration and its weights, as its files declare them.

In: an opened store. Out: config.json or what stands for it, logical name → `StoredWeight`, how parts are read. Must
never know: sources, layers, families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from amalgam.base.folders import is_present, read_json
from amalgam.checkpoint.store import TensorStore
from amalgam.composition.recognition import group_parts, recognise
from amalgam.errors import UnsupportedError
from amalgam.formats.contract import Read, StoredWeight
from amalgam.formats.declared.config import read_declaration
from amalgam.formats.declared.values import Declaration
from amalgam.formats.fused import FusedTensor, TensorPart, TensorSlice
from amalgam.formats.gguf import config as gguf_config
from amalgam.formats.gguf import pieces as gguf_pieces

CONFIG_NAME = "config.json"
# config.json → how the checkpoint's fused tensors hold logical weights.
FusedTable = Callable[[Mapping[str, Any]], Sequence[FusedTensor]]


def read_config(store: TensorStore) -> tuple[dict[str, Any], str]:
    """The configuration and where it stands, or an empty one and why there is none."""
    folder = store.folder
    if is_present(folder / CONFIG_NAME):
        return read_json(folder, CONFIG_NAME), str(folder / CONFIG_NAME)
    if not store.metadata:
        return {}, f"{folder} has no {CONFIG_NAME}."
    try:
        return gguf_config.read_config(store), f"{store.files[0]} (metadata)"
    except UnsupportedError as error:
        return {}, str(error)


def stored_weights(store: TensorStore, config: Mapping[str, Any], fused: FusedTable) -> dict[str, StoredWeight]:
    """Every logical weight, in exactly one format.

    Args:
        config: of the checkpoint.
        fused: config → the checkpoint's fused tensors.

    Raises:
        CheckpointError: tensors that no format recognises, or that contradict what the checkpoint declares.
        UnsupportedError: it declares a quantization that is not served.
    """
    if store.metadata:
        return dict(_of_gguf(store))
    declaration = read_declaration(store.folder, config)
    return {
        name: recognise(name, parts, declaration, reader(store))
        for name, parts in group_parts(store, fused(config), declaration).items()
    }


def reader(store: TensorStore) -> Read:
    """Reads tensors and slices of tensors from a store."""

    def read(part: TensorPart) -> Tensor:
        if isinstance(part, TensorSlice):
            return part.of(store.read(part.whole))
        return store.read(part)

    return read


def _of_gguf(store: TensorStore) -> Iterator[tuple[str, StoredWeight]]:
    """Every tensor is a whole weight, or a part of one that holds many; its type is in its header."""
    for name, piece in gguf_pieces.translate(store):
        stored = recognise(name, piece.parts, Declaration(), reader(store))
        yield name, replace(stored, arrange=piece.arrange)
