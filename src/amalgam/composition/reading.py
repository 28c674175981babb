"""Planned weights → packed weights, in threads, from the packed cache where there is one.

In: planned weights. Out: packed weights by slot. Must never know: versions, rules.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch

from amalgam.base.threads import map_in_threads
from amalgam.checkpoint.shards import Identity
from amalgam.composition.packed_cache import PackedCache
from amalgam.composition.planned import PlannedWeight
from amalgam.composition.progress import LOADING, Progress, Turn, waiting_for
from amalgam.config.inference import InferenceSettings
from amalgam.kernels.backends import Backend, why_not_compiled
from amalgam.kernels.devices import uploading
from amalgam.kernels.weights import PackedWeight

logger = logging.getLogger("amalgam.models")
Keep = Callable[[PlannedWeight, PackedWeight], PackedWeight | None]


class WeightReader:
    """Reads and packs; writes into the packed cache what it has not found there, unless it lies on another device.

    Args:
        backend_of: who prepares a weight, by `PlannedWeight.device`.
    """

    def __init__(self, backend_of: Callable[[str | None], Backend], threads: int, cache_folder: Path | None) -> None:
        self._backend_of = backend_of
        self._threads = threads
        self._cache_folder = cache_folder

    def read(
        self, planned: Sequence[PlannedWeight], progress: Progress | None, turn: Turn = nullcontext
    ) -> dict[str, PackedWeight]:
        """The weights by slot, from the packed cache where there is one and it has them.

        Args:
            turn: entered by the thread that reads a weight, for as long as it does.
        """
        cached = [weight for weight in planned if self._cache_folder is not None and weight.device is None]
        others = [weight for weight in planned if self._cache_folder is None or weight.device is not None]
        if self._cache_folder is None or not cached:
            return _only(self._read(others, _Tally(others, progress), turn))
        cache = PackedCache(self._cache_folder)
        keys = {weight.slot.name: weight.cache_key for weight in cached}
        found = self._find(cache, cached, keys)
        missing = [weight for weight in cached if weight.slot.name not in found]
        tally = _Tally([*missing, *others], progress)
        if missing:
            found |= self._fill(cache, missing, keys, tally, turn)
        num_bytes = sum(weight.nbytes for weight in found.values() if weight.is_mapped)
        logger.info(
            "packed cache %s: %d of %d weights were there, %d MiB are mapped",
            cache.folder,
            len(cached) - len(missing),
            len(cached),
            num_bytes >> 20,
        )
        return {**found, **_only(self._read(others, tally, turn))}

    def _find(
        self, cache: PackedCache, planned: Sequence[PlannedWeight], keys: Mapping[str, str]
    ) -> dict[str, PackedWeight]:
        found = {w.slot.name: cache.find(keys[w.slot.name], w.slot.shape, w.activation) for w in planned}
        return _only(found)

    def _fill(
        self,
        cache: PackedCache,
        missing: Sequence[PlannedWeight],
        keys: Mapping[str, str],
        tally: _Tally,
        turn: Turn,
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
                    lock.acquire(waiting_for(cache.folder, lock, tally.progress))
                cache.open_files()
                found = self._find(cache, missing, keys)
                tally.skip(found)
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

                weights = _only(self._read(missing, tally, turn, keep))
                for file in files.values():
                    file.commit()
        except OSError as error:
            logger.warning("The packed cache in %s cannot be written (%s); going on without.", cache.folder, error)
            return found | _only(self._read(missing, tally, turn))
        written = [weight for weight in missing if weight.slot.name not in weights]
        weights |= self._find(cache, written, keys)
        lost = [weight for weight in missing if weight.slot.name not in weights]
        return {**found, **weights, **_only(self._read(lost, tally, turn))}

    def _read(
        self, planned: Sequence[PlannedWeight], tally: _Tally, turn: Turn, keep: Keep | None = None
    ) -> dict[str, PackedWeight | None]:
        """Read and pack in threads; slot → what `keep` makes of the packed weight."""

        def load(weight: PlannedWeight) -> PackedWeight | None:
            backend = self._backend_of(weight.device)
            with turn(), uploading(backend.device):
                packed = weight.load(backend)
                kept = packed if keep is None else keep(weight, packed)
            tally.add(weight)
            return kept

        loaded = map_in_threads(load, planned, self._threads, "load")
        return dict(zip((weight.slot.name for weight in planned), loaded, strict=True))


class _Tally:
    """How far reading has come, in one or several goes: each weight counts once.

    Attributes:
        progress: who is told.
    """

    def __init__(self, planned: Sequence[PlannedWeight], progress: Progress | None) -> None:
        self.progress = progress
        self._left = {weight.slot.name: weight.stored.nbytes for weight in planned}
        self._done, self._total = 0, sum(self._left.values())
        self._lock = threading.Lock()

    def add(self, weight: PlannedWeight) -> None:
        """It has been read; any thread."""
        with self._lock:
            nbytes = self._left.pop(weight.slot.name, None)
            if nbytes is not None and self.progress is not None:
                self._done += nbytes
                self.progress(LOADING, self._done, self._total)

    def skip(self, slots: Iterable[str]) -> None:
        """These need not be read any more."""
        self._total -= sum(self._left.pop(slot, 0) for slot in slots)


def packed_cache_folder(inference: InferenceSettings, device: torch.device) -> Path | None:
    """Where the packed cache is; None, with a warning if it was asked for, where there can be none."""
    if not inference.packed_cache:
        return None
    reason = why_not_compiled(device)
    if reason is not None:
        logger.warning("inference.packed_cache is not used: %s", reason)
        return None
    return Path(inference.packed_cache).expanduser().absolute()


def _by_source(weights: Sequence[PlannedWeight]) -> dict[int, list[PlannedWeight]]:
    result: dict[int, list[PlannedWeight]] = {}
    for weight in weights:
        result.setdefault(id(weight.source), []).append(weight)
    return result


def _only(weights: Mapping[str, PackedWeight | None]) -> dict[str, PackedWeight]:
    return {slot: weight for slot, weight in weights.items() if weight is not None}


def _check_room(folder: Path, nbytes: int) -> None:
    """Raise OSError where the disk is too full, before hours of packing rather than after them."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OSError(errno.ENOSPC, f"{nbytes} bytes are needed and {free} are free")


def _files_of(weights: Sequence[PlannedWeight]) -> list[Identity]:
    """The checkpoint files that weights come from, as they were when their bytes were named."""
    return sorted({identity for weight in weights for identity in weight.source.files_of(weight.stored)})
