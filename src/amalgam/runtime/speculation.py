"""Who guesses tokens for a model, and what becomes of that when its weights change.

In: settings, the model as it is served. Out: `Speculation`. Must never know: requests, HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amalgam.composition.loader import ModelLoader
from amalgam.composition.progress import Progress
from amalgam.config.model import ModelSettings
from amalgam.config.placement import Rule, build_rules
from amalgam.config.settings import Settings
from amalgam.config.speculation import SpeculationSettings
from amalgam.engine.memory import available_bytes
from amalgam.engine.speculation.costs import CostModel
from amalgam.engine.speculation.draft import DraftProposer
from amalgam.engine.speculation.ngram import NgramProposer
from amalgam.engine.speculation.proposer import Proposer
from amalgam.engine.speculation.speculator import Speculator
from amalgam.errors import ConfigError, UnavailableError, UnsupportedError
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache, kv_type
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion
from amalgam.runtime.served import shared_weights
from amalgam.text.tokenizer import Tokenizer

logger = logging.getLogger("amalgam.runtime")

_MEMORY_SHARE = 4  # without a setting the draft's cache takes at most one part in four of the available memory


@dataclass(frozen=True)
class Speculation:
    """What an engine guesses with."""

    speculator: Speculator
    settings: SpeculationSettings

    def follow(
        self, loader: ModelLoader, rules: Sequence[Rule], version: WeightVersion, progress: Progress | None = None
    ) -> None:
        """The model has other weights: a draft that is the model itself gets them, but for its experts.

        Never fails: a draft that cannot be made has all of the model's own weights, which takes no memory. The ones
        that it had would hold what nobody else uses any more.

        Args:
            rules: of `version`.
        """
        proposer = self.speculator.proposer
        if self.settings.kind != "self" or not isinstance(proposer, DraftProposer):
            return
        try:
            proposer.set_version(build_own_draft(self.settings, loader, rules, (version, proposer.version), progress))
            return
        except Exception as error:
            if not isinstance(error, UnavailableError):  # the model is being closed
                logger.warning("The draft has the model's own weights, whose guesses save nothing. %s", error)
        try:
            proposer.set_version(version)
        except Exception:
            logger.exception("The draft keeps the weights that it had")


def check_together(settings: SpeculationSettings) -> None:
    """
    Raises:
        ConfigError: a setting that is given does not go with the kind, or one that it needs is missing.
    """
    for name, kinds in (("draft", {"draft"}), ("source", {"self"}), ("kv_cache_bytes", {"draft", "self"})):
        value = getattr(settings, name)
        if value and settings.kind not in kinds:
            raise ConfigError(
                f"speculation.{name} is {value!r}, and speculation.kind is {settings.kind!r}.",
                remedy=f"It goes with kind {' or '.join(sorted(kinds))} only.",
            )
    if settings.kind == "draft" and not settings.draft:
        raise ConfigError("speculation.kind is 'draft', and there is none.", remedy="Name it: --draft FOLDER.")


def check_draft(settings: Settings, loader: ModelLoader, tokenizer: Tokenizer) -> None:
    """Whether a draft can guess for the model, before the weights of either are read.

    Raises:
        UnsupportedError: it has recurrent states.
        ConfigError: it has another vocabulary, is larger than the model, or would be no other than the model.
        PlanError, CheckpointError: it cannot be planned.
    """
    wanted = settings.speculation
    if wanted.kind == "self":
        _check_no_states("the model", loader.spec, wanted)
        _smaller_weights(wanted, loader, settings.model.mixed_precision.all_rules)
    elif wanted.kind == "draft":
        other = _draft_loader(settings, loader.device)
        _check_other_model(wanted.draft, other, loader.spec, tokenizer, wanted)
        other.plan()


def open_speculation(
    settings: Settings,
    loader: ModelLoader,
    version: WeightVersion,
    device: torch.device,
    progress: Progress | None = None,
) -> Speculation | None:
    """Make what guesses; None: nothing is to be guessed. Blocking: a draft is loaded, which `check_draft` has checked.

    Args:
        settings: with the sequence length that is served.
        version: the model's weights, by the configured rules.

    Raises:
        ConfigError: the draft's cache would hold nothing.
        PlanError, CheckpointError: the draft cannot be loaded.
    """
    wanted = settings.speculation
    if wanted.kind == "none":
        return None
    proposer: Proposer
    if wanted.kind == "ngram":
        proposer = NgramProposer(wanted.min_match)
    elif wanted.kind == "self":
        rules = settings.model.mixed_precision.all_rules
        draft = build_own_draft(wanted, loader, rules, (version,), progress)
        proposer = _draft_proposer(settings, loader.spec, draft, device)
    else:
        other = _draft_loader(settings, device)
        draft = other.build(other.plan(), 1, progress=progress).version
        proposer = _draft_proposer(settings, other.spec, draft, device)
    spec = loader.spec
    costs = CostModel(spec.num_experts, spec.num_active_experts) if wanted.adaptive else None
    return Speculation(Speculator(wanted.kind, proposer, wanted.num_tokens, spec.vocab_size, costs), wanted)


def draft_bytes(settings: Settings, loader: ModelLoader, num_blocks: int) -> int:
    """What a draft takes of memory beside the model: weights that the model does not have, and keys and values.

    Reads headers only.

    Args:
        num_blocks: that sequences take in the model's own KV cache.

    Raises:
        ConfigError: the settings do not go together, or the draft would be no other than the model.
        PlanError, CheckpointError: the draft cannot be planned.
    """
    wanted, spec = settings.speculation, loader.spec
    check_together(wanted)
    if wanted.kind == "self":
        rules = settings.model.mixed_precision.all_rules
        own = {weight.slot.name: weight.key for weight in loader.plan(rules)}
        planned = loader.plan((*rules, *_smaller_weights(wanted, loader, rules)))
        planned = [weight for weight in planned if own[weight.slot.name] != weight.key]
    elif wanted.kind == "draft":
        loader = _draft_loader(settings, loader.device)
        planned, spec = loader.plan(), loader.spec
    else:
        return 0
    cache_type = kv_type(settings.engine.kv_dtype, getattr(torch, settings.inference.dtype))
    kv_bytes = num_blocks * KVCache.bytes_per_block(spec, settings.engine.block_size, cache_type)
    allowed = wanted.kv_cache_bytes or settings.engine.kv_cache_bytes
    in_memory = sum(weight.memory_bytes for weight in planned if not loader.maps(weight.format))
    return in_memory + (kv_bytes if allowed is None else min(kv_bytes, allowed))


def _draft_loader(settings: Settings, device: torch.device) -> ModelLoader:
    model = ModelSettings(base_path=settings.speculation.draft)
    return ModelLoader(model, settings.inference, device, settings.engine.num_load_threads)


def _check_no_states(who: str, spec: ModelSpec, settings: SpeculationSettings) -> None:
    if spec.state_bytes:
        raise UnsupportedError(
            f"speculation.kind is {settings.kind!r}, and {who} has recurrent states: what a draft has guessed wrong "
            "cannot be taken back from them.",
            remedy="Use speculation.kind ngram, or a draft without such layers.",
        )


def _check_other_model(
    path: str, draft: ModelLoader, target: ModelSpec, tokenizer: Tokenizer, settings: SpeculationSettings
) -> None:
    """Whether a model can guess for another one."""
    _check_no_states("the draft", draft.spec, settings)
    own = Tokenizer.load(draft.base_folder, draft.base_metadata)
    own.check_vocabulary(draft.spec.vocab_size)
    token_id = tokenizer.first_difference(own)
    if token_id is not None:
        raise ConfigError(
            f"speculation.draft is {path!r}, which has another vocabulary: token {token_id} is not the same.",
            remedy="Name a model of the same vocabulary, usually a smaller one of the same family.",
        )
    for what, mine, others in (
        ("parameters", draft.spec.num_parameters, target.num_parameters),
        ("active parameters for each token", draft.spec.num_active_parameters, target.num_active_parameters),
    ):
        if mine > others:
            raise ConfigError(
                f"speculation.draft is {path!r}, which has {mine} {what}, and the model itself has {others}.",
                remedy="A draft is smaller than its model; its guesses would cost more than they save.",
            )


def build_own_draft(
    settings: SpeculationSettings,
    loader: ModelLoader,
    rules: Sequence[Rule],
    versions: Sequence[WeightVersion],
    progress: Progress | None,
) -> WeightVersion:
    """The model with its experts, or all linear weights if it has none, in a lower precision.

    Args:
        versions: weights that are loaded already, the model's own first.

    Raises:
        ConfigError: no weight would be smaller than it is.
    """
    planned = loader.plan((*rules, *_smaller_weights(settings, loader, rules)))
    version_id = 1 + max(version.version_id for version in versions)
    return loader.build(planned, version_id, shared_weights(planned, *versions), progress).version


def _smaller_weights(settings: SpeculationSettings, loader: ModelLoader, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    current = {weight.choice.name: weight for weight in loader.plan(rules)}
    sources = [settings.source] if settings.source else list(loader.sources)
    has_experts = loader.spec.num_experts > 0
    mapping: dict[str, str] = {}
    for name, slot in loader.slots.items():
        if not slot.is_linear or slot.role == "head" or (has_experts and ".experts." not in slot.name):
            continue
        found = [weight for source in sources if (weight := loader.candidate(name, source)) is not None]
        smallest = min(found, key=lambda weight: weight.memory_bytes, default=None)
        if smallest is not None and smallest.memory_bytes < current[name].memory_bytes:
            mapping[name] = smallest.choice.source
    if not mapping:
        raise ConfigError(
            "speculation.kind is 'self', and "
            + (f"source {settings.source!r}" if settings.source else "no source")
            + f" has {'an expert' if has_experts else 'a weight'} in a lower precision than the model does.",
            remedy="Declare a source of lower precision; `amalgam quantize` makes one.",
        )
    return build_rules(mapping)


def _draft_proposer(settings: Settings, spec: ModelSpec, version: WeightVersion, device: torch.device) -> DraftProposer:
    """
    Raises:
        ConfigError: the cache would hold nothing.
    """
    dtype: torch.dtype = getattr(torch, settings.inference.dtype)
    engine, cache_type = settings.engine, kv_type(settings.engine.kv_dtype, dtype)
    max_positions = min(settings.inference.max_seq_length, spec.max_positions)
    block_bytes = KVCache.bytes_per_block(spec, engine.block_size, cache_type)
    allowed = settings.speculation.kv_cache_bytes or engine.kv_cache_bytes
    if allowed is None:
        allowed = available_bytes(device) // _MEMORY_SHARE
    wanted = settings.inference.max_batch_size * -(-max_positions // engine.block_size)
    num_blocks = min(wanted, allowed // block_bytes)
    if not num_blocks:
        raise ConfigError(
            f"The draft's KV cache takes {block_bytes} bytes for {engine.block_size} tokens, and has {allowed}.",
            remedy="Raise speculation.kv_cache_bytes.",
        )
    decoder = Decoder(spec, max_positions, dtype, device)
    cache = KVCache.allocate(spec, num_blocks, engine.block_size, cache_type, device)
    return DraftProposer(
        decoder,
        version,
        cache,
        num_blocks,
        max_step_tokens=engine.max_step_tokens,
        max_positions=max_positions,
    )
