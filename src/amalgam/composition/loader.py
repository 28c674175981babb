"""The only place where sources, rules and spec meet: many checkpoints in, a weight version out.

In: settings of the model. Out: `ModelLoader`, which plans and checks every weight before it reads a byte and then loads
what the previous version does not already hold. Must never know: requests.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from amalgam.base.collector import collector_paused
from amalgam.composition.agreement import check_agreement
from amalgam.composition.check import SourceCheck
from amalgam.composition.devices import Devices, bytes_by_device
from amalgam.composition.opening import CONFIG_NAME
from amalgam.composition.planned import PlannedWeight, activation_for, codes_bf16
from amalgam.composition.progress import Progress, Turn
from amalgam.composition.reading import WeightReader, packed_cache_folder
from amalgam.composition.rules import Choice, Choices
from amalgam.composition.source import Source
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import ModelSettings
from amalgam.config.placement import BASE_SOURCE, Rule, build_rules
from amalgam.errors import CheckpointError, PlanError
from amalgam.formats.contract import StoredWeight, WeightFormat, WritableFormat
from amalgam.formats.fused import FusedTensor
from amalgam.formats.registry import writable_format
from amalgam.kernels.backends import Backend
from amalgam.kernels.layouts import INT4, is_known
from amalgam.kernels.weights import PackedWeight
from amalgam.models.registry import fused_tensors, read_spec
from amalgam.models.spec import Slot
from amalgam.models.weights import WeightVersion


@dataclass(frozen=True, eq=False)
class LoadedVersion:
    """A new weight version and what making it cost."""

    version: WeightVersion
    num_loaded: int
    loaded_bytes: int
    shared_bytes: int
    seconds: float
    read_bytes: int = 0  # of files


class ModelLoader:
    """A model's family, spec and sources; builds weight versions from rules.

    Attributes:
        base_folder, base_metadata: the base checkpoint's folder (or `.gguf` file) and GGUF metadata.
        family, spec: read from the base checkpoint's config.json.
        names: logical name of every weight, in order of use.
        activation: what bfloat16 activations become for integer weights.
        cache_folder: where the packed cache is; None without one.
        devices: that weights may lie on.
    """

    @collector_paused()
    def __init__(self, model: ModelSettings, inference: InferenceSettings, device: torch.device, threads: int) -> None:
        """Open the base checkpoint and read its config.

        Raises:
            CheckpointError, UnsupportedError: no such folder, damaged files, an unknown family.
        """
        self.device = device
        self.devices = Devices(inference, device)
        self._backend = self.devices.backend(None)
        self._threads = threads
        self._inference = inference
        self.cache_folder = packed_cache_folder(inference, device)
        self._reader = WeightReader(self.devices.backend, threads, self.cache_folder)
        self._mixed = model.mixed_precision
        self._paths = {BASE_SOURCE: model.base_path, **self._mixed.sources}
        base = Source.open(BASE_SOURCE, model.base_path, fused_tensors)
        if not base.config:
            raise CheckpointError(base.config_place, remedy=f"base_path needs a {CONFIG_NAME}.")
        self.base_folder = base.folder
        self.base_metadata = base.store.metadata
        self._base_place = base.config_place
        self.family, self.spec = read_spec(base.config, base.config_place)
        self.activation = activation_for(self.spec, inference)
        self._slots = {self.family.logical_name(slot): slot for slot in self.spec.slots}
        self._sources = {BASE_SOURCE: self._with_logical_names(base)}
        self._built: WeakKeyDictionary[WeightVersion, frozenset[str]] = WeakKeyDictionary()  # version → its sources
        self._building = threading.Lock()  # a version is added while another thread plans
        self._source_check = SourceCheck(
            self.family, self.spec, self._slots, self._base_place, inference.max_seq_length
        )

    @property
    def base(self) -> Source:
        """The base checkpoint."""
        return self._sources[BASE_SOURCE]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    @property
    def sources(self) -> Mapping[str, str]:
        """Name → path or hub id of every declared source, whether in use or not."""
        return dict(self._paths)

    def choose(self, rules: Sequence[Rule] | None = None) -> Choices:
        """Which source each weight comes from, by the given rules or the configured ones.

        Raises:
            PlanError: a rule matches nothing or names a source that nobody declared.
        """
        rules = self._mixed.all_rules if rules is None else rules
        for rule in rules:
            if rule.source is not None and rule.source not in self._paths:
                raise PlanError(
                    f"Rule {rule.pattern!r} names source {rule.source!r}, which is not declared.",
                    remedy=f"Declared: {', '.join(sorted(self._paths))}.",
                )
        return Choices(self._slots, rules, self._mixed.default_source)

    @collector_paused()
    def plan(self, rules: Sequence[Rule] | None = None) -> list[PlannedWeight]:
        """Find every weight in the source that `choose` takes it from; reads headers and a few small tensors.

        Raises:
            PlanError: see `choose`; a source lacks a weight or has it in another shape; sources of one block disagree;
                a weight cannot lie where a rule places it.
            CheckpointError: a source is damaged, of another model, or holds weights that the model has no place for.
        """
        choices = self.choose(rules)
        devices = self.devices.placement(self._slots, choices)
        self._forget(lambda source: source.store.has_changed())
        with self._reading():
            planned = [self._plan_weight(slot, choices[name], devices.get(name)) for name, slot in self._slots.items()]
            for source in {id(weight.source): weight.source for weight in planned}.values():
                self._source_check.check(source)
            for target, shape in {(w.quantize_to, w.slot.shape) for w in planned if w.quantize_to is not None}:
                target.grid(shape, torch.float32)  # whether it can at all
            check_agreement(planned)
        return planned

    def uniform(self, source: str) -> tuple[Rule, ...]:
        """Rules that take every weight that is multiplied, but the head and routers, from one source.

        The rest stays with base, and so does what the source does not hold.

        Raises:
            PlanError: nobody declared the source.
            CheckpointError: it is damaged.
        """
        held = self._opened(source).weights
        names = [name for name, slot in self._slots.items() if slot.is_linear and slot.role != "head" and name in held]
        return build_rules(dict.fromkeys(names, source))

    def look_at(self, source: str) -> None:
        """Open a source and compare it with the default one as changes of experts, or of linear weights, will.

        Raises:
            PlanError, CheckpointError: see `plan`; a mix of the two would be refused.
        """
        held = self._opened(source).weights
        experts = [name for name, slot in self._slots.items() if slot.role == "expert" and name in held]
        if source != self._mixed.default_source:
            self.plan(build_rules(dict.fromkeys(experts, source)) if experts else self.uniform(source))

    def candidate(self, name: str, source: str) -> PlannedWeight | None:
        """One weight as a source has it; None if the source does not hold it. Reads headers only.

        Raises:
            PlanError: no such source, or it has the weight in another shape.
            CheckpointError: it is damaged.
        """
        if name not in self._opened(source).weights:
            return None
        rule = Rule(pattern=name, source=source)
        return self._plan_weight(self._slots[name], Choice(name, source, rule))

    @property
    def slots(self) -> Mapping[str, Slot]:
        """Logical name → slot of every weight, in order of use."""
        return dict(self._slots)

    def _opened(self, source: str) -> Source:
        if source not in self._paths:
            raise PlanError(
                f"Source {source!r} is not declared.", remedy=f"Declared: {', '.join(sorted(self._paths))}."
            )
        return self._source(source)

    def memory_bytes(self, slot: Slot, weight_format: WeightFormat) -> int:
        """What the weight of a slot that is multiplied would take in memory in a format.

        Raises:
            UnsupportedError: the format cannot hold this shape.
        """
        size = weight_format.nbytes(slot.shape)
        coded = self._coded_bytes(slot, weight_format, self._backend)
        if coded is not None:
            return coded
        bits = weight_format.bits
        if bits in (2, 3) and isinstance(weight_format, WritableFormat) and len(slot.shape) == 2:
            block = weight_format.grid((slot.shape[0], slot.shape[1]), torch.float32).block
            if self._keeps_bits(slot, bits, block, self._backend):
                size -= math.prod(slot.shape) * (4 - bits) // 8  # which `nbytes` counts with 4
        return size

    def _coded_bytes(self, slot: Slot, weight_format: WeightFormat, backend: Backend) -> int | None:
        is_coded = weight_format.name == "bf16" and codes_bf16(slot, self._inference, backend)
        return backend.coded_bytes(slot.shape) if is_coded else None

    def _keeps_bits(self, slot: Slot, bits: int, block: tuple[int, int] | None, backend: Backend) -> bool:
        return block is not None and backend.keeps_bits(slot.shape, bits, block[1])

    def prepare(self, slot: Slot, packed: PackedWeight) -> PackedWeight:
        """A weight that comes from no source, as `build` packs one of this slot."""
        if not self._is_multiplied(slot):
            return packed.to(self.device)
        is_bf16 = packed.is_floating and packed.dense.dtype is torch.bfloat16
        codes = is_bf16 and codes_bf16(slot, self._inference, self._backend)
        return self._backend.prepare(packed, self.activation, codes=codes)

    def _is_multiplied(self, slot: Slot) -> bool:
        return slot.is_linear or slot.decides or (slot.role == "embedding" and self.spec.has_tied_head)

    def maps(self, weight_format: WeightFormat, device: str | None = None) -> bool:
        """Whether weights of a format become pages of the packed cache instead of memory of the process.

        Args:
            device: that they lie on; None: with the rest of the model.
        """
        return self.cache_folder is not None and device is None and all(map(is_known, weight_format.layouts))

    def new_bytes(self, planned: Iterable[PlannedWeight]) -> dict[str | None, int]:
        """Memory that weights are expected to take, by device, without pages of the packed cache."""
        return bytes_by_device([weight for weight in planned if not self.maps(weight.format, weight.device)])

    def build(
        self,
        planned: Sequence[PlannedWeight],
        version_id: int,
        previous: WeightVersion | None = None,
        progress: Progress | None = None,
        turn: Turn = nullcontext,
    ) -> LoadedVersion:
        """Load what `previous` does not hold, and return a new version.

        Memory at its peak: the new weights, and per loading thread one more copy of the tensor it works on.

        Args:
            turn: entered by the thread that reads a weight, for as long as it does.

        Raises:
            CheckpointError, OutOfMemoryError: see `PlannedWeight.load`; a device has too little memory left.
            ConfigError: a device is not there.
        """
        started = time.monotonic()
        keys = {weight.slot.name: weight.key for weight in planned}
        shared = {} if previous is None else {s: previous[s] for s, key in keys.items() if previous.keys.get(s) == key}
        missing = [weight for weight in planned if weight.slot.name not in shared]
        self.devices.check_there(missing)
        self.devices.check_room(self.new_bytes(missing), shared.values())
        with self._reading():
            weights = {**shared, **self._reader.read(missing, progress, turn)}
        self.devices.note((weight, weights[weight.slot.name]) for weight in missing)
        origins = {weight.slot.name: weight.origin for weight in planned}
        version = WeightVersion(version_id, weights, origins, keys)
        with self._building:
            self._built[version] = frozenset(weight.choice.source for weight in planned)
        return LoadedVersion(
            version=version,
            num_loaded=len(missing),
            loaded_bytes=sum(weights[weight.slot.name].nbytes for weight in missing),
            shared_bytes=sum(weight.nbytes for weight in shared.values()),
            seconds=time.monotonic() - started,
            read_bytes=sum(weight.stored.nbytes for weight in missing),
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
        fresh.devices, fresh._reader = self.devices, self._reader  # what lies there counts on
        return fresh

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Behind it no file stays mapped: those that are removed leave the disk."""
        try:
            yield
        except Exception:
            self._forget(lambda source: True)
            raise
        finally:
            for source in list(self._sources.values()):  # other threads may open some
                source.store.close()

    def _forget(self, condition: Callable[[Source], bool]) -> None:
        """Open sources anew when they are next asked for, but for those that living versions are made of.

        So whoever mends or exchanges the files of others need not reload everything.
        """
        with self._building:
            kept = {BASE_SOURCE}.union(*self._built.values())
        sources = list(self._sources.items())
        self._sources = {name: source for name, source in sources if name in kept or not condition(source)}

    def _source(self, name: str) -> Source:
        source = self._sources.get(name)
        if source is None:
            source = self._with_logical_names(Source.open(name, self._paths[name], self._fused))
            self._sources[name] = source
        return source

    def _fused(self, config: Mapping[str, Any]) -> Sequence[FusedTensor]:
        """The fused tensors of a source; one without a config.json is of the base checkpoint's family."""
        return fused_tensors(config) if config else self.family.fused

    def _with_logical_names(self, source: Source) -> Source:
        return replace(source, weights=self.family.with_whole_names(source.weights, self._slots))

    def _plan_weight(self, slot: Slot, choice: Choice, device: str | None = None) -> PlannedWeight:
        source = self._source(choice.source)
        stored = source.weights.get(choice.name)
        if stored is None:
            others = {self.family.what_is_left_out(name) for name in source.weights}
            if others and None not in others:
                raise PlanError(
                    f"Source {choice.source!r} ({source.folder}) has no weight {choice.name!r} ({choice.reason}), "
                    f"nothing but {' and '.join(sorted(filter(None, others)))}.",
                    remedy="Name a checkpoint that has the model's text part.",
                )
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
        if not slot.is_linear and not stored.is_wide and not slot.decides and slot.role != "embedding":
            raise PlanError(
                f"Weight {choice.name!r} is stored as {stored.format.name} in source {choice.source!r}.",
                remedy=f"A {slot.role} must be floating: choose another source for it.",
            )
        is_multiplied = self._is_multiplied(slot)
        activation = self.activation if is_multiplied else None
        quantize_to, backend = self._quantize_to(slot, choice, stored), self.devices.backend(device)
        coded_bytes = self._coded_bytes(slot, quantize_to or stored.format, backend) if is_multiplied else None
        is_widened = (INT4 in stored.format.layouts and stored.bits in (2, 3)) and not (
            activation is not None and self._keeps_bits(slot, stored.bits, stored.block, backend)
        )
        return PlannedWeight(slot, choice, source, stored, quantize_to, activation, is_widened, coded_bytes, device)

    def _quantize_to(self, slot: Slot, choice: Choice, stored: StoredWeight) -> WritableFormat | None:
        """`load_in_8bit` and `load_in_4bit` concern wide linear weights that no rule names; the head stays wide."""
        if choice.rule is not None or not stored.is_wide or not slot.is_linear or slot.role == "head":
            return None
        if self._inference.load_in_8bit:
            return writable_format("int8")
        return writable_format("int4") if self._inference.load_in_4bit else None
