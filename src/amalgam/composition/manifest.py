"""The provenance manifest of a plan, before anything is loaded.

In: a checked plan. Out: JSON: for every weight its source, file, offset, bytes, format, the rule that chose it, and on
request the SHA-256 of its bytes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from amalgam.base.collector import collector_paused
from amalgam.base.threads import map_in_threads
from amalgam.composition.planned import PlannedWeight
from amalgam.composition.progress import Progress
from amalgam.models.weights import fingerprint, manifest


@collector_paused()
def plan_manifest(
    planned: Sequence[PlannedWeight], digest_threads: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """The manifest that a version built from `planned` will have, fingerprint included.

    Args:
        digest_threads: hash every tensor with so many threads; None: no digests.

    Raises:
        CheckpointError: a file has changed since it was opened.
    """
    origins = {weight.slot.name: weight.origin for weight in planned}
    keys = {weight.slot.name: weight.key for weight in planned}
    digests = None if digest_threads is None else _digest_all(planned, digest_threads, progress)
    return manifest(fingerprint(origins, keys), origins, digests)


def _digest_all(planned: Sequence[PlannedWeight], threads: int, progress: Progress | None) -> dict[str, str]:
    total = sum(weight.stored.nbytes for weight in planned)
    done = 0
    lock = threading.Lock()

    def digest(weight: PlannedWeight) -> list[tuple[str, str]]:
        nonlocal done
        digests = []
        for part, stored in zip(weight.origin.parts, weight.stored.parts.values(), strict=True):
            tensor = weight.source.read(stored)
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            digests.append((part.key, hashlib.sha256(raw.data).hexdigest()))
            weight.source.release(stored)
        if progress is not None:
            with lock:
                done += weight.stored.nbytes
                progress("Hashing", done, total)
        return digests

    return dict(chain.from_iterable(map_in_threads(digest, planned, threads, "digest")))
