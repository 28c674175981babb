"""Settings → a running model.

In: settings. Out: a `Deployment`, with derived sources made, weights loaded, experts watched and the engine started.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.composition.progress import Progress
from amalgam.config.placement import Rule
from amalgam.config.settings import Settings
from amalgam.engine.core import Engine
from amalgam.engine.generation_config import read_model_defaults
from amalgam.errors import AmalgamError, ConfigError
from amalgam.experts.overview import drift
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.decoder import Decoder
from amalgam.models.spec import ModelSpec
from amalgam.runtime.autoplan import open_proposer
from amalgam.runtime.beside import build_beside, plan_beside
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.derive import ensure_derived
from amalgam.runtime.describe import multiplies_integers
from amalgam.runtime.device import choose_device
from amalgam.runtime.history import HistoryFile
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.speculation import check_draft, check_together, open_speculation
from amalgam.runtime.threads import set_threads
from amalgam.text.files import read_template
from amalgam.text.tokenizer import Tokenizer

logger = logging.getLogger("amalgam.runtime")


def open_deployment(settings: Settings, progress: Progress | None = None) -> Deployment:
    """Make the sources that are to be derived, load the model, watch its experts and start its engine. Blocking.

    Args:
        progress: called while sources are made and weights load; what it raises ends that.

    Raises:
        AmalgamError: whatever is wrong with settings, checkpoints or plan, before anything is half loaded.
    """
    check_together(settings.speculation)
    ensure_derived(settings, progress)
    set_threads(settings.engine)
    device = choose_device(settings.inference.device_map)
    dtype: torch.dtype = getattr(torch, settings.inference.dtype)
    loader = ModelLoader(settings.model, settings.inference, device, settings.engine.num_load_threads)
    if settings.inference.activation == "auto" and multiplies_integers(settings.inference.dtype, device):
        logger.info("inference.activation: %s, chosen by the model's kind and size", loader.activation)
    with ExitStack() as on_failure:
        history = _open_history(settings)
        if history is not None:
            on_failure.callback(history.close)
        rules, planned = _first_plan(settings, loader, history)  # before anything that takes longer
        beside = plan_beside(settings, loader, planned, history)
        template = read_template(Path(settings.server.chat_template)) if settings.server.chat_template else None
        tokenizer = Tokenizer.load(loader.base_folder, loader.base_metadata, template)
        tokenizer.check_vocabulary(loader.spec.vocab_size)
        check_draft(settings, loader, tokenizer)
        defaults = read_model_defaults(loader.base_folder, loader.base_metadata)
        proposer = open_proposer(settings, loader)
        # Before the weights: what it keeps its figures in may not fit, or be somebody else's.
        tracker = _open_tracker(settings, loader.spec)
        if tracker is not None:
            on_failure.callback(tracker.close)
        version_id = 1 if history is None else history.last_version_id + 1
        loaded = loader.build(planned, version_id, progress=progress)
        kept = build_beside(beside, loader, loaded.version, version_id + 1, progress)
        max_positions = min(settings.inference.max_seq_length, loader.spec.max_positions)
        if max_positions < settings.inference.max_seq_length:
            logger.info("inference.max_seq_length: %d, which is all that the model has", max_positions)
        settings = settings.replace(inference={**settings.inference.model_dump(), "max_seq_length": max_positions})
        decoder = Decoder(loader.spec, max_positions, dtype, device)
        speculation = open_speculation(settings, loader, loaded.version, device, progress)
        speculator = None if speculation is None else speculation.speculator
        engine = Engine(decoder, loaded.version, tokenizer, settings, device, dtype, tracker, speculator)
        if speculation is not None and rules != settings.model.mixed_precision.all_rules:
            speculation.follow(loader, rules, loaded.version, progress)
        served = ServedWeights(loader, loaded.version, rules)
        deployment = Deployment(
            settings, served, loaded, engine, tokenizer, tracker, defaults, proposer, speculation, history, kept
        )
        on_failure.pop_all()
    engine.start()
    if deployment.autoplan is not None:
        deployment.autoplan.start()
    return deployment


def _open_history(settings: Settings) -> HistoryFile | None:
    """
    Raises:
        ConfigError, ConflictError: `weights.history` or `weights.resume` cannot be used.
    """
    if settings.weights.history:
        return HistoryFile(Path(settings.weights.history))
    if settings.weights.resume:
        raise ConfigError("weights.resume is true, and weights.history is empty.", remedy="Name a file there.")
    return None


def _first_plan(
    settings: Settings, loader: ModelLoader, history: HistoryFile | None
) -> tuple[tuple[Rule, ...], list[PlannedWeight]]:
    """The rules to begin with: the last ones in use where that is wanted and they can still be fulfilled."""

    def plan(rules: tuple[Rule, ...]) -> tuple[tuple[Rule, ...], list[PlannedWeight]]:
        planned = loader.plan(rules)
        loader.devices.check_there(planned)
        return rules, planned

    configured = settings.model.mixed_precision.all_rules
    last = history.last_rules if history is not None and settings.weights.resume else None
    if last is None or last == configured:
        return plan(configured)
    try:
        return plan(last)
    except AmalgamError as error:
        logger.warning("weights.resume: the last rules cannot be fulfilled, the configured ones hold: %s", error)
        return plan(configured)


def _open_tracker(settings: Settings, spec: ModelSpec) -> ExpertTracker | None:
    """
    Raises:
        ConfigError, CheckpointError, ConflictError: `statistics.reference` or `statistics.file` cannot be used.
    """
    if not settings.statistics.enabled or not spec.num_experts:
        return None
    model = settings.model.name or Path(settings.model.base_path).name
    tracker = ExpertTracker(
        spec.moe_layer_ids, spec.expert_counts, spec.num_active_experts, settings.statistics, model=model
    )
    if settings.statistics.reference:
        _check_reference(tracker)
    if settings.statistics.file:
        tracker.autosave_to(Path(settings.statistics.file))
    return tracker


def _check_reference(tracker: ExpertTracker) -> None:
    """
    Raises:
        ConfigError: `statistics.reference` cannot be used.
    """
    try:
        drift(tracker)  # reads the reference and keeps it: the first answer would be too late to refuse it
    except AmalgamError as error:
        raise ConfigError(
            f"statistics.reference is {tracker.settings.reference!r}, which cannot be used. {error.what}",
            remedy="Name a saved set of this model, or leave it out to compare with what was counted since the start.",
        ) from None
