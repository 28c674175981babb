"""A plan → one checkpoint folder in another engine's layout, and what that changed: what `amalgam export` calls."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from amalgam.base.counting import counted
from amalgam.base.files import check_free, partial_folder, resumable_folder, writing
from amalgam.composition.loader import ModelLoader
from amalgam.composition.progress import Progress
from amalgam.config.settings import Settings
from amalgam.errors import CheckpointError, ConfigError, UnsupportedError
from amalgam.evaluation.quality import Quality
from amalgam.evaluation.texts import read_texts
from amalgam.models.own_layers import own_layers_of
from amalgam.runtime.derive import ensure_derived
from amalgam.tools.evaluate import ALL, TextOptions, evaluate, plan_name, reference_settings
from amalgam.tools.export.contract import Change, ExportOptions, ExportReport, Job, PlannedModel, Target
from amalgam.tools.export.registry import find_target

_CPU = torch.device("cpu")
_SPARE_BYTES = 2**26  # for what stands beside the weights
_DEFAULTS = ExportOptions()
_MAX_NAMED = 3


def export_model(
    settings: Settings,
    target_name: str,
    folder: Path,
    options: ExportOptions = _DEFAULTS,
    *,
    is_strict: bool = False,
    is_dry: bool = False,
    texts: TextOptions | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the model that `settings` describe into `folder`, which appears complete or not at all.

    Args:
        is_strict: refuse what would change a weight's values.
        is_dry: decide, and write nothing.
        texts: measure on them what the export does to the plan's divergence from the base checkpoint.

    Raises:
        UnsupportedError: no such target, a family, a weight or layers that it does not know; with `is_strict` a weight
            that would change.
        ConfigError: an option that the target does not honour.
        CheckpointError: the folder is not empty, or there is no room for it.
        AmalgamError: whatever is wrong with the plan or its sources.
    """
    target = find_target(target_name)
    _check_options(target, options)
    if not is_dry:
        check_free(folder)
    if texts is not None:
        read_texts(texts.files)  # which may not be there: before anything that takes longer
    model = open_plan(settings, progress)
    _check_layers(target, model)
    job = target.prepare(model, options)
    lossy = [change for change in job.changes if not change.is_exact]
    if is_strict and lossy:
        raise UnsupportedError(
            f"{counted(len(lossy), 'weight')} would change in value in {target.name}: {_named(lossy)}.",
            remedy="Choose other sources for them, another target, or leave --strict out.",
        )
    report = ExportReport(
        folder=folder,
        target=target.name,
        model=model.name,
        is_written=False,
        nbytes=job.nbytes,
        plan_bytes=sum(weight.nbytes for weight in model.planned),
        changes=tuple(job.changes),
        notes=tuple(job.notes),
    )
    if is_dry:
        return report
    _check_space(folder, job)
    with resumable_folder(folder, job.has_begun) as unfinished, writing(folder):
        written = job.write(unfinished, progress)
    return replace(
        report,
        is_written=True,
        nbytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        left_out=tuple(written.left_out),
        notes=(*report.notes, *written.notes),
        divergence={} if texts is None else _divergence(settings, folder, texts, progress),
    )


def open_plan(settings: Settings, progress: Progress | None = None, device: torch.device = _CPU) -> PlannedModel:
    """Open and check a plan; makes derived sources first.

    Args:
        device: where it would be loaded.

    Raises:
        AmalgamError: whatever is wrong with it.
    """
    ensure_derived(settings, progress)
    loader = ModelLoader(settings.model, settings.inference, device, settings.engine.num_load_threads)
    return PlannedModel(plan_name(settings), settings, loader, tuple(loader.plan()))


def _check_layers(target: Target, model: PlannedModel) -> None:
    """Raise UnsupportedError where layers have sizes of their own, which no other engine reads of these families."""
    config = model.base.config
    own = own_layers_of(config)
    if not own or model.family.reads_own_layers:
        return
    counts = sorted(set(model.spec.expert_counts))
    what = f"keep {counts[0]} to {counts[-1]} experts" if len(counts) > 1 else "have sizes of their own"
    raise UnsupportedError(
        f"The layers of {model.name} {what} (per_layer_config), and readers of {target.name} take one number for all.",
        remedy="Prune as much of each layer: `amalgam prune` without --per-layer.",
    )


def _check_options(target: Target, options: ExportOptions) -> None:
    for name, value in vars(options).items():
        if value != getattr(_DEFAULTS, name) and name not in target.options:
            raise ConfigError(f"--{name} has no effect on an export to {target.name}.", remedy="Leave it out.")


def _check_space(folder: Path, job: Job) -> None:
    """Raise CheckpointError unless there is room, what an earlier run has left counted in."""
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    unfinished = partial_folder(folder)
    begun = sum(file.stat().st_size for file in unfinished.glob("*")) if unfinished.is_dir() else 0
    free = shutil.disk_usage(place).free + begun
    if free < job.nbytes + _SPARE_BYTES:
        raise CheckpointError(
            f"{folder} needs {job.nbytes + _SPARE_BYTES} bytes, and {place} has {free} free.",
            remedy="Make room or choose another folder.",
        )


def _divergence(settings: Settings, folder: Path, texts: TextOptions, progress: Progress | None) -> dict[str, Quality]:
    """Of the plan and of what was written, both from the base checkpoint."""
    base = reference_settings(settings)
    model = {"name": f"{plan_name(settings)}, exported", "base_path": str(folder)}
    inference = settings.inference.model_dump() | {"load_in_8bit": False, "load_in_4bit": False}
    exported = settings.replace(model=model, inference=inference)
    plans = {"before": settings, "after": exported}
    return {when: evaluate(plan, base, texts, progress).domains[ALL] for when, plan in plans.items()}


def _named(changes: Sequence[Change]) -> str:
    more = f" and {len(changes) - _MAX_NAMED} more" if len(changes) > _MAX_NAMED else ""
    some = (f"{change.name} ({change.before} → {change.after}: {change.reason})" for change in changes[:_MAX_NAMED])
    return f"{', '.join(some)}{more}"
