"""GGUF's tensors → the weights of the published checkpoint, with what llama.cpp's converter did undone.

In: an opened GGUF checkpoint. Out: logical name → the tensor, or the part of one, that holds it. Names that are not in
the architecture's table (`names.py`) are refused. Must never know: layers, families, what is done with a weight.

The converter stacks the experts of a layer (expert e is one run of bytes), and for llama and its relatives reorders the
rows of query and key from two halves per head into pairs (`LlamaModel.permute`). Both concern whole rows, so they are
undone on the bytes of any type. To the norms of Gemma it adds the 1 that their class adds; these are always float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NoReturn

import torch

from amalgam.checkpoint.store import TensorEntry, TensorStore
from amalgam.errors import CheckpointError, UnsupportedError, describe
from amalgam.formats.contract import WEIGHT_SUFFIX
from amalgam.formats.fused import check_num_pieces
from amalgam.formats.gguf.latent import KEY_PART, VALUE_PART
from amalgam.formats.gguf.names import NAMINGS, STATICS, Naming
from amalgam.formats.gguf.undoing import SHAPES, Arrange

ARCHITECTURE_KEY = "general.architecture"

_NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.)")
_LATENT = re.compile(r"blk\.(\d{1,6})\.attn_([kv])_b\.weight")
# Not weights: the configuration is made from them (`formats.gguf.config`).
_ROPE_TABLES = re.compile(r"(blk\.\d+\.)?rope_(freqs|factors_long|factors_short)\.weight")


@dataclass(frozen=True)
class Piece:
    """A logical weight in a GGUF file: its tensors by role, and how their rows come into the published order."""

    parts: Mapping[str, TensorEntry]
    arrange: Arrange | None = None


def _piece(entry: TensorEntry, arrange: Arrange | None = None) -> Piece:
    return Piece({WEIGHT_SUFFIX: entry}, arrange)


def is_rope_table(name: str) -> bool:
    """Whether a tensor holds no weight, but numbers that the configuration is made from."""
    return _ROPE_TABLES.fullmatch(name) is not None


def translate(store: TensorStore) -> Iterator[tuple[str, Piece]]:
    """Every logical weight of a GGUF checkpoint.

    Raises:
        UnsupportedError: an architecture without a table.
        CheckpointError: a tensor without a known meaning, or whose shape contradicts the metadata.
    """
    architecture = store.metadata[ARCHITECTURE_KEY]
    naming = NAMINGS.get(architecture)
    if naming is None:
        raise UnsupportedError(
            f"{store.files[0]} is of architecture {describe(architecture)}, whose tensor names are not known.",
            remedy=f"Known: {', '.join(sorted(NAMINGS))}.",
        )
    whole = naming.names.get("blk.{}.attn_kv_b")
    draft_layers, num_pieces = _draft_layers(store), 0
    for name, entry in store.items():
        layer = re.match(r"blk\.(\d{1,6})\.", name)
        if is_rope_table(name) or (layer is not None and int(layer[1]) in draft_layers):
            continue
        latent = _LATENT.fullmatch(name)
        if latent is not None and isinstance(whole, str):
            both = _latent(store, latent[1])
            if latent[2] == "k":
                yield f"{whole.format(latent[1])}.weight", both
            continue
        for piece in _pieces(store, naming, name, entry):
            num_pieces += 1
            check_num_pieces(num_pieces, entry)
            yield piece


def _latent(store: TensorStore, layer: str) -> Piece:
    """Keys and values of latent attention, which were one weight."""
    key, value = f"blk.{layer}.attn_k_b.weight", f"blk.{layer}.attn_v_b.weight"
    for name in (key, value):
        if name not in store:
            _refuse(f"{store.files[0]} has one of {key!r} and {value!r}, but not the other", "Download it again.")
    return Piece({KEY_PART: store[key], VALUE_PART: store[value]})


def _draft_layers(store: TensorStore) -> range:
    """Layers behind the decoder's last one, which predict further tokens and have no place in it."""
    prefix = store.metadata[ARCHITECTURE_KEY]
    num_blocks = store.metadata.get(f"{prefix}.block_count")
    num_drafts = store.metadata.get(f"{prefix}.nextn_predict_layers", 0)
    if type(num_blocks) is not int or type(num_drafts) is not int or not 0 <= num_drafts < num_blocks:
        return range(0)
    return range(num_blocks - num_drafts, num_blocks)


def _pieces(store: TensorStore, naming: Naming, name: str, entry: TensorEntry) -> Iterator[tuple[str, Piece]]:
    numbers = _NUMBER.findall(name)
    pattern = _NUMBER.sub("{}", name)
    stem, _, suffix = pattern.rpartition(".")
    found = naming.names.get(pattern)
    if found is None and suffix in ("weight", "bias"):
        targets = naming.names.get(stem)
        if targets is not None:
            targets = (targets,) if isinstance(targets, str) else targets
            found = tuple(f"{target}.{suffix}" for target in targets)
    if found is None:
        _refuse(
            f"Tensor {describe(name)} in {entry.file} has no known meaning in architecture "
            f"{store.metadata[ARCHITECTURE_KEY]!r}",
            "Is the file made for another program?",
        )
    targets = (found,) if isinstance(found, str) else found
    for index, target in enumerate(targets):
        if target.count("{}") > len(numbers):
            yield from _experts(target, numbers, entry, index, len(targets))
        else:
            yield target.format(*numbers), _whole(store, naming, stem, suffix, entry)


def _experts(
    target: str, numbers: list[str], entry: TensorEntry, index: int, num_targets: int
) -> Iterator[tuple[str, Piece]]:
    """Part `index` of `num_targets` of every expert's rows."""
    if len(entry.shape) < 2 or entry.shape[1] % num_targets:
        _refuse(
            f"Tensor {describe(entry.name)} in {entry.file} has shape {list(entry.shape)}",
            f"A stack of experts is [experts, {num_targets} × outputs, …].",
        )
    shape = (entry.shape[1] // num_targets, *entry.shape[2:])
    for expert in range(entry.shape[0]):
        start = (expert * num_targets + index) * prod(shape)
        yield target.format(*numbers, expert), _piece(entry.part(start, shape))


def _whole(store: TensorStore, naming: Naming, stem: str, suffix: str, entry: TensorEntry) -> Piece:
    local = stem if suffix in ("weight", "bias") else f"{stem}.{suffix}"
    undo = naming.values.get(local.removeprefix("blk.{}."))
    if undo is not None and suffix != "bias":
        if entry.encoding is not None or entry.dtype != torch.float32:
            _refuse(
                f"Tensor {describe(entry.name)} in {entry.file} is not float32", "The converter writes no other type."
            )
        shape = SHAPES.get(undo, tuple)(entry.shape)
        return _piece(replace(entry, shape=shape), undo)
    if naming.has_pairs and stem in ("blk.{}.attn_q", "blk.{}.attn_k"):
        return _piece(entry, _from_pairs(entry, _num_heads(store, stem, entry)))
    is_row = stem == "blk.{}.ffn_gate_inp_shexp" or str(naming.names.get(f"{stem}.{suffix}")).endswith(STATICS)
    if is_row and len(entry.shape) == 1:
        return _piece(replace(entry, shape=(1, *entry.shape)))
    if naming.has_raised_norms and stem.endswith("_norm"):
        if entry.dtype is not torch.float32 or entry.encoding is not None:
            _refuse(f"Norm {describe(entry.name)} in {entry.file} is not float32", "Convert the model again.")
        return _piece(entry, lambda stored: stored - 1.0)
    is_projection = stem.startswith("blk.") and suffix == "weight" and len(entry.shape) == 2
    if naming.has_transposed and is_projection and entry.encoding is None:
        rows, columns = entry.shape
        return _piece(replace(entry, shape=(columns, rows)), lambda stored: stored.view(rows, columns).t())
    return _piece(entry)


def _num_heads(store: TensorStore, stem: str, entry: TensorEntry) -> int:
    prefix = store.metadata[ARCHITECTURE_KEY]
    heads = store.metadata.get(f"{prefix}.attention.head_count")
    if stem.endswith("attn_k"):
        heads = store.metadata.get(f"{prefix}.attention.head_count_kv", heads)
    if not isinstance(heads, int):  # one number for each layer
        layer = int(entry.name.split(".")[1])
        heads = heads[layer] if heads is not None and not isinstance(heads, str) and layer < len(heads) else None
    if type(heads) is not int or heads < 1 or entry.shape[0] % (2 * heads):
        _refuse(
            f"Tensor {describe(entry.name)} in {entry.file} has {entry.shape[0]} rows and the metadata {heads!r} heads",
            "The rows of every head are even in number.",
        )
    return heads


def _from_pairs(entry: TensorEntry, num_heads: int) -> Arrange:
    """Rows of each head from pairs, (0, half), (1, half + 1) …, to two halves."""
    shape = entry.shape
    split = (num_heads, shape[0] // num_heads // 2, 2, *shape[1:])
    return lambda stored: stored.view(split).transpose(1, 2).reshape(shape)


def _refuse(what: str, remedy: str) -> NoReturn:
    raise CheckpointError(f"{what}.", remedy=remedy)
