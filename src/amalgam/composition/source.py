"""A source: a checkpoint with a name, its tensors grouped into logical weights.

In: a folder or a `.gguf` file, and which of its tensors are fused. Out: `Source.weights`, logical name →
`StoredWeight`, each recognised by exactly one format and in agreement with what the checkpoint declares.
Must never know: layers, families, plans.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amalgam.base.collector import collector_paused
from amalgam.checkpoint.shards import Identity
from amalgam.checkpoint.source import is_present, read_json, resolve
from amalgam.checkpoint.store import TensorEntry, TensorStore
from amalgam.errors import CheckpointError, UnsupportedError
from amalgam.formats.contract import WEIGHT_SUFFIX, ModuleContext, Read, StoredWeight, WeightFormat, cut, owned
from amalgam.formats.declared.config import read_declaration
from amalgam.formats.declared.values import Declaration
from amalgam.formats.fused import FusedTensor, TensorPart, TensorSlice, logical_module, split_fused, whole_of
from amalgam.formats.gguf import config as gguf_config
from amalgam.formats.gguf import names as gguf_names
from amalgam.formats.registry import all_formats
from amalgam.kernels.packed import PackedWeight

CONFIG_NAME = "config.json"
# config.json → how the checkpoint's fused tensors hold logical weights.
Finish = Callable[[PackedWeight], PackedWeight]
FusedTable = Callable[[Mapping[str, Any]], Sequence[FusedTensor]]
# Suffixes that name a tensor of their own rather than a part of `<module>.weight`.
_WHOLE = frozenset({WEIGHT_SUFFIX, "bias"})
# Scales of a quantized KV cache and of attention: no weights, and ours is not quantized.
_CACHE_SUFFIXES = frozenset(
    {"k_scale", "v_scale", "q_scale", "kv_scale", "prob_output_scale", "k_zero_point", "v_zero_point", "output_scale"}
)


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
        folder = resolve(path_or_hub_id)
        store = TensorStore.open(folder)
        config, place = _read_config(store)
        if store.metadata:
            return cls(name, folder, store, config, place, dict(_recognise_gguf(store)))
        declaration = read_declaration(folder, config)
        weights = {
            name: recognise(name, parts, declaration, reader(store))
            for name, parts in group_parts(store, fused(config), declaration).items()
        }
        return cls(name, folder, store, config, place, weights)

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
        """A weight that may share the file's pages, which are given back at the end."""
        plain = reader(self.store)

        def read(part: TensorPart) -> Tensor:
            return plain(part) if stored.arrange is None else stored.arrange(plain(part))

        try:
            packed = stored.format.load(stored, read)
            assert packed.layout.removesuffix("_columns") in stored.format.layouts, (stored.format.name, packed.layout)
            yield packed
        finally:
            for part in stored.parts.values():
                self.store.release(whole_of(part))

    def read(self, part: TensorPart) -> Tensor:
        """A part's data as the file has it; shares the file's pages."""
        return reader(self.store)(part)

    def release(self, part: TensorPart) -> None:
        """Give back the memory of a part's pages."""
        self.store.release(whole_of(part))

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


def reader(store: TensorStore) -> Read:
    """Reads tensors and slices of tensors from a store."""

    def read(part: TensorPart) -> Tensor:
        if isinstance(part, TensorSlice):
            return part.of(store.read(part.whole))
        return store.read(part)

    return read


def _read_config(store: TensorStore) -> tuple[dict[str, Any], str]:
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


def _recognise_gguf(store: TensorStore) -> Iterator[tuple[str, StoredWeight]]:
    """Every tensor is a whole weight, or a part of one that holds many; its type is in its header."""
    for name, piece in gguf_names.translate(store):
        stored = recognise(name, piece.parts, Declaration(), reader(store))
        yield name, replace(stored, arrange=piece.arrange)


def group_parts(
    tensors: Mapping[str, TensorEntry], fused: Sequence[FusedTensor], declaration: Declaration
) -> dict[str, dict[str, TensorPart]]:
    """Logical name → role → tensor or slice.

    Raises:
        CheckpointError: a fused tensor has an impossible shape, or a weight is stored twice, under two names or fused
            and alone.
    """
    block = declaration.default.block
    pieces, others = split_fused(tensors, fused, block[0] if block else None)
    groups: dict[str, dict[str, TensorPart]] = {}

    def add(name: str, role: str, part: TensorPart) -> None:
        parts = groups.setdefault(name, {})
        if role in parts:
            raise CheckpointError(
                f"Weight {name!r} is stored twice: as {parts[role].name!r} and as {part.name!r}.",
                remedy="Remove one of them.",
            )
        parts[role] = part

    renamed = [entry for entry in fused if entry.is_renamed]
    for name, roles in group_names(others).items():
        if renamed:
            module, _, last = name.rpartition(".")
            name = f"{logical_module(module, renamed)}.{last}" if module else name
        for role, tensor in roles.items():
            add(name, role, tensors[tensor])
    for piece in pieces:
        add(piece.weight, piece.role, piece.part)
    return groups


def group_names(tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """Logical name → role → tensor, told by names: a module's weight and what belongs to it, all else alone.

    `x.weight_packed` and `x.weight_scale` are parts of `x.weight`; scales of a KV cache are left out.
    """
    names = list(tensors)
    known = set(names)
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        module, role = _split(name, known)
        if role in _CACHE_SUFFIXES and module:
            continue
        if role == WEIGHT_SUFFIX:
            groups.setdefault(module, {})[WEIGHT_SUFFIX] = name
        else:
            groups.setdefault(f"{module}.{WEIGHT_SUFFIX}", {})[role] = name
    return groups


def _split(name: str, known: set[str]) -> tuple[str, str]:
    """(module, companion suffix), or (name, "weight") for a tensor of its own."""
    companions, generic = _companions()
    start = len(name)
    for _ in range(3):  # `weight.quant_state.bitsandbytes__nf4` is the longest suffix
        start = name.rfind(".", 0, start)
        if start <= 0:
            break
        module, suffix = name[:start], name[start + 1 :]
        if suffix in companions or suffix in _CACHE_SUFFIXES:
            return module, suffix
        if suffix in generic and f"{module}.{generic[suffix]}" in known:
            return module, suffix
    return name, WEIGHT_SUFFIX


@cache
def _companions() -> tuple[frozenset[str], Mapping[str, str]]:
    """Suffixes that always belong to a weight, and those that do beside an anchor."""
    formats = all_formats()
    always = {s for f in formats if f.anchor is None for s in f.required | f.optional} - _WHOLE
    generic = {s: f.anchor for f in formats if f.anchor is not None for s in (f.required | f.optional) - _WHOLE}
    return frozenset(always), generic


def recognise(name: str, parts: Mapping[str, TensorPart], declaration: Declaration, read: Read) -> StoredWeight:
    """The weight that `parts` hold, in agreement with its declaration.

    Raises:
        CheckpointError: no format recognises it, or the declaration says something else.
    """
    declared = declaration.of(_declared_module(name, parts))
    context = ModuleContext(declared, read)
    for weight_format in fitting(frozenset(parts)):
        stored = weight_format.recognise(name, parts, context)
        if stored is not None:
            if declared.method is not None:
                stored = replace(stored, declared=declared)
                _check_declared(stored)
            return stored
    found = ", ".join(f"{e.name} {str(e.dtype).removeprefix('torch.')} {list(e.shape)}" for e in parts.values())
    raise CheckpointError(
        f"Weight {name!r} in {store_name(parts)} has tensors that no format recognises: {found}.",
        remedy=f"Known formats: {', '.join(sorted({f.name for f in all_formats()}))}.",
    )


def _declared_module(name: str, parts: Mapping[str, TensorPart]) -> str:
    """What the checkpoint calls a weight's module, where it stores and where it declares it; perhaps not as we do."""
    role, part = next(iter(parts.items()))
    if isinstance(part, TensorSlice):
        return name.removesuffix(f".{WEIGHT_SUFFIX}")
    return part.name.removesuffix(f".{role}")


@lru_cache(maxsize=1024)  # a checkpoint has few sets of suffixes, but a hostile one may have any number
def fitting(roles: frozenset[str]) -> tuple[WeightFormat, ...]:
    """The formats whose suffixes these are."""
    return tuple(f for f in all_formats() if f.required <= roles <= f.required | f.optional)


def _check_declared(stored: StoredWeight) -> None:
    """Raise CheckpointError if the tensors are not what the checkpoint declares."""
    declared, weight_format = stored.declared, stored.format
    if stored.is_wide:
        if declared.is_quantized and len(stored.shape) == 2 and stored.name.endswith(f".{WEIGHT_SUFFIX}"):
            _contradict(stored, "quantized", f"plain {weight_format.name}")
        return
    if declared.is_quantized is False:
        _contradict(stored, "not quantized", weight_format.name)
    if weight_format.methods and declared.method not in weight_format.methods:
        _contradict(stored, f"quant_method {declared.method}", f"{weight_format.name} of another tool")
    if None not in (declared.bits, stored.bits) and declared.bits != stored.bits:
        _contradict(stored, f"{declared.bits} bits", f"{stored.bits} bits")
    if None not in (declared.number, weight_format.number) and declared.number != weight_format.number:
        _contradict(stored, f"type {declared.number}", weight_format.name)
    expected = declared.block_of(stored.shape) if len(stored.shape) == 2 else None
    if (
        expected is not None
        and stored.block is not None
        and _effective(expected, stored) != _effective(stored.block, stored)
    ):
        _contradict(stored, f"a scale per {_words(expected)}", f"one per {_words(stored.block)}")


def _effective(block: tuple[int, int], stored: StoredWeight) -> tuple[int, int]:
    return min(block[0], stored.shape[0]), min(block[1], stored.shape[1])


def _words(block: tuple[int, int]) -> str:
    return f"{block[0]} × {block[1]} weights"


def _contradict(stored: StoredWeight, says: str, holds: str) -> None:
    raise CheckpointError(
        f"{stored.declared.where} declares {stored.name!r} as {says}, but {store_name(stored.parts)} holds {holds}.",
        remedy="Do the config and the weights belong to the same checkpoint?",
    )


def store_name(parts: Mapping[str, TensorPart]) -> str:
    """The files that a weight's tensors stand in, for messages."""
    return ", ".join(sorted({str(part.file) for part in parts.values()}))
