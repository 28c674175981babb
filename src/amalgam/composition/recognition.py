"""Tensors → logical weights: which belong together by their names, and which format each of them is in.

In: tensors' headers, fused tensors, what the checkpoint declares. Out: `StoredWeight`s. Must never know: layers,
families, rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache

from amalgam.checkpoint.store import TensorEntry
from amalgam.errors import CheckpointError
from amalgam.formats.contract import WEIGHT_SUFFIX, ModuleContext, Read, StoredWeight, WeightFormat
from amalgam.formats.declared.values import Declaration
from amalgam.formats.fused import FusedTensor, TensorPart, TensorSlice, logical_module, split_fused
from amalgam.formats.registry import all_formats

# Suffixes that name a tensor of their own rather than a part of `<module>.weight`.
_WHOLE = frozenset({WEIGHT_SUFFIX, "bias"})
# Scales of a quantized KV cache and of attention: no weights, and ours is not quantized.
_CACHE_SUFFIXES = frozenset(
    {"k_scale", "v_scale", "q_scale", "kv_scale", "prob_output_scale", "k_zero_point", "v_zero_point", "output_scale"}
)


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
    companions, generic = companion_suffixes()
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
def companion_suffixes() -> tuple[frozenset[str], Mapping[str, str]]:
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
