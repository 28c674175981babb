"""Sources that are derived: made from the base checkpoint where their folders do not exist yet.

In: settings. Out: folders. Must never know: how a weight is rounded.
"""

from __future__ import annotations

from pathlib import Path

from amalgam.base.locks import FileLock
from amalgam.checkpoint.hub import resolve
from amalgam.composition.progress import Progress, waiting_for
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.composition.quantizing.report import QuantizeReport
from amalgam.config.settings import Settings
from amalgam.errors import CheckpointError
from amalgam.formats.grid import QuantizeOptions


def ensure_derived(settings: Settings, progress: Progress | None = None) -> list[QuantizeReport]:
    """Make the sources under `mixed_precision.derived` whose folders do not exist yet, from the base checkpoint.

    One that another process is making is waited for; what a killed one has made of it is gone on from.
    """
    mixed = settings.model.mixed_precision
    reports = []
    for name, derived in mixed.derived.items():
        folder = Path(mixed.sources[name]).expanduser()
        if folder.exists():
            continue
        with FileLock(folder) as lock:
            try:
                lock.acquire(waiting_for(folder, lock, progress))
            except OSError as error:
                raise CheckpointError(
                    f"{folder} cannot be written ({error}).", remedy="Check space and permissions."
                ) from error
            if not folder.exists():
                options = QuantizeOptions(derived.group_size, derived.scale)
                base = str(resolve(settings.model.base_path))
                # A source is asked for weights of the model only; draft layers, which stay wide, can be as large as it.
                report = quantize_checkpoint(
                    base, folder, derived.format, options, progress, carries_others=False, lock=lock
                )
                reports.append(report)
    return reports
