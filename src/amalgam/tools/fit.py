"""What of a model this machine can run, and which of it to run: one recommendation with its reasons.

In: settings. Out: `FitReport`. Reads headers, and one weight of each kind to time it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from amalgam.base.machine import Machine, detect_machine
from amalgam.composition.loader import ModelLoader
from amalgam.composition.progress import Progress
from amalgam.config.settings import Settings
from amalgam.engine.memory import STATES_PER_SEQUENCE
from amalgam.models.kv_cache import KVCache, kv_type
from amalgam.planning.cards import Card, card_named
from amalgam.planning.devices import read_bandwidth
from amalgam.planning.pace import Sample, expected_step
from amalgam.runtime.device import choose_device
from amalgam.runtime.speculation import draft_bytes
from amalgam.runtime.threads import set_threads
from amalgam.tools.estimate import load_tokenizer, workspace_bytes
from amalgam.tools.fit_split import Parts, parts_of
from amalgam.tools.fit_ways import Stock, Way

SAFE_SHARE = 0.85  # of all memory that may be in use, with the model
MIN_CONTEXT = 512  # a plan that has not room for so much of one sequence is not recommended
_SAME_BITS = 0.5  # plans that differ by less are told apart by speed


@dataclass(frozen=True)
class Gpu:
    """One that PyTorch sees."""

    name: str
    memory_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Hardware:
    """Attributes:
    device: where the model would run.
    memory_bytes, available_bytes: of that device.
    bandwidth: bytes a second that are read of it, as published; None: not known, or not needed.
    far_bandwidth: of the processors' memory, measured; None: not measured.
    is_here: whether the device is in this machine, so that layers can be timed on it.
    """

    machine: Machine
    gpus: tuple[Gpu, ...]
    device: str
    memory_bytes: int
    available_bytes: int
    bandwidth: float | None = None
    far_bandwidth: float | None = None
    is_here: bool = True

    @property
    def room_bytes(self) -> int:
        """What a model may take, so that no more than `SAFE_SHARE` of all memory is in use."""
        return _room(self.available_bytes, self.memory_bytes)

    @property
    def far_room_bytes(self) -> int:
        """What experts may take in the processors' memory beside a card; 0: there is no card."""
        is_card = self.device.startswith("cuda")
        return _room(self.machine.available_bytes, self.machine.memory_bytes) if is_card else 0


def _room(available: int, memory: int) -> int:
    return max(0, available - int((1 - SAFE_SHARE) * memory))


@dataclass(frozen=True)
class Wanted:
    """What a user asks of a plan.

    Attributes:
        context: tokens of one sequence.
        sequences: most at a time.
        tokens_per_second: of one sequence, at least; 0: any.
    """

    context: int
    sequences: int
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One way to have the model.

    Attributes:
        name: `base`, a source's name, `as configured`, or a format that could be made.
        command: what makes it; empty: it is there.
        serve: what runs it.
        bits_per_weight: of the weights that are multiplied, as they lie in memory.
        weights_bytes: in memory.
        tokens_per_second: expected of one sequence; None: not measured.
        parts: of the weights.
    """

    name: str
    command: str
    serve: str
    bits_per_weight: float
    weights_bytes: int
    tokens_per_second: float | None
    parts: Parts = field(default_factory=Parts)


@dataclass(frozen=True)
class Needs:
    """What every candidate takes beside its weights, in bytes.

    Attributes:
        per_sequence: of the workspace.
        states: recurrent ones of a sequence, as many as the engine keeps.
        draft_per_block: of the KV cache of a draft that guesses tokens.
    """

    fixed: int
    per_sequence: int
    kv_per_block: int
    block_size: int
    states: int = 0
    draft_per_block: int = 0

    def of(self, context: int, sequences: int) -> int:
        per_block = self.kv_per_block + self.draft_per_block
        fixed = self.fixed + sequences * (self.per_sequence + self.states)
        return fixed + self.blocks(context, sequences) * per_block

    def blocks(self, context: int, sequences: int) -> int:
        return sequences * math.ceil(context / self.block_size)


@dataclass(frozen=True)
class Fit:
    """A candidate on this machine.

    Attributes:
        context: tokens of a sequence for which there is room, at most what is wanted; 0: not for `MIN_CONTEXT`.
        sequences: of that context.
        kv_bytes, state_bytes: for all of them.
        total_bytes: with KV cache, recurrent states, workspace, and the draft that guesses tokens.
        spare_bytes: room that is left; below zero what is missing for one sequence of the least context.
        far_experts: how many experts lie in the processors' memory instead, and what they take there.
        at_most: tokens a second of one sequence that the bytes and the published bandwidth of a card allow; None: not
            known. Not measured.
    """

    candidate: Candidate
    context: int
    sequences: int
    kv_bytes: int
    total_bytes: int
    spare_bytes: int
    state_bytes: int = 0
    far_experts: int = 0
    far_bytes: int = 0
    at_most: float | None = None

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0


@dataclass(frozen=True)
class Recommendation:
    """Attributes:
    reasons: sentences.
    commands: what to type, in order.
    """

    fit: Fit
    reasons: tuple[str, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class FitReport:
    """Attributes:
    left_out: source → why it cannot be had as a whole.
    has_tokenizer: whether one is counted in what this process takes.
    """

    model: str
    num_parameters: int
    num_active_parameters: int
    hardware: Hardware
    wanted: Wanted
    fits: tuple[Fit, ...]
    recommendation: Recommendation | None
    left_out: Mapping[str, str]
    has_tokenizer: bool

    def as_json(self) -> dict[str, Any]:
        document = asdict(self)
        document["hardware"]["room_bytes"] = self.hardware.room_bytes
        for row, fit in zip(document["fits"], self.fits, strict=True):
            row["fits"] = fit.fits
        return document


def detect_hardware(settings: Settings, card: Card | None = None) -> Hardware:
    """
    Args:
        card: that is asked about instead of what is here.

    Raises:
        ConfigError: `inference.device_map` names a GPU that is not there.
    """
    machine = detect_machine()
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        available, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, available))
    if card is not None:
        name = f"cuda ({card.name}, not in this machine)"
        memory, rate = card.memory_bytes, card.bandwidth
        return Hardware(machine, tuple(gpus), name, memory, memory, rate, is_here=False)
    device = choose_device(settings.inference.device_map)
    if device.type == "cuda":
        gpu = gpus[device.index or 0]
        known = card_named(gpu.name)
        bandwidth = None if known is None else known.bandwidth
        return Hardware(machine, tuple(gpus), str(device), gpu.memory_bytes, gpu.available_bytes, bandwidth)
    return Hardware(machine, tuple(gpus), "cpu", machine.memory_bytes, machine.available_bytes)


def fit_model(
    settings: Settings,
    wanted: Wanted | None = None,
    *,
    measures: bool = True,
    config: Path | None = None,
    hardware: Callable[[Settings], Hardware] = detect_hardware,
    progress: Progress | None = None,
    card: Card | None = None,
) -> FitReport:
    """
    Args:
        wanted: None: as the settings say.
        measures: whether to time layers, which takes seconds; otherwise no speed is told.
        config: the file that the settings came from, for the commands.
        card: to ask about one that is not here; nothing is timed then.

    Raises:
        AmalgamError: the base checkpoint cannot be read.
    """
    set_threads(settings.engine)
    device = choose_device(settings.inference.device_map) if card is None else torch.device("cuda")
    loader = ModelLoader(settings.model, settings.inference, device, settings.engine.num_load_threads)
    spec = loader.spec
    limit = spec.max_positions
    if wanted is None:
        wanted = Wanted(settings.inference.max_seq_length, settings.inference.max_batch_size)
    asked, wanted = wanted.context, replace(wanted, context=min(wanted.context, limit))
    knows_tokenizer = load_tokenizer(loader)
    found = hardware(settings) if card is None else detect_hardware(settings, card)
    if found.far_room_bytes and measures:
        found = replace(found, far_bandwidth=read_bandwidth())
    needs = _needs(settings, loader, wanted)
    stock = Stock(settings, loader, config)
    ways = list(stock.ways())
    speeds: list[float | None] = [None] * len(ways)
    if measures and found.is_here:
        speeds = list(_speeds(loader, settings, device, ways, progress))
    candidates = [
        Candidate(way.name, way.command, way.serve, way.bits, way.memory_bytes, speed, parts_of(spec, way.held))
        for way, speed in zip(ways, speeds, strict=True)
    ]
    fits = tuple(fit_on(candidate, needs, found, wanted) for candidate in candidates)
    best = recommend(fits, found, wanted)
    if best is not None and asked > limit:
        reason = f"{asked:,} tokens of context are asked for, and the model has {limit:,} positions."
        best = replace(best, reasons=(*best.reasons, reason))
    return FitReport(
        settings.model.name or loader.base_folder.name,
        spec.num_parameters,
        spec.num_active_parameters,
        found,
        wanted,
        fits,
        best,
        stock.left_out,
        knows_tokenizer,
    )


def _needs(settings: Settings, loader: ModelLoader, wanted: Wanted) -> Needs:
    dtype: torch.dtype = getattr(torch, settings.inference.dtype)
    engine = settings.engine
    per_block = KVCache.bytes_per_block(loader.spec, engine.block_size, kv_type(engine.kv_dtype, dtype))
    step = min(engine.max_step_tokens, wanted.sequences * wanted.context)
    one, two = (workspace_bytes(loader.spec, step, count, dtype) for count in (1, 2))
    states = STATES_PER_SEQUENCE * loader.spec.state_bytes
    draft = draft_bytes(settings, loader, 0)
    draft_per_block = draft_bytes(settings, loader, 1) - draft
    return Needs(one - (two - one) + draft, two - one, per_block, engine.block_size, states, draft_per_block)


def fit_candidate(candidate: Candidate, needs: Needs, room: int, wanted: Wanted) -> Fit:
    """As long a context as there is room for, up to what is wanted; then as many sequences."""
    left = room - candidate.weights_bytes
    least = min(MIN_CONTEXT, wanted.context)
    if needs.of(least, 1) > left:
        total = candidate.weights_bytes + needs.of(least, 1)
        return Fit(candidate, 0, 0, 0, total, room - total)
    blocks = (left - needs.of(0, 1)) // max(1, needs.kv_per_block + needs.draft_per_block)
    context = min(wanted.context, blocks * needs.block_size)
    sequences = wanted.sequences
    while sequences > 1 and needs.of(context, sequences) > left:
        sequences = min(sequences - 1, _sequences_at_most(needs, context, left))
    total = candidate.weights_bytes + needs.of(context, sequences)
    kv_bytes = needs.blocks(context, sequences) * needs.kv_per_block
    return Fit(candidate, context, sequences, kv_bytes, total, room - total, sequences * needs.states)


def fit_on(candidate: Candidate, needs: Needs, hardware: Hardware, wanted: Wanted) -> Fit:
    """On the device, or, where a card has not room for the whole context, with some experts beside it."""
    room, parts = hardware.room_bytes, candidate.parts
    fit = fit_candidate(candidate, needs, room, wanted)
    if fit.context < wanted.context and hardware.far_room_bytes:
        far = parts.far_experts(candidate.weights_bytes + needs.of(wanted.context, 1) - room)
        far_bytes = parts.bytes_of(far)
        if far <= parts.num_experts and far_bytes <= hardware.far_room_bytes:
            near = replace(candidate, weights_bytes=candidate.weights_bytes - far_bytes)
            split = fit_candidate(near, needs, room, wanted)
            fit = replace(split, candidate=candidate, far_experts=far, far_bytes=far_bytes)
    at_most = parts.tokens_per_second(fit.far_experts, hardware.bandwidth, hardware.far_bandwidth)
    return replace(fit, at_most=at_most)


def _sequences_at_most(needs: Needs, context: int, left: int) -> int:
    return max(1, (left - needs.fixed) // (needs.of(context, 1) - needs.fixed))


def recommend(fits: Sequence[Fit], hardware: Hardware, wanted: Wanted) -> Recommendation | None:
    """The widest candidate that fits with all of the wanted context and is fast enough; None: none fits.

    One that a card holds alone goes before those with experts beside it, which are slower.
    Where none has all that is wanted: the context is given up first, then the speed. Where nothing is fast enough,
    what has the whole context goes before what is wider.
    """
    fitting = [fit for fit in fits if fit.fits]
    if not fitting:
        return None
    fitting = [fit for fit in fitting if not fit.far_experts] or fitting
    pool = [fit for fit in fitting if is_fast_enough(fit, wanted)] or fitting
    pool = [fit for fit in pool if fit.context >= wanted.context] or pool
    widest = max(fit.candidate.bits_per_weight for fit in pool)
    alike = [fit for fit in pool if fit.candidate.bits_per_weight > widest - _SAME_BITS]
    # What is there is preferred to what has to be made, unless that is faster by more than noise.
    best = max(alike, key=lambda fit: (round(_speed(fit) / max(map(_speed, alike), default=1) * 10), _is_there(fit)))
    size = f" --inference.max_seq_length {best.context} --inference.max_batch_size {best.sequences}"
    # Without a size the engine takes no more than a share of what is available, and may have to refuse.
    size += f" --engine.kv_cache_bytes {best.kv_bytes}" if best.kv_bytes else ""
    size += f" --engine.state_cache_bytes {best.state_bytes}" if best.state_bytes else ""
    commands = [best.candidate.command, best.candidate.serve + size]
    if best.far_experts:
        commands[1:] = [_planning(best, hardware), "amalgam serve --config plan.yaml" + size]
    return Recommendation(best, tuple(_reasons(best, fits, hardware, wanted)), tuple(filter(None, commands)))


def _planning(best: Fit, hardware: Hardware) -> str:
    """What says which experts lie where: it writes the configuration that is served then."""
    budget = f"cuda={hardware.room_bytes / 1e9:.1f}GB,cpu={hardware.far_room_bytes / 1e9:.1f}GB"
    words = best.candidate.serve.replace("amalgam serve", "amalgam plan", 1)
    return f"{words} --budget {budget} --context {best.context} --text FILE --out plan.yaml"


def is_fast_enough(fit: Fit, wanted: Wanted) -> bool:
    speed = fit.candidate.tokens_per_second
    return speed is None or speed >= wanted.tokens_per_second


def _speed(fit: Fit) -> float:
    return fit.candidate.tokens_per_second or 1.0


def _is_there(fit: Fit) -> bool:
    return not fit.candidate.command


def _reasons(best: Fit, fits: Sequence[Fit], hardware: Hardware, wanted: Wanted) -> Iterator[str]:
    name = best.candidate.name
    yield (
        f"{name} has {best.candidate.bits_per_weight:.1f} bits a weight and takes {_gb(best.total_bytes)} of the "
        f"{_gb(hardware.room_bytes)} that a model may take here ({SAFE_SHARE:.0%} of {_gb(hardware.memory_bytes)}, "
        "less what is in use)."
    )
    if best.far_experts:
        yield (
            f"The card alone cannot hold it: {best.far_experts} of {best.candidate.parts.num_experts} experts, "
            f"{_gb(best.far_bytes)}, lie in the processors' memory, and these compute them. Those that are used least "
            "cost least there: `amalgam plan` finds them."
        )
    if best.at_most is not None:
        yield (
            f"At most {best.at_most:,.0f} tok/s of one sequence are expected: the bytes of a step over the bandwidth "
            "that is given or published for the card. Not measured on a card."
        )
    for fit in fits:
        if fit.candidate.bits_per_weight <= best.candidate.bits_per_weight + _SAME_BITS:
            continue
        if fit.far_experts and not best.far_experts:
            yield (
                f"{fit.candidate.name} is wider, and the card holds it only without {fit.far_experts} experts "
                f"({_gb(fit.far_bytes)}), which the processors would compute."
            )
        elif not fit.fits:
            yield f"{fit.candidate.name} is wider and does not fit: it lacks {_gb(-fit.spare_bytes)}."
        elif not is_fast_enough(fit, wanted) and is_fast_enough(best, wanted):
            yield (
                f"{fit.candidate.name} is wider and too slow: {fit.candidate.tokens_per_second:.1f} tok/s, where "
                f"{wanted.tokens_per_second:g} are wanted."
            )
        else:
            yield f"{fit.candidate.name} is wider, but has room for {fit.context:,} tokens of context only."
    if not is_fast_enough(best, wanted):
        yield f"Nothing that fits makes {wanted.tokens_per_second:g} tok/s."
    if best.context < wanted.context:
        yield f"There is room for {best.context:,} of the {wanted.context:,} tokens of context that are wanted."
    if best.sequences < wanted.sequences:
        yield f"There is room for {best.sequences} of {wanted.sequences} sequences of that length at a time."
    faster = [
        fit
        for fit in fits
        if fit.fits and fit is not best and _speed(fit) > 1.2 * _speed(best) and fit.candidate.tokens_per_second
    ]
    if faster and best.candidate.tokens_per_second:
        other = max(faster, key=_speed)
        yield (
            f"{other.candidate.name} would be {_speed(other) / _speed(best):.1f} times as fast, with "
            f"{other.candidate.bits_per_weight:.1f} bits a weight (--min-speed asks for that)."
        )


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def _speeds(
    loader: ModelLoader, settings: Settings, device: torch.device, ways: Sequence[Way], progress: Progress | None
) -> Iterator[float]:
    """Tokens a second of each, for one sequence with a short context."""
    dtype: torch.dtype = getattr(torch, settings.inference.dtype)
    for number, way in enumerate(ways):
        if progress is not None:
            progress("Timing layers", number, len(ways))
        samples = {slot.name: Sample(held.kind if slot.is_linear else None, held.load) for slot, held in way.held}
        yield 1.0 / expected_step(loader.spec, samples.__getitem__, dtype, device)
    if progress is not None:
        progress("Timing layers", len(ways), len(ways))
