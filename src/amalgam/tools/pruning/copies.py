"""Copies of a model in other precisions, for plans to choose from: made once, and kept.

In: a wide checkpoint, formats. Out: folders. Must never know: what they are compared with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from amalgam.base.files import writing
from amalgam.base.locks import FileLock
from amalgam.composition.progress import Progress, waiting_for
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.composition.wide import WideModel
from amalgam.formats.registry import writable_format
from amalgam.kernels.weights import PackedWeight
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.version import __version__


def make_copies(
    model: WideModel, formats: Sequence[str], folder: Path, progress: Progress | None = None
) -> Mapping[str, Path]:
    """Format → its copy, rounded to nearest.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    identities = [model.source.identity(model.source.weights[name]) for name in model.slots]
    digest = hashlib.sha256(repr((identities, __version__)).encode()).hexdigest()[:16]
    copies = {name: folder / f"{name}-{digest}" for name in formats}
    for name, copy in copies.items():
        if copy.exists():
            continue
        with writing(copy), FileLock(copy) as lock:
            lock.acquire(waiting_for(copy, lock, progress))
            if not copy.exists():
                checkpoint = str(model.source.folder)
                quantize_checkpoint(checkpoint, copy, name, progress=progress, carries_others=False, lock=lock)
    return copies


def rounded(values: Tensor, format_name: str) -> PackedWeight:
    """A weight as its copy would hold it."""
    target = writable_format(format_name)
    return target.pack(quantize(values, target, round_to_nearest))
