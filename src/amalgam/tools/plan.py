"""A plan for a budget, from settings and texts: what `amalgam plan --budget` does.

In: settings, files of texts, a budget. Out: a `PlanReport`, a configuration file, a page with the frontier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from amalgam.base.files import check_folder_writable, check_writable, replace_file, writing
from amalgam.composition.loader import ModelLoader
from amalgam.composition.progress import Progress
from amalgam.config.environment import state_folder
from amalgam.config.placement import build_rules
from amalgam.config.settings import Settings
from amalgam.engine.memory import STATES_PER_SEQUENCE
from amalgam.errors import CheckpointError, ConfigError
from amalgam.evaluation.confidence import Interval
from amalgam.evaluation.quality import Reference, remarks, summarise
from amalgam.evaluation.running import Contestant, open_contestant
from amalgam.evaluation.texts import Sample
from amalgam.experts.saved.files import load
from amalgam.experts.saved.sets import SavedSet
from amalgam.models.kv_cache import KVCache, kv_type
from amalgam.planning.budget import Budget, parse_budget
from amalgam.planning.corrections import Check
from amalgam.planning.devices import Devices, Share, device_of, divide
from amalgam.planning.drawing import frontier_html
from amalgam.planning.placement import Placement
from amalgam.planning.planner import Plan, Planner, costs_within
from amalgam.planning.problem import Problem, problem_of
from amalgam.planning.proof import Rival, Scale, check_units
from amalgam.planning.scores import Scores, scores
from amalgam.planning.sensitivity import Cost, Sensitivities, SensitivityStudy
from amalgam.planning.speed import SpeedModel, measure_speed, step_seconds
from amalgam.planning.use import Use, use_of_set, use_of_texts
from amalgam.planning.writing import Said, rules_of, write_config
from amalgam.runtime.derive import ensure_derived
from amalgam.runtime.speculation import draft_bytes
from amalgam.runtime.threads import set_threads
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.estimate import workspace_bytes
from amalgam.tools.evaluate import TextOptions, plan_name

HELD_OUT_SHARE = 0.4
FRONTIER_POINTS = 7


@dataclass(frozen=True)
class PlanOptions:
    """What may be asked of planning.

    Attributes:
        texts: to measure sensitivities on.
        held_out: to prove the plan on; empty: a part of the texts, which sensitivities then do not see.
        use: a saved set's file, or the set; None: as the texts use the experts.
        sources: which may be chosen from; None: all.
        floors: pattern → source, see `problem_of`.
        checks: rounds of checks of the sensitivities; 0: they are taken as they are.
        context, sequences: what the KV cache has room for, in a budget of bytes.
        cache: folder of sensitivities; None: the user's own.
        splits: whether, without `held_out`, a part of the texts is held out.
        slack: how much more divergence than the least may be expected, as a share, where devices are filled, for a
            faster step.
    """

    texts: TextOptions
    held_out: Sequence[str] = ()
    use: str | SavedSet | None = None
    sources: Sequence[str] | None = None
    floors: Mapping[str, str] = field(default_factory=dict)
    checks: int = 1
    context: int | None = None
    sequences: int = 1
    draws: int = 2
    cache: Path | None = None
    splits: bool = True
    slack: float = 0.01


@dataclass(frozen=True)
class Kind:
    """Weights of one role and part, in the plan that was chosen.

    Attributes:
        sources: source → number of weights.
    """

    role: str
    part: str
    sources: Mapping[str, int]
    bits_per_weight: float
    expected: float


@dataclass(frozen=True)
class PlanReport:
    """What was chosen, and why.

    Attributes:
        gap: of the solution to the best possible one, by expected losses, as a share.
        divergence: of what is returned, on the held-out texts.
        plan_divergence: of the planner's own choice, which is returned if it is accepted.
        other_bytes: KV cache and workspace.
        tokens_per_second: expected and measured, of one sequence; None unless the budget is one of speed.
        shares: what lies on each device; empty: there is one.
        seconds_gap: how much slower a step may be than the fastest within the slack, as a share.
    """

    budget: str
    is_accepted: bool
    chosen: str
    rules: Mapping[str, Said]
    bits_per_weight: float
    weights_bytes: int
    other_bytes: int
    divergence: Interval
    plan_divergence: Interval
    rivals: Sequence[Rival]
    gap: float
    solve_seconds: float
    kinds: Sequence[Kind]
    checks: Sequence[Check]
    tokens_per_second: tuple[float, float] | None
    remarks: Sequence[str]
    shares: Sequence[Share] = ()
    seconds_gap: float = 0.0

    def as_json(self) -> dict[str, Any]:
        document = asdict(self)
        for rival in document["rivals"]:
            del rival["choice"]
        return document


class Studio:
    """A model opened for planning: its loader, its texts; what is measured is when it is asked for.

    Args:
        announce: is told what measuring sensitivities will cost before it starts.
    """

    def __init__(
        self,
        settings: Settings,
        options: PlanOptions,
        progress: Progress | None = None,
        announce: Callable[[Cost], None] = lambda cost: None,
        *,
        places: bool = False,
    ) -> None:
        """
        Args:
            places: whether experts can lie on several devices.

        Raises:
            AmalgamError: no weight has a choice, texts that cannot be read or are too short, damaged sources; the
                folder of sensitivities cannot be written.
        """
        folder = options.cache or state_folder() / "sensitivities"
        check_folder_writable(folder)
        ensure_derived(settings, progress)
        set_threads(settings.engine)
        self.settings = settings
        self.options = options
        self._progress = progress
        self._announce = announce
        device = torch.device("cpu")
        self.loader = ModelLoader(settings.model, settings.inference, device, settings.engine.num_load_threads)
        self.problem = problem_of(self.loader, options.sources, options.floors, places=places)
        tokenizer = Tokenizer.load(self.loader.base_folder, self.loader.base_metadata)
        tokenizer.check_vocabulary(self.loader.spec.vocab_size)
        self.calibration, self.held_out = self._samples(tokenizer)
        self.study = SensitivityStudy(self.loader, self.problem, self.calibration, folder, draws=options.draws)

    def _samples(self, tokenizer: Tokenizer) -> tuple[Sample, Sample]:
        texts, max_positions = self.options.texts, self.loader.spec.max_positions
        whole = texts.sample(tokenizer, max_positions)
        if self.options.held_out:
            return whole, texts.sample(tokenizer, max_positions, self.options.held_out)
        return whole.split(HELD_OUT_SHARE, texts.seed) if self.options.splits else (whole, Sample((), whole.unit))

    def check(self, budget: Budget) -> None:
        """What can be refused before anything is measured.

        Raises:
            PlanError: the smallest plan is above the budget; how fast a device is read is not known.
            ConfigError: the texts are too short for confidence; there is no such set of statistics.
        """
        if self.options.use is not None:
            _ = self.use
        if budget.devices:
            self.devices(budget, Use("nowhere", 0, {}, {})).check()  # what lies where is not asked yet
        elif budget.kind != "speed":
            costs_within(budget, self.problem, self.other_bytes)
        for sample in (self.held_out, self.calibration) if self.options.checks else (self.held_out,):
            check_units(sample)

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """
        Raises:
            CheckpointError: hidden states hold NaN or infinity; a source's file is damaged.
        """
        self._announce(self.study.cost())
        with writing(self.study.folder):
            return self.study.measure(self._progress)

    @cached_property
    def use(self) -> Use:
        given = self.options.use
        if given is None:
            return use_of_texts(self.problem, self.sensitivities)
        saved = load(given) if isinstance(given, str) else given
        return use_of_set(saved, self.loader.spec, given if isinstance(given, str) else "live statistics")

    @property
    def other_bytes(self) -> int:
        """KV cache, recurrent states, workspace, and the draft that guesses tokens."""
        spec, inference, engine = self.loader.spec, self.settings.inference, self.settings.engine
        dtype: torch.dtype = getattr(torch, inference.dtype)
        context = self.options.context or min(inference.max_seq_length, spec.max_positions)
        per_block = KVCache.bytes_per_block(spec, engine.block_size, kv_type(engine.kv_dtype, dtype))
        blocks = self.options.sequences * -(-context // engine.block_size)
        step = min(engine.max_step_tokens, self.options.sequences * context)
        states = self.options.sequences * STATES_PER_SEQUENCE * spec.state_bytes
        draft = draft_bytes(self.settings, self.loader, blocks)
        return blocks * per_block + states + draft + workspace_bytes(spec, step, self.options.sequences, dtype)

    def base(self) -> Contestant:
        dtype: torch.dtype = getattr(torch, self.settings.inference.dtype)
        planned = self.loader.plan(())
        return open_contestant("base", self.loader, planned, dtype, self.options.texts.window, self._progress)

    def devices(self, budget: Budget, use: Use) -> Devices:
        """The devices of a budget, with what each weight takes there, and how often a step reads it."""
        loader, problem = self.loader, self.problem
        held = {each.name: self._held_on(each.name.partition(":")[0]) for each in budget.devices}
        chosen = {item.name for item in problem.items}
        is_tied = loader.spec.has_tied_head
        # All that is multiplied is read at each step, and an embedding that is no head is looked up.
        kept = (w for w in loader.plan(()) if w.choice.name not in chosen)
        reads = sum(w.memory_bytes for w in kept if w.slot.role != "embedding" or is_tied)
        return divide(
            problem,
            held,
            [device_of(each) for each in budget.devices],
            budget.primary,
            use,
            fixed_reads=reads,
            other_bytes=self.other_bytes,
            sequences=self.options.sequences,
            has_tied_head=is_tied,
        )

    def _held_on(self, kind: str) -> Problem:
        """The same problem with the bytes that weights take on a kind of device."""
        if kind == self.loader.device.type:
            return self.problem
        settings, options = self.settings, self.options
        loader = ModelLoader(settings.model, settings.inference, torch.device(kind), settings.engine.num_load_threads)
        return problem_of(loader, options.sources, options.floors, compares=False, places=True)

    def planner(self, base: Contestant, wanted: Budget | None = None) -> Planner:
        """
        Raises:
            ConfigError: the held-out texts are too short for confidence, or no language to the model.
        """
        held_out = Scale(self.problem, Reference(base, self.held_out, self._progress), self._progress)
        own = summarise(held_out.reference.figures(), has_reference=False)
        if found := remarks(own, self.held_out, self.loader.spec.vocab_size):
            raise ConfigError(found[0], remedy="Give texts of the kind that the model is for.")
        checked = None
        if self.options.checks:
            checked = Scale(self.problem, Reference(base, self.calibration, self._progress), self._progress)
        speed = self._speed(base) if wanted is not None and wanted.kind == "speed" else None
        return Planner(
            self.problem,
            self.sensitivities,
            self.use,
            held_out,
            checked,
            speed,
            self.other_bytes,
            self.options.checks,
            self._progress,
            self.devices(wanted, self.use) if wanted is not None and wanted.devices else None,
            self.options.slack,
        )

    def _speed(self, base: Contestant) -> SpeedModel:
        choice = self.problem.uniform("base")
        if choice is None:
            raise CheckpointError("Base has no option for some weights.", remedy="Let --sources name base too.")
        return measure_speed(self.problem, self.use, base, choice, self._progress)


def make_plan(
    settings: Settings,
    options: PlanOptions,
    budget: str,
    *,
    out: Path | None = None,
    config: Path | None = None,
    frontier: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    announce: Callable[[Cost], None] = lambda cost: None,
) -> PlanReport:
    """
    Args:
        out: the configuration to write.
        config: the file that the settings came from; its other sections are carried over.
        frontier: the page to write.

    Raises:
        AmalgamError: a budget below the smallest plan, texts too short for confidence, NaN on the way; a file that
            exists or cannot be written.
    """
    wanted = parse_budget(budget)
    if out is not None and out.exists() and not force:
        raise ConfigError(f"{out} exists already.", remedy="Choose another name, or give --force.")
    for written in (out, frontier):
        if written is not None:
            check_writable(written)
    studio = Studio(settings, options, progress, announce, places=bool(wanted.devices))
    studio.check(wanted)
    base = studio.base()
    planner = studio.planner(base, wanted)
    found = planner.plan(wanted)
    report = _report(studio, planner, found, base)
    if out is not None:
        room = _room(report) if report.shares else None
        write_config(out, settings, report.rules, _comments(report), config, devices=room, force=force)
    if frontier is not None:
        points = planner.frontier(_budgets(planner))
        page = frontier_html(points, plan_name(settings), f"{planner.held_out.reference.sample.num_tokens} tokens")
        with writing(frontier):
            replace_file(frontier, page)
    return report


def _report(studio: Studio, planner: Planner, found: Plan, base: Contestant) -> PlanReport:
    problem, verdict, devices = studio.problem, found.verdict, planner.devices
    rules = rules_of(studio.loader, problem, verdict.choice, *_devices_of(devices, found.placement))
    sources = {pattern: what if isinstance(what, str) else what["source"] for pattern, what in rules.items()}
    planned = studio.loader.plan(build_rules(sources))  # as `serve` will: all sources are compared with each other
    shares = [] if devices is None or found.placement is None else devices.shares(found.placement, studio.use)
    weights = sum(share.dense_bytes + share.expert_bytes for share in shares)
    speed = None
    if planner.speed is not None:
        plan = base.with_plan("the plan", planned)
        speed = planner.speed.tokens_per_second(list(verdict.choice)), 1.0 / step_seconds(plan.decoder, plan.version)
    return PlanReport(
        found.budget.text,
        verdict.is_accepted,
        verdict.chosen,
        rules,
        problem.bits_per_weight(verdict.choice),
        weights or problem.fixed_memory + problem.memory_bytes(verdict.choice),
        studio.other_bytes,
        verdict.divergence,
        planner.held_out.divergence("plan", [int(index) for index in found.solution.choice]),
        verdict.rivals,
        found.solution.gap,
        found.solution.seconds,
        _kinds(planner, verdict.choice),
        found.checks,
        speed,
        found.remarks,
        shares,
        0.0 if found.placement is None else found.placement.seconds_gap,
    )


def _devices_of(devices: Devices | None, placement: Placement | None) -> tuple[Sequence[str], str]:
    """Where each item lies, and the primary device."""
    if devices is None or placement is None:
        return (), ""
    names = [device.name for device in devices.devices]
    return [names[index] for index in placement.places], names[devices.primary]


def _room(report: PlanReport) -> dict[str, int]:
    """Device → what weights may take there, the primary one first."""
    ordered = sorted(report.shares, key=lambda share: not share.is_primary)
    return {share.device.name: share.device.budget_bytes - share.other_bytes for share in ordered}


def _kinds(planner: Planner, choice: Sequence[int]) -> list[Kind]:
    rows: dict[tuple[str, str], list[int]] = {}
    for row, item in enumerate(planner.problem.items):
        rows.setdefault((item.role, item.part), []).append(row)
    kinds = []
    for (role, part), members in rows.items():
        sources: dict[str, int] = {}
        size = weights = 0
        for row in members:
            item = planner.problem.items[row]
            option = item.options[choice[row]]
            sources[option.source] = sources.get(option.source, 0) + 1
            size += option.stored_bytes
            weights += item.num_weights
        expected = sum(float(planner.losses[row, choice[row]]) for row in members)
        kinds.append(Kind(role, part, dict(sorted(sources.items())), 8 * size / weights, expected))
    return kinds


def _comments(report: PlanReport) -> list[str]:
    value = report.divergence
    interval = "" if value.low is None else f" ({value.low:.5f} to {value.high:.5f})"
    return [
        f"Made by `amalgam plan --budget {report.budget}`: "
        f"{'the plan' if report.is_accepted else report.chosen}, {report.bits_per_weight:.3f} bits a weight, "
        f"{report.weights_bytes / 1e6:.1f} MB of weights.",
        f"KL divergence from base on held-out texts: {value.value:.5f}{interval} nats a token.",
        *(
            f"{share.device.name}: {share.num_experts} experts with {share.activations:.1%} of the activations, "
            f"{share.nbytes / 1e6:.1f} MB of {share.device.budget_bytes / 1e6:.1f} in use."
            for share in report.shares
        ),
        *(
            f"{rival.kind} ({rival.name}): {rival.divergence.value:.5f}; the plan's is "
            f"{_compared(rival.difference.value)} it."
            for rival in report.rivals
        ),
    ]


def _compared(difference: float) -> str:
    """-0.899 → `89.9% below`."""
    return f"{abs(difference):.1%} {'below' if difference < 0 else 'above'}"


def _budgets(planner: Planner) -> list[Budget]:
    """Bits per weight from the smallest plan to 8 or so, for the frontier."""
    low, high = (8 * value / planner.problem.num_weights for value in planner.range_of("stored"))
    high = min(high, max(8.5, low + 1))
    steps = [low + (high - low) * (number + 0.25) / FRONTIER_POINTS for number in range(FRONTIER_POINTS)]
    return [parse_budget(f"{bits:.3f}bpw") for bits in steps]


@dataclass(frozen=True)
class SensitivityReport:
    """What `amalgam evaluate --sensitivity` shows."""

    cost: Cost
    num_tokens: int
    folder: str
    weights: Mapping[str, Any]
    scores: Scores
    ranks: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_sensitivities(
    settings: Settings,
    options: PlanOptions,
    progress: Progress | None = None,
    announce: Callable[[Cost], None] = lambda cost: None,
) -> SensitivityReport:
    """Measure, or read what was measured; and the scores that need no texts beside it."""
    studio = Studio(settings, options, progress, announce)
    weights = {
        name: {"num_tokens": each.num_tokens, "gate_mass": each.gate_mass, "options": dict(each.options)}
        for name, each in studio.sensitivities.weights.items()
    }
    found = scores(studio.loader, studio.problem, progress)
    return SensitivityReport(
        studio.study.cost(),
        studio.calibration.num_tokens,
        str(studio.study.folder),
        weights,
        found,
        found.ranks(studio.sensitivities),
    )
