"""All that `amalgam prune` does: choose, write, compare.

In: settings, options. Out: a `PruneReport`, a folder, a page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amalgam.base.counting import counted
from amalgam.base.files import check_free, check_writable, replace_file, writing
from amalgam.composition.progress import Progress
from amalgam.composition.wide import WideModel
from amalgam.config.environment import state_folder
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError
from amalgam.evaluation.texts import Sample
from amalgam.planning.sensitivity import Cost
from amalgam.pruning.writing import SparseMaker, Written, write_pruned
from amalgam.runtime.threads import set_threads
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.evaluate import plan_name
from amalgam.tools.plan import HELD_OUT_SHARE, PlanOptions, Studio
from amalgam.tools.pruning.choosing import Candidate, Chooser, check_amounts
from amalgam.tools.pruning.comparing import Comparison, Point
from amalgam.tools.pruning.copies import make_copies
from amalgam.tools.pruning.drawing import curve_html
from amalgam.tools.pruning.options import PruneOptions


@dataclass(frozen=True)
class Cut:
    """One candidate, in figures.

    Attributes:
        parameters, active_parameters: before and after.
        nbytes: of the weights as stored, before and after; zeros take as many as other values.
        zeros: share of the linear weights that became zero; None: none.
        counts: experts of each layer with experts, and layers.
    """

    name: str
    parameters: tuple[int, int]
    active_parameters: tuple[int, int]
    nbytes: tuple[int, int]
    zeros: float | None
    num_layers: tuple[int, int]
    expert_counts: Sequence[int]
    record: Mapping[str, Any]

    @property
    def is_uniform(self) -> bool:
        """Whether all layers with experts have as many."""
        return len(set(self.expert_counts)) < 2


@dataclass(frozen=True)
class PruneReport:
    """What goes, what was written, and how it does beside plans.

    Attributes:
        written: None where there was no folder to write.
        points: empty where nothing was compared.
        num_tokens: that points were measured on.
    """

    cuts: Sequence[Cut]
    written: Written | None
    points: Sequence[Point]
    num_tokens: int
    remarks: Sequence[str]

    @property
    def advice(self) -> list[str]:
        """A sentence for each cut that was compared: never for one that precision alone beats."""
        found = []
        for cut in self.cuts:
            mine = [point for point in self.points if point.candidate == cut.name]
            if not mine:
                continue
            better = [point for point in mine if point.is_worth_it]
            if better:
                sizes = ", ".join(f"{point.nbytes / 1e6:.2f} MB" for point in better)
                found.append(f"{cut.name}: better than a plan of the same bytes at {sizes}.")
            else:
                found.append(
                    f"{cut.name}: not recommended. At none of {len(mine)} sizes is it better than a plan that spends "
                    "the same bytes by precision (`amalgam plan`), in all and in no domain worse."
                )
        return found

    def as_json(self) -> dict[str, Any]:
        written = self.written and {**asdict(self.written), "folder": str(self.written.folder)}
        points = [
            {**asdict(point), "winners": point.winners, "is_worth_it": point.is_worth_it} for point in self.points
        ]
        return {
            "cuts": [{**asdict(cut), "is_uniform": cut.is_uniform} for cut in self.cuts],
            "written": written,
            "points": points,
            "tokens": self.num_tokens,
            "advice": self.advice,
            "remarks": list(self.remarks),
        }


def prune(
    settings: Settings,
    options: PruneOptions,
    out: Path | None = None,
    curve: Path | None = None,
    progress: Progress | None = None,
    announce: Callable[[Cost], None] = lambda cost: None,
) -> PruneReport:
    """
    Args:
        out: the folder to write; must not exist.
        curve: the page to write.
        announce: is told what measuring sensitivities costs before it starts.

    Raises:
        ConfigError: options that do not fit each other or the model; texts that cannot be read or are too short.
        CheckpointError: the model is damaged, quantized already, or its tokenizer is another's; the disk is full.
        UnsupportedError: the model has nothing of the kind, or its configuration cannot say what remains.
        ConflictError: see `write_pruned`.
    """
    options.check()
    _check_settings(settings)
    if out is not None and len(options.amounts) * len(options.criteria) != 1:
        raise ConfigError(
            f"{counted(len(options.amounts), 'amount')} and "
            f"{counted(len(options.criteria), 'criterion', 'criteria')} are given, and one folder to write.",
            remedy="Give one of each, or leave out --out to compare them.",
        )
    if out is not None:
        check_free(out)
    if curve is not None:
        check_writable(curve)
    set_threads(settings.engine)
    model = WideModel.open(settings.model.base_path)
    check_amounts(model.spec, options)
    calibration = _calibration(model, options)
    candidates = list(Chooser(model, calibration, settings, options, progress).candidates())
    points: list[Point] = []
    num_tokens = 0
    if options.compares:
        comparison = Comparison(_studio(settings, options, model, progress, announce), candidates, progress)
        points, num_tokens = comparison.points(options.bits), comparison.num_tokens
        del comparison  # the whole model and what is left of it
        if curve is not None:
            page = curve_html(points, plan_name(settings), f"{num_tokens} tokens")
            with writing(curve):
                replace_file(curve, page)
    written = None  # last: whatever texts or copies are refused for leaves no folder behind
    if out is not None:
        written = write_pruned(model, candidates[0].maker, out, candidates[0].record, progress)
    cuts = [_cut(model, candidate) for candidate in candidates]
    return PruneReport(cuts, written, points, num_tokens, _remarks(cuts, options))


def _check_settings(settings: Settings) -> None:
    """Raise ConfigError where settings say of the weights what has no effect here."""
    mixed, inference = settings.model.mixed_precision, settings.inference
    given = {
        "Sources": mixed.sources,
        "Rules": mixed.all_rules,
        "inference.load_in_8bit": inference.load_in_8bit,
        "inference.load_in_4bit": inference.load_in_4bit,
    }
    for what, value in given.items():
        if value:
            raise ConfigError(
                f"{what} of a configuration have no effect: the base checkpoint is pruned, and copies of it compared.",
                remedy="Give --model FOLDER; --precisions names the copies.",
            )


def _calibration(model: WideModel, options: PruneOptions) -> Sample:
    """The texts to choose by; without the part that comparisons are made on."""
    if not options.texts.files:
        return Sample((), "")
    tokenizer = Tokenizer.load(model.source.folder, model.source.store.metadata)
    tokenizer.check_vocabulary(model.spec.vocab_size)
    whole = options.texts.sample(tokenizer, model.spec.max_positions)
    if options.held_out:  # read once more when it is needed; here, so that a missing file is told before all the work
        options.texts.sample(tokenizer, model.spec.max_positions, options.held_out)
    if options.held_out or not options.compares:
        return whole
    return whole.split(HELD_OUT_SHARE, options.texts.seed)[0]


def _studio(
    settings: Settings,
    options: PruneOptions,
    model: WideModel,
    progress: Progress | None,
    announce: Callable[[Cost], None],
) -> Studio:
    """The whole model with its copies in other precisions, and what is known of them."""
    folder = options.copies or state_folder() / "copies"
    copies = make_copies(model, options.precisions, folder, progress)
    data = settings.model.model_dump() | {
        "mixed_precision": {"sources": {name: str(copy) for name, copy in copies.items()}}
    }
    use = None if options.use is None else options.use[0]
    planning = PlanOptions(options.texts, options.held_out, use, checks=0, cache=options.cache)
    return Studio(settings.replace(model=data), planning, progress, announce)


def _cut(model: WideModel, candidate: Candidate) -> Cut:
    whole, smaller = model.spec, candidate.pruned.spec
    maker = candidate.maker
    after = sum(
        model.source.weights[model.by_slot[origin.name]].nbytes * math.prod(slot.shape) // math.prod(origin.shape)
        for slot, origin in ((slot, candidate.pruned.origins[slot.name]) for slot in smaller.slots)
    )
    return Cut(
        candidate.name,
        (whole.num_parameters, smaller.num_parameters),
        (whole.num_active_parameters, smaller.num_active_parameters),
        (model.nbytes, after),
        float(maker.sparsity.share) if isinstance(maker, SparseMaker) else None,
        (whole.num_layers, smaller.num_layers),
        smaller.expert_counts,
        candidate.record,
    )


def _remarks(cuts: Sequence[Cut], options: PruneOptions) -> list[str]:
    found = []
    if any(cut.zeros is not None for cut in cuts):
        found.append(
            "Zeros save no bytes and no time here: no format of amalgam stores or multiplies them in less. Engines "
            "with kernels for such patterns may gain from them."
        )
    if any(not cut.is_uniform for cut in cuts):
        found.append(
            "Layers keep different numbers of experts: config.json says so under per_layer_config, which amalgam "
            "reads. transformers' classes, vLLM and llama.cpp take one number for all layers: leave out --per-layer "
            "for those."
        )
    if options.merges:
        found.append("Merged experts are means of several: the router still sends each its own tokens only.")
    return found
