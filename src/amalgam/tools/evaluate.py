"""Plans and models measured on texts: what `amalgam evaluate` prints.

In: settings, files of texts. Out: reports with their figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from amalgam.base.counting import counted
from amalgam.composition.loader import ModelLoader
from amalgam.composition.progress import Progress
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError
from amalgam.evaluation.confidence import Bootstrap, Interval
from amalgam.evaluation.quality import Figures, Quality, Reference, by_domain, own_figures, remarks, summarise
from amalgam.evaluation.running import Contestant, open_contestant
from amalgam.evaluation.texts import DEFAULT_WINDOW, Sample, read_texts, sample_of
from amalgam.runtime.derive import ensure_derived
from amalgam.runtime.device import choose_device
from amalgam.runtime.opening import open_deployment
from amalgam.runtime.threads import set_threads
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.bench import bench_model

ALL = "all"


@dataclass(frozen=True)
class TextOptions:
    """Which texts, and how much of them."""

    files: Sequence[str]
    window: int = DEFAULT_WINDOW
    max_tokens: int | None = None
    seed: int = 0

    def sample(self, tokenizer: Tokenizer, max_positions: int, files: Sequence[str] | None = None) -> Sample:
        """Windows of the files, or of others cut in the same way.

        Raises:
            ConfigError: a window is longer than the model's positions, or texts cannot be read.
        """
        if self.window > max_positions:
            raise ConfigError(
                f"--window is {self.window}, and the model has {max_positions} positions.",
                remedy="Choose a smaller window.",
            )
        documents = read_texts(self.files if files is None else files)
        return sample_of(documents, tokenizer, window=self.window, max_tokens=self.max_tokens, seed=self.seed)


@dataclass(frozen=True)
class Evaluation:
    """A plan against a reference.

    Attributes:
        domains: domain, or `all` → its figures.
        unit: what confidence intervals resample.
        plan_bytes, reference_bytes: of the weights in memory.
    """

    plan: str
    reference: str
    domains: Mapping[str, Quality]
    reference_domains: Mapping[str, Quality]
    unit: str
    text_digest: str
    plan_bytes: int
    reference_bytes: int
    remarks: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelFigures:
    """One side of a comparison of two models."""

    name: str
    num_parameters: int
    num_active_parameters: int
    weights_bytes: int
    precisions: Mapping[str, int]
    speed: Mapping[str, float]
    quality: Quality


@dataclass(frozen=True)
class SideBySide:
    """Two models: size, speed, quality. `differences`: second against first, as shares, with confidence intervals."""

    first: ModelFigures
    second: ModelFigures
    unit: str
    differences: Mapping[str, Interval]
    divergence: Quality | None = None  # of the second from the first, where they share a vocabulary
    remarks: tuple[str, ...] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_name(settings: Settings) -> str:
    return settings.model.name or settings.model.base_path.rstrip("/").rpartition("/")[2]


def reference_settings(settings: Settings) -> Settings:
    """The same model with every weight from base, as it is stored."""
    model = settings.model.model_dump() | {"name": f"{plan_name(settings)}, base"}
    model["mixed_precision"] |= {"weight_mapping": {}, "rules": (), "default_source": "base"}
    inference = settings.inference.model_dump() | {"load_in_8bit": False, "load_in_4bit": False}
    return settings.replace(model=model, inference=inference)


def evaluate(
    settings: Settings, reference: Settings | None, texts: TextOptions, progress: Progress | None = None
) -> Evaluation:
    """
    Args:
        reference: None: every weight from base.

    Raises:
        AmalgamError: a plan that cannot be fulfilled, texts that cannot be read, NaN on the way, models that do not
            share a vocabulary.
    """
    second = reference_settings(settings) if reference is None else reference
    base, sample = open_with_texts(second, texts, progress)
    plan = _beside(base, settings, second, sample, progress)
    compared = Reference(base, sample, progress)
    own, found = compared.figures(), compared.figures(plan, progress)
    domains = _all_and_each(found, sample)
    reference_domains = _all_and_each(own, sample, has_reference=False)
    return Evaluation(
        plan_name(settings),
        plan_name(second),
        domains,
        reference_domains,
        sample.unit,
        sample.digest,
        plan.nbytes,
        base.nbytes,
        tuple(remarks(reference_domains[ALL], sample, base.loader.spec.vocab_size)),
    )


def compare_models(
    first: Settings, second: Settings, texts: TextOptions, progress: Progress | None = None
) -> SideBySide:
    """Measure two models on the same texts and this machine, one after the other."""
    documents = read_texts(texts.files)
    left, sample = open_with_texts(first, texts, progress)
    left_figures = own_figures(left, sample, progress)
    sides = [_side(first, left, left_figures, progress)]
    right, other_sample = open_with_texts(second, texts, progress)
    right_figures = own_figures(right, other_sample, progress)
    sides.append(_side(second, right, right_figures, progress))
    is_shared = sample.digest == other_sample.digest and left.loader.spec.vocab_size == right.loader.spec.vocab_size
    divergence, notes = None, [f"The texts come to {counted(len(documents), 'document')}."]
    if is_shared:
        divergence = summarise(Reference(left, sample, progress).figures(right, progress))
    else:
        notes.append("The two have different tokens: compare bits per byte, not perplexities.")
    differences = {"weights_bytes": Interval(sides[1].weights_bytes / sides[0].weights_bytes - 1)}
    differences |= {name: Interval(sides[1].speed[name] / value - 1) for name, value in sides[0].speed.items() if value}
    if is_shared:
        differences["loss"] = Bootstrap(left_figures.units).ratio_of_means(right_figures.loss, left_figures.loss)
    else:
        bits = [side.quality.bits_per_byte for side in sides]
        if bits[0] is not None and bits[1] is not None:
            differences["bits_per_byte"] = Interval(bits[1].value / bits[0].value - 1)
    return SideBySide(sides[0], sides[1], sample.unit, differences, divergence, tuple(notes))


def open_with_texts(
    settings: Settings, texts: TextOptions, progress: Progress | None = None
) -> tuple[Contestant, Sample]:
    """Load a plan, and cut texts into windows with its tokenizer.

    Raises:
        CheckpointError: the tokenizer is of another model.
    """
    ensure_derived(settings, progress)
    set_threads(settings.engine)
    device = choose_device(settings.inference.device_map)
    loader = ModelLoader(settings.model, settings.inference, device, settings.engine.num_load_threads)
    planned = loader.plan()
    tokenizer = Tokenizer.load(loader.base_folder, loader.base_metadata)
    tokenizer.check_vocabulary(loader.spec.vocab_size)
    sample = texts.sample(tokenizer, loader.spec.max_positions)
    dtype: torch.dtype = getattr(torch, settings.inference.dtype)
    contestant = open_contestant(plan_name(settings), loader, planned, dtype, texts.window, progress)
    return contestant, sample


def _beside(
    base: Contestant, settings: Settings, reference: Settings, sample: Sample, progress: Progress | None
) -> Contestant:
    """A plan beside its reference; weights that both have are in memory once where the settings allow it."""
    ensure_derived(settings, progress)
    loader = ModelLoader(settings.model, settings.inference, base.loader.device, settings.engine.num_load_threads)
    planned = loader.plan()
    if loader.spec.vocab_size != base.loader.spec.vocab_size:
        raise ConfigError(
            f"The plan has {loader.spec.vocab_size} tokens and the reference {base.loader.spec.vocab_size}.",
            remedy="A divergence needs one vocabulary: compare two models with --versus.",
        )
    own, theirs = (_vocabulary(each) for each in (loader, base.loader))
    if own != theirs:
        raise ConfigError(
            "The plan's tokenizer gives other tokens than the reference's.",
            remedy="A divergence needs one tokenizer: compare two models with --versus.",
        )
    same = loader.spec == base.loader.spec and settings.inference == reference.inference
    if same:
        return replace(base, loader=loader).with_plan(plan_name(settings), planned, progress)
    dtype: torch.dtype = getattr(torch, settings.inference.dtype)
    longest = max(len(window.token_ids) for window in sample.windows)
    return open_contestant(plan_name(settings), loader, planned, dtype, longest, progress)


def _vocabulary(loader: ModelLoader) -> str:
    """Tells tokenizers apart by what they make of some text."""
    tokenizer = Tokenizer.load(loader.base_folder, loader.base_metadata)
    return json.dumps([tokenizer.vocab_size, tokenizer.encode("Hello, 世界!\n\tdef f(x): return 12345  ")])


def _all_and_each(figures: Figures, sample: Sample, *, has_reference: bool = True) -> dict[str, Quality]:
    found = {ALL: summarise(figures, has_reference=has_reference)}
    if len(sample.domains) > 1:
        found |= by_domain(figures, sample, has_reference=has_reference)
    return found


def _side(settings: Settings, contestant: Contestant, figures: Figures, progress: Progress | None) -> ModelFigures:
    deployment = open_deployment(settings, progress)
    try:
        longest = min(512, deployment.settings.inference.max_seq_length // 2)
        report = bench_model(deployment, prompts=(longest,), batches=(1, 8), num_tokens=16, repeats=3)
        info = deployment.model_info()
    finally:
        deployment.close()
    speed = {m.name: m.value for m in report.measurements if m.unit == "tokens/s"}
    spec = contestant.loader.spec
    return ModelFigures(
        plan_name(settings),
        spec.num_parameters,
        spec.num_active_parameters,
        contestant.nbytes,
        {name: row["bytes"] for name, row in info["precisions"].items()},
        speed,
        summarise(figures, has_reference=False),
    )
