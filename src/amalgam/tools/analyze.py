"""What a checkpoint holds, told by its index or its files' headers; no weight is read.

In: a folder or hub id. Out: an `Analysis`: layers, experts, parameters and bytes by role and by format. A model without
a family and weights that no format recognises are told by their names.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

from amalgam.base.collector import collector_paused
from amalgam.base.counting import counted
from amalgam.base.folders import is_present, read_json
from amalgam.checkpoint import TensorStore, resolve
from amalgam.checkpoint.store import MAX_INDEX_BYTES
from amalgam.composition.carry import left_out_tensors
from amalgam.composition.check import is_surplus_bias
from amalgam.composition.opening import CONFIG_NAME, reader
from amalgam.composition.recognition import fitting, group_names, group_parts, recognise
from amalgam.composition.source import Source
from amalgam.errors import AmalgamError, CheckpointError, UnsupportedError, describe
from amalgam.formats.contract import WEIGHT_SUFFIX
from amalgam.formats.declared.config import read_declaration
from amalgam.formats.declared.values import Declaration, Declared
from amalgam.models.registry import fused_tensors, read_spec
from amalgam.models.spec import DRAFT_LAYERS, Family, ModelSpec, Slot
from amalgam.tools.roles import ROLES, role_by_name

UNRECOGNISED = "unrecognised"
UNQUANTIZED = "unquantized"  # as the names say, where no config.json says which type

_INDEXES = {"model.safetensors.index.json": ".safetensors", "pytorch_model.bin.index.json": ".bin"}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

_LAYER = re.compile(r"(.*?)\.(\d{1,9})\.")
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")


@dataclass(frozen=True, slots=True)
class Weight:
    """One logical weight.

    Attributes:
        format: name of its format, of those it may be in (`fp8 or int8`), or `UNRECOGNISED`, `UNQUANTIZED`.
        shape: logical shape; None where neither a header nor the family tells it.
        nbytes: None without headers.
    """

    role: str
    format: str
    shape: tuple[int, ...] | None
    nbytes: int | None


@dataclass
class Tally:
    """Sums over weights; None as soon as one of them is unknown."""

    num_weights: int = 0
    parameters: int | None = 0
    nbytes: int | None = 0

    def add(self, weight: Weight) -> None:
        self.num_weights += 1
        self.parameters = _plus(self.parameters, None if weight.shape is None else math.prod(weight.shape))
        self.nbytes = _plus(self.nbytes, weight.nbytes)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of a checkpoint.

    Attributes:
        model: path or hub id, as it was given.
        family, spec: None where no family serves the config.json, or there is none; `notes` says why.
        slots: logical name → slot, of the spec.
        has_headers: whether the files were there, or only their index.
        declared_bytes: the index's `metadata.total_size`.
        weights: logical name → weight.
        notes: sentences on what is missing, unknown or unusual.
    """

    model: str
    folder: Path
    config: Mapping[str, Any]
    family: Family | None
    spec: ModelSpec | None
    slots: Mapping[str, Slot]
    has_headers: bool
    num_shards: int
    num_missing_shards: int
    declared_bytes: int | None
    weights: Mapping[str, Weight]
    notes: tuple[str, ...]

    @property
    def architecture(self) -> str | None:
        """The model's class in config.json."""
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None

    @cached_property
    def total(self) -> Tally:
        """The whole model; bytes are the index's own claim where there are no headers."""
        total = _tally(self.weights.values(), lambda weight: "").get("", Tally())
        return total if self.has_headers else Tally(total.num_weights, total.parameters, self.declared_bytes)

    @cached_property
    def roles(self) -> dict[str, Tally]:
        """Role → sums, in the order of `ROLES`."""
        found = _tally(self.weights.values(), lambda weight: weight.role)
        return {role: found[role] for role in sorted(found, key=ROLES.index)}

    @cached_property
    def formats(self) -> dict[str, Tally]:
        """Format → sums, the most weights first."""
        found = _tally(self.weights.values(), lambda weight: weight.format)
        return dict(sorted(found.items(), key=lambda item: (-item[1].num_weights, item[0])))

    def formats_of(self, role: str) -> Counter[str]:
        """Format → number of weights of a role."""
        return Counter(weight.format for weight in self.weights.values() if weight.role == role)

    @cached_property
    def num_layers(self) -> int:
        """Layers of the longest stack that the names show."""
        stacks: defaultdict[str, set[str]] = defaultdict(set)
        for stack, layer, _, _ in self._in_layers():
            stacks[stack].add(layer)
        return max(map(len, stacks.values()), default=0)

    @cached_property
    def experts_per_layer(self) -> Counter[int]:
        """Experts in a layer → number of such layers; layers without experts do not count."""
        experts: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        fused: dict[tuple[str, str], int] = {}
        for stack, layer, name, weight in self._in_layers():
            if weight.role == "expert":
                number = _EXPERT.search(name)
                if number is not None:
                    experts[stack, layer].add(number[1])
                elif weight.shape is not None and len(weight.shape) == 3:  # all experts of a layer in one tensor
                    fused[stack, layer] = weight.shape[0]
        return Counter({**fused, **{layer: len(ids) for layer, ids in experts.items()}}.values())

    @cached_property
    def num_shared_expert_layers(self) -> int:
        return len({(stack, layer) for stack, layer, _, w in self._in_layers() if w.role == "shared_expert"})

    def _in_layers(self) -> Iterator[tuple[str, str, str, Weight]]:
        for name, weight in self.weights.items():
            match = _LAYER.match(name) if weight.role != "other" else None
            if match is not None:
                yield match[1], match[2], name, weight

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; null where it is not known."""
        spec = self.spec
        return {
            "model": self.model,
            "folder": str(self.folder),
            "architecture": self.architecture,
            "family": self.family and self.family.name,
            "known_from": "headers" if self.has_headers else "index",
            "num_shards": self.num_shards,
            "num_missing_shards": self.num_missing_shards,
            "num_layers": self.num_layers,
            "num_moe_layers": self.experts_per_layer.total(),
            "num_experts_per_layer": sorted(self.experts_per_layer),
            "num_active_experts": spec and spec.num_active_experts,
            "num_shared_expert_layers": self.num_shared_expert_layers,
            "num_weights": self.total.num_weights,
            "parameters": self.total.parameters,
            "active_parameters": spec and spec.num_active_parameters,
            "bytes": self.total.nbytes,
            "roles": {name: _tally_dict(t) | {"formats": self.formats_of(name)} for name, t in self.roles.items()},
            "formats": {name: _tally_dict(tally) for name, tally in self.formats.items()},
            "notes": list(self.notes),
        }


@collector_paused()
def analyze_checkpoint(path_or_hub_id: str) -> Analysis:
    """Analyze a checkpoint by its headers, or by its index alone where files are missing.

    Of a hub repository only the JSON files are downloaded, unless it has no index.

    Raises:
        CheckpointError: no such folder, no weights, or a damaged index, config or header.
    """
    folder = _locate(path_or_hub_id)
    source = Source.open(path_or_hub_id, str(folder)) if _is_gguf(folder) else None
    if source is not None:
        config, place = source.config, source.config_place
    else:
        place = str(folder / CONFIG_NAME)
        config = read_json(folder, CONFIG_NAME) if is_present(folder / CONFIG_NAME) else {}
    family, spec, notes = _read_family(config, place)
    slots = {family.logical_name(slot): slot for slot in spec.slots} if family and spec else {}
    index = _read_index(folder) if source is None else None
    missing = index.missing_shards if index else []
    if source is not None:
        found = {
            name: Weight(role_by_name(name), stored.format.name, stored.shape, stored.nbytes)
            for name, stored in source.weights.items()
        }
        num_shards = len(source.store.files)
    else:
        declaration = _read_declaration(folder, config, notes)
        if index is not None and missing:
            found, num_shards = _by_names(index.weight_map, config, declaration), len(set(index.weight_map.values()))
            notes.append(
                f"{len(missing)} of {num_shards} shards are missing, for instance {missing[0]}: "
                f"told by the names in {index.name}, bytes by its metadata.total_size, "
                + ("parameters computed from config.json." if slots else "parameters unknown.")
            )
        else:
            store = TensorStore.open(folder)
            found, num_shards = _by_headers(store, config, declaration, notes), len(store.files)

    weights, left_out = _sort_out(found, family, spec, slots)
    if source is not None:
        for name in left_out_tensors(source, source.weights):
            left_out.setdefault(DRAFT_LAYERS, []).append(name)
    for what, names in left_out.items():
        notes.append(f"Not counted: {counted(len(names), 'tensor')} of {what}, for instance {describe(names[0], 400)}.")
    if spec is not None:
        notes += _compare(weights, slots, spec)
    return Analysis(
        model=path_or_hub_id,
        folder=folder,
        config=config,
        family=family,
        spec=spec,
        slots=slots,
        has_headers=not missing,
        num_shards=num_shards,
        num_missing_shards=len(missing),
        declared_bytes=index.total_size if index else None,
        weights=weights,
        notes=tuple(notes),
    )


def _read_declaration(folder: Path, config: Mapping[str, Any], notes: list[str]) -> Declaration:
    try:
        return read_declaration(folder, config)
    except UnsupportedError as error:
        notes.append(f"Formats are told without the declared quantization: {error}")
        return Declaration()


def _sort_out(
    found: Mapping[str, Weight], family: Family | None, spec: ModelSpec | None, slots: Mapping[str, Slot]
) -> tuple[dict[str, Weight], dict[str, list[str]]]:
    """The model's weights, by the roles of their slots, and the names of what it leaves out, by what that is."""
    weights: dict[str, Weight] = {}
    left_out: dict[str, list[str]] = {}
    if family is not None:
        found = family.with_whole_names(found, slots)
    for name, weight in found.items():
        slot = slots.get(name)
        if slot is not None:
            weights[name] = Weight(slot.role, weight.format, weight.shape or slot.shape, weight.nbytes)
        elif family is None or spec is None or not family.is_ignored(name, spec):
            weights[name] = weight
        elif (what := family.what_is_left_out(name, spec)) is not None:
            left_out.setdefault(what, []).append(name)
        elif not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            left_out.setdefault(DRAFT_LAYERS, []).append(name)
    return weights, left_out


def _locate(path_or_hub_id: str) -> Path:
    if not Path(path_or_hub_id).expanduser().exists():
        from huggingface_hub import snapshot_download

        with contextlib.suppress(Exception):  # whatever it is, `resolve` meets it again and explains it
            folder = Path(snapshot_download(path_or_hub_id, allow_patterns=["*.json"], ignore_patterns=["*/*"]))
            if any((folder / name).is_file() for name in _INDEXES):
                return folder
    return resolve(path_or_hub_id)


def _is_gguf(folder: Path) -> bool:
    """Whether `TensorStore` would open GGUF."""
    if folder.is_file():
        return True
    suffixes = {path.suffix for path in folder.iterdir()}
    return ".gguf" in suffixes and not suffixes & {".safetensors", ".bin"}


def _read_family(config: Mapping[str, Any], place: str) -> tuple[Family | None, ModelSpec | None, list[str]]:
    if not config:
        return None, None, [f"Without a configuration ({place}), layers and roles are told by the names."]
    try:
        return *read_spec(config, place), []
    except AmalgamError as error:
        return None, None, [f"Layers and roles are told by the names: {error}"]


@dataclass(frozen=True)
class _Index:
    name: str
    weight_map: dict[str, str]
    total_size: int | None
    missing_shards: list[str]


def _read_index(folder: Path) -> _Index | None:
    """The index that `TensorStore` would follow; None where it would take files without an index."""
    present = {path.name for path in folder.iterdir()}
    for name, suffix in _INDEXES.items():
        if name in present:
            break
        if any(other.endswith(suffix) for other in present):
            return None
    else:
        return None

    def refuse(what: str) -> NoReturn:
        raise CheckpointError(f"{folder / name} {what}.", remedy="Download it again.")

    content = read_json(folder, name, MAX_INDEX_BYTES)
    weight_map, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(f"has weight_map {describe(weight_map)} instead of an object from tensor to file")
    for tensor, file in weight_map.items():
        if not tensor or not tensor.isprintable():
            refuse(f"lists tensor {describe(tensor)}, a name that is empty or unprintable")
        if not isinstance(file, str) or not file.endswith(suffix) or "/" in file or "\\" in file:
            refuse(f"puts tensor {describe(tensor)} in {describe(file)} instead of in a *{suffix} file beside it")
    if not isinstance(metadata, dict):
        refuse(f"has metadata {describe(metadata)} instead of an object")
    size = metadata.get("total_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int | float) or size < 0):
        refuse(f"has metadata.total_size {describe(size)} instead of a number of bytes")
    missing = sorted(set(weight_map.values()) - present)
    return _Index(name, weight_map, None if size is None else int(size), missing)


def _by_names(tensors: Iterable[str], config: Mapping[str, Any], declaration: Declaration) -> dict[str, Weight]:
    dtype = config.get("dtype") or config.get("torch_dtype")
    wide = _DTYPES.get(dtype, UNQUANTIZED) if isinstance(dtype, str) else UNQUANTIZED

    @cache
    def format_of(roles: frozenset[str], declared: Declared) -> str:
        if roles == {WEIGHT_SUFFIX}:
            return wide
        formats = [f for f in fitting(roles) if not f.is_wide]
        return " or ".join(f.name for f in formats if f.is_possible(declared)) or UNRECOGNISED

    def module_of(name: str) -> str:
        return name.removesuffix(f".{WEIGHT_SUFFIX}")

    return {
        name: Weight(role_by_name(name), format_of(frozenset(parts), declaration.of(module_of(name))), None, None)
        for name, parts in group_names(tensors).items()
    }


def _by_headers(
    store: TensorStore, config: Mapping[str, Any], declaration: Declaration, notes: list[str]
) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    problems: list[str] = []
    for name, parts in group_parts(store, fused_tensors(config), declaration).items():
        label, shape = UNRECOGNISED, None
        try:
            stored = recognise(name, parts, declaration, reader(store))
            label, shape = stored.format.name, stored.shape
        except CheckpointError as error:
            problems.append(str(error))
        weights[name] = Weight(role_by_name(name), label, shape, sum(part.nbytes for part in parts.values()))
    if problems:
        notes.append(
            f"No format recognises {counted(len(problems), 'weight')}, for instance {describe(problems[0], 400)}."
        )
    return weights


def _compare(weights: Mapping[str, Weight], slots: Mapping[str, Slot], spec: ModelSpec) -> Iterator[str]:
    lacking = [name for name in slots if name not in weights]
    if lacking:
        yield f"The checkpoint lacks {counted(len(lacking), 'weight')} of its family, for instance {lacking[0]}."
    surplus = [name for name in weights if name not in slots]
    if spec.has_tied_head and any(weights[name].role == "head" for name in surplus):
        yield "The checkpoint holds a head although config.json ties it to the embedding, which is used instead."
        surplus = [name for name in surplus if weights[name].role != "head"]
    biases = [name for name in surplus if is_surplus_bias(name, weights[name].shape, slots)]
    if biases:
        yield (
            f"Beside projections that have none by config.json: {counted(len(biases), 'bias', 'biases')}, for instance "
            f"{biases[0]}; zeros are passed over, others refused."
        )
        surplus = sorted(set(surplus) - set(biases))
    if surplus:
        yield f"The family has no place for {counted(len(surplus), 'weight')}, for instance {describe(surplus[0])}."


def _tally(weights: Iterable[Weight], key: Callable[[Weight], str]) -> dict[str, Tally]:
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    for weight in weights:
        tallies[key(weight)].add(weight)
    return tallies


def _tally_dict(tally: Tally) -> dict[str, Any]:
    return {"weights": tally.num_weights, "parameters": tally.parameters, "bytes": tally.nbytes}


def _plus(total: int | None, more: int | None) -> int | None:
    return None if total is None or more is None else total + more
