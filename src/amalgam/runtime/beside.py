"""Versions that a start makes beside the current one: plans that the configuration names, and what was kept before.

In: settings, what a history has kept. Out: versions with names and pins, planned all together before a weight is read,
then loaded. Must never know: requests, HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from amalgam.composition.loader import LoadedVersion, ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.composition.progress import Progress
from amalgam.config.names import MAX_KEPT
from amalgam.config.placement import Rule, build_rules
from amalgam.config.settings import Settings
from amalgam.engine.memory import available_bytes
from amalgam.errors import AmalgamError, CheckpointError, OutOfMemoryError
from amalgam.models.weights import WeightVersion
from amalgam.runtime.history import HistoryFile
from amalgam.runtime.preview import Contents, Load
from amalgam.runtime.served import ServedWeights, shared_weights

logger = logging.getLogger("amalgam.runtime")


@dataclass(frozen=True)
class PlannedBeside:
    """A version that is to be made.

    Attributes:
        version_id: of these very weights in a former process; None: they have had no number.
        is_declared: in the configuration.
    """

    names: tuple[str, ...]
    is_pinned: bool
    rules: tuple[Rule, ...]
    planned: Sequence[PlannedWeight]
    version_id: int | None = None
    is_declared: bool = False


@dataclass(frozen=True)
class KeptBeside:
    """A version that has been made.

    Attributes:
        is_new: its number is.
    """

    served: ServedWeights
    loaded: LoadedVersion
    names: tuple[str, ...]
    is_pinned: bool
    is_new: bool


def plan_beside(
    settings: Settings, loader: ModelLoader, current: Sequence[PlannedWeight], history: HistoryFile | None
) -> list[PlannedBeside]:
    """All versions beside the current one: those of `weights.named`; then, of a history that is to be resumed, what is
    left of those that had other names or were pinned. What is not there any more, or does not fit, is told in the log.

    Args:
        current: what the current version is made of.

    Raises:
        AmalgamError: a version of `weights.named` cannot be made, or does not fit into memory.
    """
    memory = _Memory(settings, loader)
    memory.take(current)
    found = []
    declared = {name: build_rules(mapping) for name, mapping in settings.weights.named.items()}
    for name, rules in declared.items():
        try:
            planned = loader.plan(rules)
            memory.check(planned)
        except AmalgamError as error:
            raise type(error)(f"weights.named.{name}: {error.what}", remedy=error.remedy) from None
        memory.take(planned)
        found.append(PlannedBeside((name,), False, rules, planned, is_declared=True))
    if history is not None and settings.weights.resume:
        for beside in _kept_before(loader, history, declared):
            try:
                memory.check(beside.planned)
            except AmalgamError as error:
                _warn(beside.names, beside.version_id, error)
                continue
            if len(found) == MAX_KEPT:
                _warn(beside.names, beside.version_id, f"{MAX_KEPT} versions are kept already")
                continue
            memory.take(beside.planned)
            found.append(beside)
    return found


def build_beside(
    planned: Sequence[PlannedBeside],
    loader: ModelLoader,
    current: WeightVersion,
    next_id: int,
    progress: Progress | None = None,
) -> list[KeptBeside]:
    """Load what they have not in common with each other and the current one. Blocking.

    A version that only a history has and that cannot be read after all is left, and told in the log.

    Args:
        next_id: the first number that no version has had.

    Raises:
        CheckpointError, OutOfMemoryError: see `ModelLoader.build`.
    """
    versions, found = [current], []
    for beside in planned:
        version_id = next_id if beside.version_id is None else beside.version_id
        next_id += beside.version_id is None
        shared = shared_weights(beside.planned, *versions)
        try:
            loaded = loader.build(beside.planned, version_id, shared, progress)
        except (CheckpointError, OutOfMemoryError) as error:
            if beside.is_declared:
                raise
            _warn(beside.names, beside.version_id, error)
            continue
        versions.append(loaded.version)
        served = ServedWeights(loader, loaded.version, beside.rules)
        found.append(KeptBeside(served, loaded, beside.names, beside.is_pinned, beside.version_id is None))
    return found


def _kept_before(
    loader: ModelLoader, history: HistoryFile, declared: Mapping[str, tuple[Rule, ...]]
) -> Iterator[PlannedBeside]:
    """What the process before kept, as far as its rules can be fulfilled.

    A version keeps its number if it would be the same weights. A name stands for rules: the files may have changed.
    A pin stands for the weights.

    Args:
        declared: names whose rules are given, whatever they stood for.
    """
    kept = history.last_kept
    for version_id in kept.version_ids:
        record = next((r for r in reversed(history.records) if r.version == version_id and r.rules is not None), None)
        called = [name for name, named_id in kept.named.items() if named_id == version_id]
        names, is_pinned = tuple(name for name in called if name not in declared), version_id in kept.pinned
        for name in set(called) - set(names):
            if record is not None and record.rules != declared[name]:
                logger.warning("weights.named.%s holds: version %d had other rules", name, version_id)
        if not names and not is_pinned:
            continue
        if record is None or record.rules is None:
            _warn(names, version_id, "nobody knows its rules any more")
            continue
        try:
            planned = loader.plan(record.rules)
        except AmalgamError as error:
            _warn(names, version_id, error)
            continue
        if Contents.planned(planned).fingerprint == record.fingerprint:
            yield PlannedBeside(names, is_pinned, record.rules, planned, version_id)
            continue
        if is_pinned:
            _warn((), version_id, "the files have changed, and it was pinned as it was")
        if names:
            yield PlannedBeside(names, False, record.rules, planned)


def _warn(names: Sequence[str], version_id: int | None, reason: object) -> None:
    called = f", called {', '.join(names)}," if names else ""
    what = "a version" if version_id is None else f"version {version_id}"
    logger.warning("weights.resume: %s%s is not there any more: %s", what, called, reason)


class _Memory:
    """What is left of the memory while versions are planned that share what they have in common."""

    def __init__(self, settings: Settings, loader: ModelLoader) -> None:
        self._loader = loader
        self._num_threads = settings.engine.num_load_threads
        self._available = available_bytes(loader.device) - (settings.engine.kv_cache_bytes or 0)
        self._taken: set[tuple[str, object]] = set()

    def check(self, planned: Sequence[PlannedWeight]) -> None:
        """
        Raises:
            OutOfMemoryError: they do not fit.
        """
        self._load(planned).check_room(max(0, self._available))

    def take(self, planned: Sequence[PlannedWeight]) -> None:
        self._available -= self._load(planned).new_bytes
        self._taken.update((weight.slot.name, weight.key) for weight in planned)

    def _load(self, planned: Sequence[PlannedWeight]) -> Load:
        missing = [weight for weight in planned if (weight.slot.name, weight.key) not in self._taken]
        return Load.of(missing, self._loader, self._num_threads)
