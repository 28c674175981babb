"""The composition root: settings in, a running model out, with live changes of its weights.

What the server, the command line and the Python interface use. Must never know: HTTP, terminals, statistics.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from amalgam.base.clock import Clock
from amalgam.composition.loader import LoadedVersion, ModelLoader
from amalgam.composition.manifest import plan_manifest
from amalgam.composition.progress import Progress
from amalgam.config.settings import Rule, Settings, build_rules
from amalgam.engine.core import Engine
from amalgam.engine.generation_config import ModelDefaults, read_model_defaults
from amalgam.engine.memory import peak_memory_bytes
from amalgam.errors import ConfigError, ConflictError, PlanError, UnavailableError, describe
from amalgam.models.decoder import Decoder
from amalgam.models.routing import RoutingObserver
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion, manifest
from amalgam.text.tokenizer import Tokenizer

ObserverFactory = Callable[[ModelSpec], RoutingObserver]
MAX_REMAPS = 256  # that are remembered
MAX_UNDOS = 64


@dataclass(frozen=True)
class WeightChange:
    """One weight whose origin differs between two versions."""

    name: str
    source_before: str
    source_after: str
    format_before: str
    format_after: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class RemapResult:
    """A new weight version went live. `changed` is empty if it holds exactly the same bytes as the one before."""

    version: int
    previous_version: int
    fingerprint: str
    changed: list[WeightChange]
    num_loaded: int
    loaded_bytes: int
    shared_bytes: int
    seconds: float


@dataclass(frozen=True)
class RemapRecord:
    """One attempt to change the weights."""

    at: float  # when it ended, Unix seconds
    version: int  # in use afterwards
    previous_version: int
    num_changed: int
    loaded_bytes: int
    seconds: float
    error: str | None = None  # why it changed nothing


class Deployment:
    """A loaded model, its engine, and the rules that its weights follow now."""

    def __init__(
        self,
        settings: Settings,
        loader: ModelLoader,
        loaded: LoadedVersion,
        engine: Engine,
        tokenizer: Tokenizer,
        observer: RoutingObserver | None,
        defaults: ModelDefaults | None = None,
    ) -> None:
        self.settings = settings
        self.defaults = defaults or ModelDefaults()
        self.engine = engine
        self.tokenizer = tokenizer
        self.observer = observer
        self.loaded_seconds = loaded.seconds
        self._loader = loader
        self._version = loaded.version
        self._rules = settings.model.mixed_precision.all_rules
        self._remap, self._digest = threading.Lock(), threading.Lock()
        self._remaps: deque[RemapRecord] = deque(maxlen=MAX_REMAPS)
        self._clock = Clock()
        self._is_closing = threading.Event()
        self._earlier_rules: deque[tuple[Rule, ...]] = deque(maxlen=MAX_UNDOS)  # the latest last

    @classmethod
    def open(
        cls, settings: Settings, observer: ObserverFactory | None = None, progress: Progress | None = None
    ) -> Deployment:
        """Load the model and start its engine.

        Args:
            observer: makes what sees the expert routing, given the model's spec.
            progress: called while weights load.

        Raises:
            AmalgamError: whatever is wrong with settings, checkpoints or plan, before anything is half loaded.
        """
        if settings.engine.num_threads is not None:
            torch.set_num_threads(settings.engine.num_threads)
        device = choose_device(settings.inference.device_map)
        dtype: torch.dtype = getattr(torch, settings.inference.dtype)
        loader = ModelLoader(settings.model, settings.inference, device, settings.engine.load_threads)
        planned = loader.plan()  # before anything that takes longer
        tokenizer = Tokenizer.load(loader.base_folder, loader.base_metadata)
        tokenizer.check_vocabulary(loader.spec.vocab_size)
        defaults = read_model_defaults(loader.base_folder, loader.base_metadata)
        # Before the weights: what it keeps its figures in may not fit, or be somebody else's.
        watcher = observer(loader.spec) if observer is not None and loader.spec.num_experts else None
        with ExitStack() as on_failure:
            if watcher is not None:
                on_failure.callback(watcher.close)
            loaded = loader.build(planned, version_id=1, progress=progress)
            max_positions = min(settings.inference.max_seq_length, loader.spec.max_positions)
            settings = settings.replace(inference={**settings.inference.model_dump(), "max_seq_length": max_positions})
            decoder = Decoder(loader.spec, max_positions, dtype, device)
            engine = Engine(decoder, loaded.version, tokenizer, settings, device, dtype, watcher)
            on_failure.pop_all()
        engine.start()
        return cls(settings, loader, loaded, engine, tokenizer, watcher, defaults)

    @property
    def spec(self) -> ModelSpec:
        return self._loader.spec

    @property
    def version(self) -> WeightVersion:
        """The newest weight version, which new requests start on."""
        return self._version

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self._rules

    @property
    def configured_rules(self) -> tuple[Rule, ...]:
        """The rules that a restart would begin with."""
        return self.settings.model.mixed_precision.all_rules

    @property
    def num_undoable(self) -> int:
        """How many changes of the rules `undo_weight_mapping` can take back, one after the other."""
        return len(self._earlier_rules)

    @property
    def remaps(self) -> list[RemapRecord]:
        """The latest attempts to change the weights, oldest first."""
        shift = self._clock.shift()
        return [replace(record, at=record.at + shift) for record in list(self._remaps)]

    @property
    def model_name(self) -> str:
        return self.settings.model.name or self._loader.base_folder.name

    def update_weight_mapping(self, mapping: Mapping[str, str]) -> RemapResult:
        """Add rules (name or pattern → source), build a new version and let new requests start on it.

        Requests in flight finish on their version. A rule for a pattern that has one already replaces it. Blocking.

        Raises:
            ConflictError: another change is under way.
            PlanError, CheckpointError: the mapping cannot be fulfilled; nothing has changed.
        """
        if not mapping:
            raise PlanError("weight_mapping is empty.", remedy="Give at least one name or pattern and its source.")
        kept = tuple(rule for rule in self._rules if rule.pattern not in mapping)
        added = build_rules(mapping)
        with self._changing():
            before = self._rules
            result = self._go_live(self._loader, (*kept, *added))
            self._earlier_rules.append(before)
            return result

    def undo_weight_mapping(self, version_id: int) -> RemapResult:
        """Go back to the rules before the latest `update_weight_mapping`. Blocking.

        Args:
            version_id: the version in use, as the caller knows it: a change by somebody else is not taken back.

        Raises:
            ConflictError: another version is in use, or there is nothing to take back.
            PlanError, CheckpointError: the earlier rules cannot be fulfilled any more; nothing has changed.
        """
        with self._changing():
            if version_id != self._version.version_id:
                raise ConflictError(
                    f"Weight version {version_id} is not in use any more: {self._version.version_id} is.",
                    remedy="Look at what has changed since, then undo that version.",
                )
            if not self._earlier_rules:
                raise ConflictError(
                    "No change of the weight mapping is left to undo.",
                    remedy=f"The last {MAX_UNDOS} changes since the start can be taken back, one after the other.",
                )
            result = self._go_live(self._loader, self._earlier_rules[-1])
            self._earlier_rules.pop()
            return result

    def planned_bytes(self, mapping: Mapping[str, str]) -> tuple[int, int]:
        """What the named weights take now, and what they would take from the given sources. Reads headers.

        Args:
            mapping: logical names, no patterns → sources.

        Raises:
            PlanError, CheckpointError: see `ModelLoader.planned_bytes`.
        """
        after = self._loader.planned_bytes(mapping)
        version = self._version
        sizes = {origin.name: version[slot].nbytes for slot, origin in version.origins.items()}
        return sum(sizes[name] for name in mapping), after

    def reload_weights(self) -> RemapResult:
        """Build a new version under the same rules from the files as they are now; unchanged weights are shared.

        Raises:
            ConflictError: another change is under way.
            PlanError, CheckpointError: the files do not fit any more; nothing has changed.
        """
        with self._changing():
            return self._go_live(self._loader.reopen(), self._rules)

    def model_info(self) -> dict[str, Any]:
        """What `GET /model_info` answers: architecture, sizes, sources, weights and bytes by precision, memory."""
        spec, version = self.spec, self._version
        by_format: dict[str, dict[str, int]] = defaultdict(lambda: {"weights": 0, "parameters": 0, "bytes": 0})
        by_source: dict[str, dict[str, int]] = defaultdict(lambda: {"weights": 0, "bytes": 0})
        for slot, origin in version.origins.items():
            for row in (by_format[origin.format], by_source[origin.source]):
                row["weights"] += 1
                row["bytes"] += version[slot].nbytes
            by_format[origin.format]["parameters"] += math.prod(origin.shape)
        status = self.engine.status()
        attention = spec.layers[0].attention
        return {
            "model": self.model_name,
            "architecture": self._loader.family.architectures[0],
            "family": spec.family,
            "sizes": {
                "layers": spec.num_layers,
                "moe_layers": len(spec.moe_layer_ids),
                "hidden_size": spec.hidden_size,
                "vocab_size": spec.vocab_size,
                "experts_per_layer": spec.num_experts,
                "active_experts_per_token": spec.num_active_experts,
                "kv_heads": attention.kv_shape[0],
                "max_seq_length": self.settings.inference.max_seq_length,
            },
            "parameters": {"total": spec.num_parameters, "active_per_token": spec.num_active_parameters},
            "sources": {
                name: {"path": path, **by_source.get(name, {"weights": 0, "bytes": 0})}
                for name, path in self._loader.sources.items()
            },
            "precisions": dict(by_format),
            "rules": [rule.model_dump() for rule in self._rules],
            "sampling_defaults": self.defaults.as_json(),
            "default_source": self.settings.model.mixed_precision.default_source,
            "weight_version": {
                "version": version.version_id,
                "fingerprint": version.fingerprint,
                "requests_by_version": {str(key): count for key, count in status.versions.items()},
            },
            "memory": {
                "weights_bytes": version.nbytes,
                "mapped_bytes": version.mapped_bytes,
                "kv_cache_bytes": self.engine.kv_cache_bytes,
                "process_peak_bytes": peak_memory_bytes(),
            },
            "kv_blocks": {"total": status.num_blocks, "free": status.num_free_blocks},
            "device": str(self._loader.device),
            "dtype": self.settings.inference.dtype,
            "compute_threads": torch.get_num_threads(),
            "kernels": self.engine.kernels,
            "load_seconds": round(self.loaded_seconds, 3),
        }

    def manifest(self, *, sha256: bool = False) -> dict[str, Any]:
        """Where every weight of the newest version came from, and the layout that it has in memory.

        Args:
            sha256: with digests of the files' bytes, all of which are read. Blocking.

        Raises:
            CheckpointError: a file has changed since the version was built from it.
            ConflictError: digests are being computed already.
        """
        version, loader, rules = self._version, self._loader, self._rules
        document = self._digested(loader, rules) if sha256 else manifest(version.fingerprint, version.origins)
        for weight in document["weights"]:
            weight["layout"] = version[weight["slot"]].layout.name
        return {"version": version.version_id, **document}

    def _digested(self, loader: ModelLoader, rules: tuple[Rule, ...]) -> dict[str, Any]:
        if not self._digest.acquire(blocking=False):
            raise ConflictError("Digests are being computed already.", remedy="Try again when they are done.")
        try:
            planned = loader.plan(rules)
            return plan_manifest(planned, self.settings.engine.load_threads, self._unless_closing)
        finally:
            self._digest.release()

    def close(self) -> None:
        """Stop the engine; requests that still run end with an error, and a change of the weights under way too.

        Statistics that are to be kept are saved.
        """
        self._is_closing.set()
        self.engine.stop()
        if self.observer is not None:
            self.observer.close()

    def _unless_closing(self, what: str, done: int, total: int) -> None:
        """A `Progress` that ends long work when nobody wants it any more."""
        if self._is_closing.is_set():
            raise UnavailableError("The model has been closed.", remedy="Open it again.")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Refuses instead of waiting: the second of two re-maps must not silently follow the first."""
        if not self._remap.acquire(blocking=False):
            raise ConflictError("Another change of the weights is under way.", remedy="Try again when it is done.")
        started, version_id = time.monotonic(), self._version.version_id
        try:
            yield
        except Exception as error:
            seconds = time.monotonic() - started
            reason = describe(str(error), 400)
            self._remaps.append(RemapRecord(self._clock.now(), version_id, version_id, 0, 0, seconds, reason))
            raise
        finally:
            self._remap.release()

    def _go_live(self, loader: ModelLoader, rules: tuple[Rule, ...]) -> RemapResult:
        started = time.monotonic()
        before = self._version
        loaded = loader.build(loader.plan(rules), before.version_id + 1, before, self._unless_closing)
        after = loaded.version
        changed = [
            WeightChange(
                after.origins[slot].name,
                before.origins[slot].source,
                after.origins[slot].source,
                before.origins[slot].format,
                after.origins[slot].format,
                before[slot].nbytes,
                after[slot].nbytes,
            )
            for slot in after.keys
            if after.keys[slot] != before.keys[slot]
        ]
        self.engine.set_version(after)
        self._loader, self._version, self._rules = loader, after, rules
        result = RemapResult(
            version=after.version_id,
            previous_version=before.version_id,
            fingerprint=after.fingerprint,
            changed=changed,
            num_loaded=loaded.num_loaded,
            loaded_bytes=loaded.loaded_bytes,
            shared_bytes=loaded.shared_bytes,
            seconds=time.monotonic() - started,
        )
        self._remaps.append(
            RemapRecord(
                self._clock.now(),
                result.version,
                result.previous_version,
                len(changed),
                result.loaded_bytes,
                result.seconds,
            )
        )
        return result


def choose_device(device_map: str) -> torch.device:
    """`auto` takes CUDA if there is one.

    Raises:
        ConfigError: the asked-for CUDA device does not exist.
    """
    if device_map == "cpu" or (device_map == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(device_map.partition(":")[2] or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ConfigError(
            f"inference.device_map is {device_map!r}, and {torch.cuda.device_count()} CUDA devices are visible.",
            remedy="Choose cpu or auto, or install a CUDA build of PyTorch.",
        )
    return torch.device("cuda", index)
