"""What a GGUF file will be read as, before a byte of its data is written.

In: metadata, tables, the shapes of tensors. Out: nothing, or the error. Must never know: how metadata are made.

A file with holes in place of the weights is read by the reader of GGUF files. What it describes has to compute what the
model does: so no key is forgotten, and what GGUF has no word for is refused by name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from amalgam.checkpoint.gguf_writer import GgufWriter
from amalgam.checkpoint.store import TensorStore
from amalgam.composition.check import difference
from amalgam.errors import AmalgamError, UnsupportedError
from amalgam.formats.gguf.config import read_config
from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.delta_net import DeltaNet
from amalgam.models.registry import read_spec
from amalgam.models.spec import ModelSpec
from amalgam.tools.export.llama_cpp.tensors import Stack


def check_described(
    spec: ModelSpec, metadata: Mapping[str, Any], tables: Mapping[str, Tensor], stacks: Sequence[Stack]
) -> None:
    """
    Raises:
        UnsupportedError: the file would describe another model.
    """
    architecture = metadata["general.architecture"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = _read(Path(folder) / "model.gguf", metadata, tables, stacks)
        found = replace(found, has_tied_head=spec.has_tied_head)  # of a tied head a file has no tensor
        differing = difference(_rounded(found), _rounded(_laid_out(spec, architecture)))
    except AmalgamError as error:
        differing = error.what
    if differing is not None:
        raise UnsupportedError(
            f"A GGUF file of architecture {architecture!r} cannot say all that this model is: {differing}",
            remedy="Export to another target: `--to hf`.",
        )


def _read(file: Path, metadata: Mapping[str, Any], tables: Mapping[str, Tensor], stacks: Sequence[Stack]) -> ModelSpec:
    ranks = {name: table.dim() for name, table in tables.items()} | {stack.name: len(stack.shape) for stack in stacks}
    writer = GgufWriter(file, metadata, ranks)
    try:
        for name, table in tables.items():
            writer.add(name, tuple(table.shape), "F32", [table])
        for stack in stacks:
            writer.skip(stack.name, stack.shape, stack.kind)
        writer.finish(metadata)
    finally:
        writer.close()
    store = TensorStore.open(file)
    try:
        return read_spec(read_config(store), str(file))[1]
    finally:
        store.close()


def _laid_out(spec: ModelSpec, architecture: str) -> ModelSpec:
    """The model as GGUF orders the weights of delta nets."""
    is_tiled = architecture in ("qwen35", "qwen35moe")

    def laid_out(attention: Any) -> Any:
        if not isinstance(attention, DeltaNet):
            return attention
        differs = attention.num_value_heads != attention.num_key_heads
        return replace(attention, has_grouped_values=False, is_tiled=is_tiled and differs)

    return replace(spec, layers=tuple(replace(layer, attention=laid_out(layer.attention)) for layer in spec.layers))


def _rounded(value: Any) -> Any:
    """A spec with float32 numbers, as metadata have them, and without those that nothing is computed with."""
    if isinstance(value, float):
        return float(np.float32(value))
    if isinstance(value, tuple):
        return tuple(map(_rounded, value)) if type(value) is tuple else value
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed = {field.name: _rounded(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, Attention) and not value.has_unit_norm:
        has_norms = any(slot.name.endswith("_norm") for slot in value.slots(1))
        changed |= {} if has_norms else {"norm_eps": 0.0}
    return replace(value, **changed)
