"""From what is asked to what goes: one `Candidate` for each amount and criterion.

In: an opened model, texts, options. Out: candidates: what remains, how it is made, and the record of why. Must never
know: how good they are, but for what a criterion measures itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch

from amalgam.base.escaping import without_password
from amalgam.composition.loader import ModelLoader
from amalgam.composition.progress import Progress
from amalgam.composition.wide import WideModel
from amalgam.config.settings import Settings
from amalgam.evaluation.quality import Reference
from amalgam.evaluation.running import Contestant, open_contestant
from amalgam.evaluation.texts import Sample
from amalgam.models.spec import ModelSpec
from amalgam.pruning.amounts import parse_amount, parse_sparsity
from amalgam.pruning.channels import ChannelCriterion, kept_channels, widths_of
from amalgam.pruning.cut import Cut
from amalgam.pruning.experts import ExpertChoice, ExpertCriterion, groups_of, kept_experts, scores_of
from amalgam.pruning.layers import by_divergence, by_influence, check_count
from amalgam.pruning.pruned import Pruned
from amalgam.pruning.sparsity import check_pattern
from amalgam.pruning.survey import LayerExperts, Survey, survey
from amalgam.pruning.trial import on_trial
from amalgam.pruning.writing import CutMaker, Maker, SparseMaker
from amalgam.tools.pruning.options import PruneOptions


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to prune.

    Attributes:
        name: for people: `experts 25% by reap`.
        record: what goes and why, JSON values.
    """

    name: str
    amount: str
    criterion: str
    maker: Maker
    record: Mapping[str, Any]

    @property
    def pruned(self) -> Pruned:
        return self.maker.pruned


def check_amounts(spec: ModelSpec, options: PruneOptions) -> None:
    """Before texts are read.

    Raises:
        ConfigError: an amount that is none, or that cannot go.
        UnsupportedError: the model has none of the kind.
    """
    for amount in options.amounts:
        if options.kind == "experts":
            alike = {layer_id: torch.ones(spec.layers[layer_id].mlp.num_experts) for layer_id in spec.moe_layer_ids}
            kept_experts(ExpertChoice("use", parse_amount("--experts", amount)), spec, alike)
        elif options.kind == "layers":
            check_count(parse_amount("--layers", amount).of(spec.num_layers), spec.num_layers)
        elif options.kind == "channels":
            widths_of(spec, parse_amount("--channels", amount))
        else:
            check_pattern(spec, parse_sparsity("--weights", amount))


class Chooser:
    """Chooses; measures what it needs once.

    Args:
        sample: the texts to choose by; empty where nothing needs them.
    """

    def __init__(
        self,
        model: WideModel,
        sample: Sample,
        settings: Settings,
        options: PruneOptions,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self._sample = sample
        self._settings = settings
        self._options = options
        self._progress = progress

    def candidates(self) -> Iterator[Candidate]:
        """
        Raises:
            ConfigError: an amount that cannot go.
            UnsupportedError: the model has none of the kind, or its configuration cannot say what remains.
            CheckpointError: weights or hidden states hold NaN or infinity.
        """
        makes = {
            "experts": self._experts,
            "layers": self._layers,
            "channels": self._channels,
            "weights": self._weights,
        }
        for amount in self._options.amounts:
            for criterion in self._options.criteria:
                maker, found = makes[self._options.kind](amount, criterion)
                how = ", merged" if self._options.merges else ""
                how += ", by layer" if self._options.per_layer else ""
                name = f"{self._options.kind} {amount} by {criterion}{how}"
                yield Candidate(name, amount, criterion, maker, {**self._record(amount, criterion), **found})

    def _record(self, amount: str, criterion: str) -> dict[str, Any]:
        digest = hashlib.sha256(repr(self._token_ids).encode()).hexdigest()[:16]
        return {
            "kind": self._options.kind,
            "amount": amount,
            "criterion": criterion,
            "base": str(self.model.source.folder),
            "tokens": sum(map(len, self._token_ids)) if self._options.needs_texts else 0,
            "texts": digest if self._options.needs_texts else None,
            "statistics": without_password(self._options.use[1]) if self._options.use is not None else None,
        }

    @property
    def _token_ids(self) -> list[list[int]]:
        return [list(window.token_ids) for window in self._sample.windows]

    @cached_property
    def _survey(self) -> Survey:
        return survey(self.model, self._token_ids, self._progress)

    def _pruned(self, cut: Cut, widths: Mapping[int, int] | None = None) -> Pruned:
        source = self.model.source
        return Pruned.of(source.config, source.config_place, self.model.spec, cut, widths)

    def _cut(self, cut: Cut, widths: Mapping[int, int] | None = None) -> CutMaker:
        return CutMaker(self.model, self._pruned(cut, widths))

    # --- Experts ---

    def _experts(self, amount: str, criterion: str) -> tuple[Maker, dict[str, Any]]:
        options, spec = self._options, self.model.spec
        choice = ExpertChoice(
            cast(ExpertCriterion, criterion),
            parse_amount("--experts", amount),
            options.merges,
            options.per_layer,
            options.seed,
        )
        layers = self._layer_experts(criterion)
        scores = scores_of(choice, layers)
        kept = kept_experts(choice, spec, scores)
        groups = groups_of(kept, layers, merges=options.merges)
        weights = {layer_id: tuple(layers[layer_id].counts.tolist()) for layer_id in groups} if options.merges else {}
        cut = Cut(tuple(range(spec.num_layers)), groups, weights)
        record = {
            "merges": options.merges,
            "per_layer": options.per_layer,
            "experts": {str(layer_id): [list(group) for group in found] for layer_id, found in groups.items()},
            "scores": {str(layer_id): score.tolist() for layer_id, score in scores.items()},
        }
        return self._cut(cut), record

    def _layer_experts(self, criterion: str) -> Mapping[int, LayerExperts]:
        spec = self.model.spec
        if criterion == "random" and not self._options.merges:
            counts = zip(spec.moe_layer_ids, spec.expert_counts, strict=True)
            return {layer_id: LayerExperts.nothing(count) for layer_id, count in counts}
        if self._options.use is None:
            return self._survey.experts
        saved, where = self._options.use
        saved.check_fits(spec.moe_layer_ids, spec.expert_counts, where, spec.num_active_experts)
        found = {}
        for row, (layer_id, count) in enumerate(zip(spec.moe_layer_ids, spec.expert_counts, strict=True)):
            found[layer_id] = each = LayerExperts.nothing(count)
            each.counts += torch.from_numpy(saved.total.counts.sum(axis=0)[row, :count])
            each.gate_mass += torch.from_numpy(saved.total.gate_mass.sum(axis=0)[row, :count])
        return found

    # --- Layers ---

    def _layers(self, amount: str, criterion: str) -> tuple[Maker, dict[str, Any]]:
        num_layers = self.model.spec.num_layers
        count = parse_amount("--layers", amount).of(num_layers)
        check_count(count, num_layers)
        if criterion == "influence":
            kept = by_influence(self._survey.influence, count)
            return self._cut(Cut(kept)), {"layers": list(kept), "influence": self._survey.influence}
        kept, gone = by_divergence(num_layers, count, self._divergence, self._progress)
        return self._cut(Cut(kept)), {"layers": list(kept), "gone": [list(each) for each in gone]}

    @cached_property
    def _base(self) -> tuple[Contestant, Reference]:
        inference = self._settings.inference
        threads = self._settings.engine.num_load_threads
        loader = ModelLoader(self._settings.model, inference, torch.device("cpu"), threads)
        dtype: torch.dtype = getattr(torch, inference.dtype)
        longest = max(len(window.token_ids) for window in self._sample.windows)
        base = open_contestant("base", loader, loader.plan(()), dtype, longest, self._progress)
        return base, Reference(base, self._sample)

    def _divergence(self, kept: tuple[int, ...]) -> float:
        """Of the layers that remain, on the texts that are chosen by."""
        base, reference = self._base
        pruned = self._pruned(Cut(kept))
        planned = base.loader.plan(())
        trial = on_trial("without a layer", base, planned, pruned, self._load, lambda values, source: self._no_copy())
        return float(reference.figures(trial).divergence.mean())

    def _load(self, slot: str) -> torch.Tensor:
        return self.model.load(slot).dense

    def _no_copy(self) -> Any:
        raise AssertionError("every weight of the plan is wide")

    # --- Channels and weights ---

    def _channels(self, amount: str, criterion: str) -> tuple[Maker, dict[str, Any]]:
        spec = self.model.spec
        widths = widths_of(spec, parse_amount("--channels", amount))
        found = None if criterion == "magnitude" else self._survey
        kept = kept_channels(cast(ChannelCriterion, criterion), self.model, found, widths, self._progress)
        digest = hashlib.sha256(repr([(mlp, each.tolist()) for mlp, each in kept.items()]).encode()).hexdigest()[:16]
        record = {"channels": {str(width): remaining for width, remaining in widths.items()}, "chosen": digest}
        return self._cut(Cut(tuple(range(spec.num_layers)), channels=kept), widths), record

    def _weights(self, amount: str, criterion: str) -> tuple[Maker, dict[str, Any]]:
        spec = self.model.spec
        sparsity = parse_sparsity("--weights", amount)
        check_pattern(spec, sparsity)
        token_ids: Sequence[Sequence[int]] | None = None if criterion == "magnitude" else self._token_ids
        pruned = self._pruned(Cut.nothing(spec))
        return SparseMaker(self.model, pruned, sparsity, token_ids), {"zeros": float(sparsity.share)}
