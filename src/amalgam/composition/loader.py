"""The only place where checkpoint, plan and spec meet: sources and rules in, a weight version out.

In: settings of the model. Out: `ModelLoader`, which checks a whole plan before it reads a byte and then loads what the
previous version does not already hold. Must never know: requests.
"""

from __future__ import annotations

import errno
import logging
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from amalgam.base.collector import collector_paused
from amalgam.base.locks import FileLock
from amalgam.base.threads import map_in_threads
from amalgam.checkpoint.shards import Identity
from amalgam.composition.agreement import check_agreement, check_tied_head
from amalgam.composition.packed_cache import PackedCache, key_of
from amalgam.composition.plan import Choice, Plan
from amalgam.composition.source import CONFIG_NAME, Source
from amalgam.config.settings import BASE_SOURCE, InferenceSettings, ModelSettings, Rule, build_rules
from amalgam.errors import CheckpointError, PlanError, describe
from amalgam.formats.contract import StoredWeight, WeightFormat, WritableFormat
from amalgam.formats.fused import FusedTensor
from amalgam.formats.registry import writable_format
from amalgam.kernels import mapped, native, ops, panels
from amalgam.kernels.layouts import dense
from amalgam.kernels.packed import PackedWeight, consists_of_rows
from amalgam.kernels.panels import ActivationType
from amalgam.models.registry import fused_tensors, read_spec
from amalgam.models.spec import Family, ModelSpec, Slot
from amalgam.models.weights import Origin, Part, WeightVersion
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest

logger = logging.getLogger("amalgam.models")

HEAD = "lm_head.weight"  # of every family
Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


@dataclass(frozen=True, eq=False)
class PlannedWeight:
    """One slot of a checked plan, ready to be loaded."""

    slot: Slot
    choice: Choice
    source: Source
    stored: StoredWeight
    quantize_to: WritableFormat | None  # quantize while loading
    activation: ActivationType | None  # of bfloat16 activations for integer weights; None: nothing is multiplied
    codes: bool  # whether bf16 is coded in memory

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for weights that are packed from the same bytes, which mean the same, in the same way; taken when
        first asked for. Two folders may hold one file and declare it differently."""
        target = self.quantize_to.name if self.quantize_to else None
        meaning = None if self.stored.is_wide else self.stored.declared
        return (*self.source.identity(self.stored), meaning, target)

    @property
    def cache_key(self) -> str:
        """Names its packed bytes for other processes: `key`, and all else that they depend on.

        Panels are the same bytes for every type of activation, so only whether there is one counts.
        """
        stored, slot = self.stored, self.slot
        packing = (slot.shape, slot.is_transposed, self.is_expanded, self.activation is not None, self.codes)
        return key_of(self.key, packing, stored.block, stored.bits, stored.declared, self.source.config_digest)

    @property
    def nbytes(self) -> int:
        """Its size by its format: as stored, or as it is quantized or expanded while loading."""
        if self.is_expanded:
            return math.prod(self.slot.shape) * torch.float32.itemsize
        return self.stored.nbytes if self.quantize_to is None else self.quantize_to.nbytes(self.slot.shape)

    @property
    def memory_bytes(self) -> int:
        """What it is expected to take in memory: `nbytes`, or less where bf16 is coded.

        Whether it can be is known when it is read: trained weights can, one whose exponents are spread takes `nbytes`.
        """
        return panels.coded_bytes(self.slot.shape) if self.codes else self.nbytes

    @property
    def format(self) -> WeightFormat:
        """As it is packed: as stored, or as it is quantized while loading."""
        return self.quantize_to or self.stored.format

    @property
    def is_expanded(self) -> bool:
        """Whether it is dequantized while loading.

        Some tools quantize routers, and ours work in float32. Of an embedding a step needs single rows, which not every
        layout has.
        """
        has_rows = all(consists_of_rows(layout) for layout in self.stored.format.layouts)
        is_wanted = self.slot.role == "router" or (self.slot.role == "embedding" and not has_rows)
        return is_wanted and not self.stored.is_wide

    def load(self, device: torch.device) -> PackedWeight:
        """Read, arrange and pack it for a device."""
        return self.source.load(self.stored, lambda packed: self._finish(packed, device))

    def _finish(self, packed: PackedWeight, device: torch.device) -> PackedWeight:
        packed = oriented(packed, self.stored, self.slot)
        if len(self.slot.shape) == 1 and not bool(packed.dense.isfinite().all()):
            raise CheckpointError(
                f"Weight {self.choice.name!r} in source {self.source.name!r} ({self.source.folder}) holds NaN or "
                "infinity.",
                remedy="Every token would be computed as NaN. Download the checkpoint again.",
            )
        if self.quantize_to is not None:
            packed = self.quantize_to.pack(quantize(packed.dequantize(), self.quantize_to, round_to_nearest))
        if self.is_expanded:
            packed = dense(packed.dequantize())
        packed = packed.to(device)
        return packed if self.activation is None else ops.prepare(packed, self.activation, codes=self.codes)

    @property
    def origin(self) -> Origin:
        """Where it comes from, one line of the manifest."""
        stored = self.stored
        return Origin(
            name=self.choice.name,
            slot=self.slot.name,
            source=self.source.name,
            format="fp32" if self.is_expanded else self.format.name,
            stored_format=stored.format.name,
            shape=self.slot.shape,
            rule=self.choice.reason,
            parts=tuple(Part(e.name, str(e.file), e.offset, e.nbytes) for e in stored.parts.values()),
        )


def codes_bf16(slot: Slot, inference: InferenceSettings) -> bool:
    """Whether the CPU codes the bf16 weight of a slot; what is multiplied in float32 gains nothing from it.

    Portable code takes ten times as long to undo it as to read the weight.
    """
    is_wanted = inference.bf16_coding and inference.dtype == "bfloat16" and slot.role != "router"
    return is_wanted and native.is_available() and native.isa() != "portable"


def is_surplus_bias(name: str, shape: tuple[int, ...] | None, slots: Mapping[str, Slot]) -> bool:
    """Whether a leftover is the bias of a projection that has none in the model; GPTQ's tools store zeros there."""
    slot = slots.get(f"{name.removesuffix('.bias')}.weight") if name.endswith(".bias") else None
    return slot is not None and (slot.is_linear or slot.role == "router") and shape in (None, slot.shape[:1])


def oriented(packed: PackedWeight, stored: StoredWeight, slot: Slot) -> PackedWeight:
    """A weight in the slot's orientation, whichever the source stores it in."""
    return dense(packed.dense.t().contiguous()) if slot.is_transposed and stored.is_wide else packed


def check_leftovers(source: Source, family: Family, spec: ModelSpec, known: Container[str]) -> None:
    """Raise CheckpointError if a source holds weights that are neither `known` nor the family's to be left over."""
    leftovers = [name for name in source.weights if name not in known and not family.is_ignored(name, spec)]
    if not leftovers:
        return
    layers = {int(layer[1]) for name in leftovers if (layer := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    remedy = "Is config.json of the same model?"
    if layers and min(layers) == spec.num_layers and all(".layers." in name for name in leftovers):
        remedy = (
            f"If layers {min(layers)} to {max(layers)} predict further tokens, config.json has to say so: "
            f"num_nextn_predict_layers {max(layers) - spec.num_layers + 1}. Otherwise: is it of the same model?"
        )
    raise CheckpointError(
        f"{source.folder} holds {len(leftovers)} weights that family {family.name!r} has no place for: "
        f"{', '.join(leftovers[:5])}{' …' if len(leftovers) > 5 else ''}.",
        remedy=remedy,
    )


class ModelLoader:
    """A model's family, spec and sources; builds weight versions from rules.

    Attributes:
        base_folder, base_metadata: the base checkpoint's folder (or `.gguf` file) and GGUF metadata.
        family, spec: read from the base checkpoint's config.json.
        names: logical name of every weight, in order of use.
        cache_folder: where the packed cache is; None without one.
    """

    @collector_paused()
    def __init__(self, model: ModelSettings, inference: InferenceSettings, device: torch.device, threads: int) -> None:
        """Open the base checkpoint and read its config.

        Raises:
            CheckpointError, UnsupportedError: no such folder, damaged files, an unknown family.
        """
        self.device = device
        self._threads = threads
        self._inference = inference
        self.cache_folder = _cache_folder(inference, device)
        self._mixed = model.mixed_precision
        self._paths = {BASE_SOURCE: model.base_path, **self._mixed.sources}
        base = Source.open(BASE_SOURCE, model.base_path, fused_tensors)
        if not base.config:
            raise CheckpointError(base.config_place, remedy=f"base_path needs a {CONFIG_NAME}.")
        self.base_folder = base.folder
        self.base_metadata = base.store.metadata
        self._base_place = base.config_place
        self.family, self.spec = read_spec(base.config, base.config_place)
        self._slots = {self.family.logical_name(slot): slot for slot in self.spec.slots}
        self._sources = {BASE_SOURCE: self._with_logical_names(base)}
        self._zeros: set[tuple[str, str]] = set()  # (source, bias) that were read and are zeros

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    @property
    def sources(self) -> Mapping[str, str]:
        """Name → path or hub id of every declared source, whether in use or not."""
        return dict(self._paths)

    def make_plan(self, rules: Sequence[Rule] | None = None) -> Plan:
        """Which source each weight comes from, by the given rules or the configured ones.

        Raises:
            PlanError: a rule matches nothing or names a source that nobody declared.
        """
        rules = self._mixed.all_rules if rules is None else rules
        for rule in rules:
            if rule.source not in self._paths:
                raise PlanError(
                    f"Rule {rule.pattern!r} names source {rule.source!r}, which nobody declared.",
                    remedy=f"Declared: {', '.join(sorted(self._paths))}.",
                )
        return Plan(self._slots, rules, self._mixed.default_source)

    @collector_paused()
    def check(self, plan: Plan) -> list[PlannedWeight]:
        """Find every weight of a plan in its source and compare shapes; reads headers and a few small tensors.

        Raises:
            PlanError: a source lacks a weight or has it in another shape, or sources that share a block disagree.
            CheckpointError: a source is damaged, of another model, or holds weights that the model has no place for.
        """
        planned = [self._check_weight(slot, plan[name]) for name, slot in self._slots.items()]
        for source in {id(weight.source): weight.source for weight in planned}.values():
            self._check_source(source)
        for target, shape in {(w.quantize_to, w.slot.shape) for w in planned if w.quantize_to is not None}:
            target.grid(shape, torch.float32)  # whether it can at all
        check_agreement(planned)
        return planned

    def memory_bytes(self, slot: Slot, weight_format: WeightFormat) -> int:
        """What the weight of a slot that is multiplied would take in memory in a format.

        Raises:
            UnsupportedError: the format cannot hold this shape.
        """
        size = weight_format.nbytes(slot.shape)
        return panels.coded_bytes(slot.shape) if self._codes(slot, weight_format) else size

    def planned_bytes(self, mapping: Mapping[str, str]) -> int:
        """What weights would take in memory, each from the source given with its logical name; reads headers only.

        Raises:
            PlanError: no such weight or source, or the source does not hold it.
            CheckpointError: a source is damaged.
        """
        plan = self.make_plan(build_rules(mapping))
        for name in mapping:
            if name not in self._slots:
                raise PlanError(f"The model has no weight {describe(name)}.", remedy="Give logical names, no patterns.")
        return sum(self._check_weight(self._slots[name], plan[name]).memory_bytes for name in mapping)

    def _codes(self, slot: Slot, weight_format: WeightFormat) -> bool:
        return weight_format.name == "bf16" and self.device.type == "cpu" and codes_bf16(slot, self._inference)

    def maps(self, weight_format: WeightFormat) -> bool:
        """Whether weights of a format become pages of the packed cache instead of memory of the process."""
        return self.cache_folder is not None and mapped.LAYOUTS.issuperset(weight_format.layouts)

    def build(
        self,
        plan: Plan,
        version_id: int,
        previous: WeightVersion | None = None,
        progress: Progress | None = None,
        planned: Sequence[PlannedWeight] | None = None,
    ) -> LoadedVersion:
        """Check the plan, load what `previous` does not hold, and return a new version.

        Args:
            planned: what `check` has just made of the plan, which is then not checked again.

        Memory at its peak: the new weights, and per loading thread one more copy of the tensor it works on.
        """
        started = time.monotonic()
        planned = self.check(plan) if planned is None else planned
        keys = {weight.slot.name: weight.key for weight in planned}
        shared = {} if previous is None else {s: previous[s] for s, key in keys.items() if previous.keys.get(s) == key}
        missing = [weight for weight in planned if weight.slot.name not in shared]
        weights = {**shared, **self._load(missing, progress)}
        origins = {weight.slot.name: weight.origin for weight in planned}
        version = WeightVersion(version_id, weights, origins, keys)
        return LoadedVersion(
            version=version,
            num_loaded=len(missing),
            loaded_bytes=sum(weights[weight.slot.name].nbytes for weight in missing),
            shared_bytes=sum(weight.nbytes for weight in shared.values()),
            seconds=time.monotonic() - started,
        )

    def reopen(self) -> ModelLoader:
        """The same model from the files as they are now.

        Raises:
            CheckpointError: the base checkpoint is now another model.
        """
        model = ModelSettings(base_path=self._paths[BASE_SOURCE], mixed_precision=self._mixed)
        fresh = ModelLoader(model, self._inference, self.device, self._threads)
        if fresh.spec != self.spec:
            raise CheckpointError(
                f"{fresh._base_place} describes another model than the one being served.",
                remedy="Restart the server to serve it.",
            )
        return fresh

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            source = Source.open(name, self._paths[name], self._fused)
            self._sources[name] = self._with_logical_names(source)
        return self._sources[name]

    def _fused(self, config: Mapping[str, Any]) -> Sequence[FusedTensor]:
        """The fused tensors of a source; one without a config.json is of the base checkpoint's family."""
        return fused_tensors(config) if config else self.family.fused

    def _with_logical_names(self, source: Source) -> Source:
        return replace(source, weights=self.family.with_optional_prefix(source.weights, self._slots))

    def _check_weight(self, slot: Slot, choice: Choice) -> PlannedWeight:
        source = self._source(choice.source)
        stored = source.weights.get(choice.name)
        if stored is None:
            is_head = slot.role == "head" and self.family.logical_name(self.spec.slots[0]) in source.weights
            raise PlanError(
                f"Source {choice.source!r} ({source.folder}) has no weight {choice.name!r} ({choice.reason}).",
                remedy="Choose another source for it."
                + (
                    " Or is the head the embedding? Then set tie_word_embeddings to true in config.json."
                    if is_head
                    else ""
                ),
            )
        expected = slot.shape[::-1] if slot.is_transposed and stored.is_wide else slot.shape
        if stored.shape != expected:
            raise PlanError(
                f"Weight {choice.name!r} has shape {list(stored.shape)} in source {choice.source!r} ({source.folder}).",
                remedy=f"The model's config.json makes it {list(expected)}: is this a checkpoint of the same model?",
            )
        if not slot.is_linear and not stored.is_wide and slot.role not in {"embedding", "router"}:
            raise PlanError(
                f"Weight {choice.name!r} is stored as {stored.format.name} in source {choice.source!r}.",
                remedy=f"A {slot.role} must be floating: choose another source for it.",
            )
        is_multiplied = (
            slot.is_linear or slot.role == "router" or (slot.role == "embedding" and self.spec.has_tied_head)
        )
        activation = self._inference.activation if is_multiplied else None
        quantize_to = self._quantize_to(slot, choice, stored)
        codes = is_multiplied and self._codes(slot, quantize_to or stored.format)
        return PlannedWeight(slot, choice, source, stored, quantize_to, activation, codes)

    def _quantize_to(self, slot: Slot, choice: Choice, stored: StoredWeight) -> WritableFormat | None:
        """`load_in_8bit` and `load_in_4bit` concern wide linear weights that no rule names; the head stays wide."""
        if choice.rule is not None or not stored.is_wide or not slot.is_linear or slot.role == "head":
            return None
        if self._inference.load_in_8bit:
            return writable_format("int8")
        return writable_format("int4") if self._inference.load_in_4bit else None

    def _check_source(self, source: Source) -> None:
        spec = self.spec
        if source.config and source.name != BASE_SOURCE:
            _, spec = read_spec(source.config, source.config_place)
            if source.store.metadata:  # GGUF has no word for a tied head: it leaves the head out, or writes it twice
                spec = replace(spec, has_tied_head=self.spec.has_tied_head)
            self._check_same_model(source, spec)
        tied = {HEAD} if self.spec.has_tied_head else set()
        if tied:  # a GGUF file does not declare it, and may hold both in other precisions
            embedding = self.family.logical_name(self.spec.slots[0])
            check_tied_head(source, embedding, HEAD, may_be_rounded=bool(source.store.metadata))
        known = {*self._slots, *tied}
        surplus = [
            name
            for name, weight in source.weights.items()
            if name not in known and is_surplus_bias(name, weight.shape, self._slots)
        ]
        check_leftovers(source, self.family, spec, known.union(surplus))
        self._check_zeros(source, surplus)

    def _check_same_model(self, source: Source, spec: ModelSpec) -> None:
        """Raise CheckpointError unless a source's configuration computes what the base's does, by whatever names."""
        positions = min(self._inference.max_seq_length, self.spec.max_positions)
        # Some architectures of GGUF have no word for windows: the base checkpoint's are used in any case.
        has_windows = not source.store.metadata or any(_window(layer.attention) for layer in spec.layers)
        theirs, ours = (_comparable(one, positions, has_windows=has_windows) for one in (spec, self.spec))
        if theirs != ours:
            raise CheckpointError(
                f"{source.config_place} describes another model than {self._base_place}: {_difference(theirs, ours)}.",
                remedy=f"Source {source.name!r} must be a checkpoint of the same model.",
            )

    def _check_zeros(self, source: Source, biases: Sequence[str]) -> None:
        """Raise CheckpointError if biases that the model has no place for are not all zeros; each is read once."""
        for name in biases:
            if (source.name, name) in self._zeros:
                continue
            values = source.values(name)
            assert values is not None
            if bool((values != 0).any()):
                raise CheckpointError(
                    f"{source.folder} holds {name!r}, which is not all zeros, and family {self.family.name!r} has no "
                    "bias there by its config.json.",
                    remedy="If the model has biases, its config.json has to say so (attention_bias, mlp_bias); if a "
                    "tool has made them to correct its errors, quantize without that.",
                )
            self._zeros.add((source.name, name))

    def _load(self, planned: Sequence[PlannedWeight], progress: Progress | None) -> dict[str, PackedWeight]:
        """The weights by slot, from the packed cache where there is one and it has them."""
        if self.cache_folder is None or not planned:
            return _only(self._read(planned, progress))
        cache = PackedCache(self.cache_folder)
        keys = {weight.slot.name: weight.cache_key for weight in planned}
        found = self._find(cache, planned, keys)
        missing = [weight for weight in planned if weight.slot.name not in found]
        if missing:
            found |= self._fill(cache, missing, keys, progress)
        num_bytes = sum(weight.nbytes for weight in found.values() if weight.is_mapped)
        logger.info(
            "packed cache %s: %d of %d weights were there, %d MiB are mapped",
            cache.folder,
            len(planned) - len(missing),
            len(planned),
            num_bytes >> 20,
        )
        return found

    def _find(
        self, cache: PackedCache, planned: Sequence[PlannedWeight], keys: Mapping[str, str]
    ) -> dict[str, PackedWeight]:
        found = {w.slot.name: cache.find(keys[w.slot.name], w.slot.shape, w.activation) for w in planned}
        return _only(found)

    def _fill(
        self, cache: PackedCache, missing: Sequence[PlannedWeight], keys: Mapping[str, str], progress: Progress | None
    ) -> dict[str, PackedWeight]:
        """Write weights into the cache and map them from there; a weight leaves memory as soon as it is written.

        What another process is writing is waited for: it would take as much space again.
        """
        by_source = _by_source(missing)
        found: dict[str, PackedWeight] = {}
        try:
            with ExitStack() as stack:
                locks = {lock.target: lock for lock in (cache.lock(_files_of(some)) for some in by_source.values())}
                for target in sorted(locks):  # in one order for all processes, so that no two wait for each other
                    lock = stack.enter_context(locks[target])
                    lock.acquire(waiting_for(cache.folder, lock, progress))
                cache.open_files()
                found = self._find(cache, missing, keys)
                missing = [weight for weight in missing if weight.slot.name not in found]
                if found:
                    logger.info("packed cache %s: another process has written %d weights", cache.folder, len(found))
                if not missing:
                    return found
                by_source = _by_source(missing)
                _check_room(cache.folder, sum(weight.nbytes for weight in missing))
                files = {
                    source: stack.enter_context(cache.new_file(_files_of(weights)))
                    for source, weights in by_source.items()
                }

                def keep(weight: PlannedWeight, packed: PackedWeight) -> PackedWeight | None:
                    return None if files[id(weight.source)].add(keys[weight.slot.name], packed) else packed

                weights = _only(self._read(missing, progress, keep))
                for file in files.values():
                    file.commit()
        except OSError as error:
            logger.warning("The packed cache in %s cannot be written (%s); going on without.", cache.folder, error)
            return found | _only(self._read(missing, progress))
        written = [weight for weight in missing if weight.slot.name not in weights]
        weights |= self._find(cache, written, keys)
        lost = [weight for weight in missing if weight.slot.name not in weights]
        return {**found, **weights, **_only(self._read(lost, None))}

    def _read(
        self, planned: Sequence[PlannedWeight], progress: Progress | None, keep: Keep | None = None
    ) -> dict[str, PackedWeight | None]:
        """Read and pack in threads; slot → what `keep` makes of the packed weight."""
        total = sum(weight.stored.nbytes for weight in planned)
        done = 0
        lock = threading.Lock()

        def load(weight: PlannedWeight) -> PackedWeight | None:
            nonlocal done
            packed = weight.load(self.device)
            kept = packed if keep is None else keep(weight, packed)
            if progress is not None:
                with lock:
                    done += weight.stored.nbytes
                    progress("Loading weights", done, total)
            return kept

        loaded = map_in_threads(load, planned, self._threads, "load")
        return dict(zip((weight.slot.name for weight in planned), loaded, strict=True))


Keep = Callable[[PlannedWeight, PackedWeight], PackedWeight | None]


def waiting_for(path: Path, lock: FileLock, progress: Progress | None) -> Callable[[], None]:
    """What a wait for another process' lock calls: it says so once, and lets `progress` show it and end it."""
    is_said = False

    def wait() -> None:
        nonlocal is_said
        if not is_said:
            logger.warning("%s: waiting for %s, which is writing there", path, lock.holder)
            is_said = True
        if progress is not None:
            progress(f"Waiting for another process to write {path.name}", 0, 1)

    return wait


def _by_source(weights: Sequence[PlannedWeight]) -> dict[int, list[PlannedWeight]]:
    result: dict[int, list[PlannedWeight]] = {}
    for weight in weights:
        result.setdefault(id(weight.source), []).append(weight)
    return result


def _only(weights: Mapping[str, PackedWeight | None]) -> dict[str, PackedWeight]:
    return {slot: weight for slot, weight in weights.items() if weight is not None}


def _cache_folder(inference: InferenceSettings, device: torch.device) -> Path | None:
    """Where the packed cache is; None, with a warning if it was asked for, where there can be none."""
    if not inference.packed_cache:
        return None
    if device.type != "cpu" or not native.is_available():
        reason = native.why_unavailable() or f"it is for the CPU, and the model runs on {device}"
        logger.warning("inference.packed_cache is not used: %s", reason)
        return None
    return Path(inference.packed_cache).expanduser().absolute()


def _check_room(folder: Path, nbytes: int) -> None:
    """Raise OSError where the disk is too full, before hours of packing rather than after them."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OSError(errno.ENOSPC, f"{nbytes} bytes are needed and {free} are free")


def _files_of(weights: Sequence[PlannedWeight]) -> list[Identity]:
    """The checkpoint files that weights come from, as they were when their bytes were named."""
    return sorted({identity for weight in weights for identity in weight.source.files_of(weight.stored)})


def _comparable(spec: ModelSpec, positions: int, *, has_windows: bool) -> ModelSpec:
    """What two checkpoints of one model must agree in: what is computed for sequences of so many positions."""

    def without_idle_window(attention: Any) -> Any:
        window = _window(attention)
        is_idle = window is not None and (window >= positions or not has_windows)
        return replace(attention, window=None) if is_idle else attention

    layers = tuple(replace(layer, attention=without_idle_window(layer.attention)) for layer in spec.layers)
    return replace(spec, family="", max_positions=0, num_draft_layers=0, layers=layers)


def _window(attention: object) -> int | None:
    return getattr(attention, "window", None)


def _difference(one: object, other: object, where: str = "") -> str:
    """The first field in which two specs differ, with both values."""
    if is_dataclass(one) and type(one) is type(other):
        for field in fields(one):
            pair = getattr(one, field.name), getattr(other, field.name)
            if pair[0] != pair[1]:
                return _difference(*pair, f"{where}.{field.name}" if where else field.name)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        index = next(index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        return _difference(one[index], other[index], f"{where}[{index}]")
    return f"{where} is {describe(one)} and not {describe(other)}"


@dataclass(frozen=True, eq=False)
class LoadedVersion:
    """A new weight version and what making it cost."""

    version: WeightVersion
    num_loaded: int
    loaded_bytes: int
    shared_bytes: int
    seconds: float
