"""What a decoding step of Qwen3-30B-A3B reads and launches on a GPU, and how fast that lets it be: arithmetic.

    python benchmarks/gpu_model.py                                   # tables
    python benchmarks/gpu_model.py --picture docs/images/gpu-model.svg
    python benchmarks/gpu_model.py --use traffic.safetensors         # a measured skew, from `amalgam experts --save`

The model's real program is emitted, with weights that have a shape and a layout but no memory, and gone through
instruction by instruction: what each launches on the Triton backend, and what every launch reads. What that leaves to
torch (recurrent states, splits) counts operator by operator. Experts that a step
of n sequences reads are an expectation: 1 - (1 - p)^n of each that a token uses with probability p, evenly p = k / E. A
measured skew is the share of the activations by rank, stretched to this model's number of experts.

A launch takes as long as its bytes at the card's published bandwidth, and at least `--launch` seconds (a launch of a
captured CUDA graph). *share*: of the card's bandwidth that a step can then reach at most. Where a card cannot hold the
weights, the most used experts lie on it and the others are computed by the processors at the same time: a layer's mix
takes the longer of both, and activations cross the bus twice in each layer.

**Nothing here was measured on a card.** Caches, imperfect kernels, arithmetic, sampling on the processors and the gaps
between launches all make it slower. Prints tables, and one JSON object as the last line; `--json` prints that alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections import Counter as Counted
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amalgam.cli.console import out
from amalgam.experts.saved.files import load
from amalgam.kernels.backends.reference.execution import execute
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.layouts import E2M1, LAYOUTS, dense
from amalgam.kernels.program import (
    Add,
    Attend,
    Clamp,
    Convolve,
    DeltaRule,
    Embed,
    Gelu,
    Head,
    Instruction,
    Mix,
    Normalize,
    Program,
    Project,
    Route,
    Scale,
    ScaleBySigmoid,
    ScanStates,
    Split,
    SwiGlu,
    rows_of,
)
from amalgam.kernels.step import Cache, LayerState, SequenceState, StepContext, StepSequence
from amalgam.kernels.weights import ExpertTable, PackedWeight
from amalgam.models.decoder import emit, ropes_of
from amalgam.models.registry import read_spec
from amalgam.models.spec import ModelSpec, Slot
from amalgam.models.weights import WeightVersion
from amalgam.planning.cards import Card, known_cards, parse_card, rate_of
from amalgam.tools.bench import SHAPES, commit
from amalgam.tools.estimate import workspace_bytes

Floats = npt.NDArray[np.float64]

QWEN3_30B = {**SHAPES["S"], "vocab_size": 151936, "num_hidden_layers": 48, "num_experts": 128}
SEQUENCES = (1, 16, 64)
# Plan → format of the experts by rank of their use (share of them, format), the format of the other products.
PLANS: dict[str, tuple[tuple[tuple[float, str], ...], str]] = {
    "bf16": (((1.0, "bf16"),), "bf16"),
    "fp8": (((1.0, "fp8"),), "fp8"),
    "int8": (((1.0, "int8"),), "int8"),
    "int4": (((1.0, "int4"),), "int4"),
    "mixed": (((0.25, "fp8"), (0.75, "int4")), "fp8"),
}
BFLOAT16, GROUP, BLOCK = 2, 128, 128
# Decoding attends in two launches: ranges of each sequence's context, then what they make together.
ATTENTION_LAUNCHES = 2
# What the Triton backend has no kernel for and leaves to torch, operator by operator.
Torch = Clamp | Convolve | DeltaRule | Scale | ScaleBySigmoid | ScanStates | Split


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what it reads and leaves in the card's memory.

    Attributes:
        weight_bytes: expected, where it depends on the routing.
    """

    kind: str
    weight_bytes: float
    cache_bytes: float
    activation_bytes: float

    @property
    def nbytes(self) -> float:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


@dataclass(frozen=True)
class Host:
    """The processors beside a card, and the bus between them.

    Attributes:
        bandwidth: bytes a second of their memory.
        wait: seconds that a crossing takes beside its bytes.
    """

    bandwidth: float
    wait: float


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def blank_weight(shape: tuple[int, ...], kind: str) -> PackedWeight:
    """A weight that has the parts of a layout and no memory."""
    if kind == "bf16" or len(shape) != 2:
        return dense(meta(*shape, dtype=torch.bfloat16))
    rows, columns = shape
    if kind == "fp8":  # blocks of 128 × 128, as Qwen publishes it
        scale = meta(-(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.float32)
        parts = {"weight": meta(*shape, dtype=torch.float8_e4m3fn), "scale": scale}
        return PackedWeight(LAYOUTS["scaled8"], shape, parts, (BLOCK, BLOCK))
    if kind == "int8":  # a scale for each row
        parts = {"weight": meta(*shape, dtype=torch.int8), "scale": meta(rows, 1, dtype=torch.bfloat16)}
        return PackedWeight(LAYOUTS["scaled8"], shape, parts, (1, columns))
    codes = meta(rows, columns // 2, dtype=torch.uint8)
    if kind == "mxfp4":
        scale = meta(rows, columns // 32, dtype=torch.float8_e8m0fnu)
        return PackedWeight(
            LAYOUTS["table4"], shape, {"weight": codes, "scale": scale, "table": torch.tensor(E2M1)}, (1, 32)
        )
    assert kind == "int4", kind
    scale = meta(rows, columns // GROUP, dtype=torch.bfloat16)
    return PackedWeight(LAYOUTS["int4"], shape, {"weight": codes, "scale": scale}, (1, GROUP))


def blank_version(spec: ModelSpec, experts: Sequence[tuple[float, str]], others: str) -> WeightVersion:
    """Slots of one shape and format share their weight; an expert's number is the rank of its use."""
    ends = np.cumsum([share for share, _ in experts]) * spec.num_experts

    def kind_of(slot: Slot) -> str:
        if slot.role == "expert":
            rank = int(slot.name.split(".")[-2])
            return next(kind for end, (_, kind) in zip(ends, experts, strict=True) if rank < round(end))
        return others if slot.is_linear and slot.role not in ("head", "router") else "bf16"

    made: dict[tuple[tuple[int, ...], str], PackedWeight] = {}
    weights = {}
    for slot in spec.slots:
        key = slot.shape, kind_of(slot)
        made.setdefault(key, blank_weight(*key))
        weights[slot.name] = made[key]
    return WeightVersion(1, weights, {}, {})


def read_chances(use: Sequence[float], sequences: int) -> Floats:
    """Of each expert, how likely a step reads it."""
    return np.asarray(1.0 - (1.0 - np.asarray(use)) ** sequences)


def even_use(spec: ModelSpec) -> list[float]:
    return [spec.num_active_experts / spec.num_experts] * spec.num_experts


def measured_use(path: Path, spec: ModelSpec) -> list[float]:
    """Chances that a token uses an expert, by rank: a saved set's, stretched to this model's number of experts."""
    saved = load(str(path))
    layers = []
    for counts in saved.total.counts.sum(axis=0):
        ranked = np.sort(counts)[::-1]
        layers.append(np.interp(np.linspace(0, 1, spec.num_experts + 1), np.linspace(0, 1, len(ranked) + 1),
                                np.concatenate([[0.0], np.cumsum(ranked) / max(1, ranked.sum())])))  # fmt: skip
    shares = np.diff(np.mean(layers, axis=0))
    use = shares * spec.num_active_experts
    while use.max() > 1.0:  # no token uses an expert twice
        over = use >= 1.0
        rest = spec.num_active_experts - over.sum()
        use = np.where(over, 1.0, use * rest / use[~over].sum())
    return [float(value) for value in use]


class Launched(TorchDispatchMode):
    """Notes torch's operators that would be launched within it.

    Attributes:
        nbytes: what each of them reads and leaves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.nbytes.append(float(sum(tensor.nbytes for tensor in tensors)))
        return result


class Counter:
    """Goes through a program as the Triton backend runs it.

    Args:
        use: chance of each expert that a token uses it, by rank.
    """

    def __init__(
        self, spec: ModelSpec, sequences: int, context: int, use: Sequence[float], kv_bytes: int = BFLOAT16
    ) -> None:
        self._spec = spec
        self._rows = sequences
        self._context = context
        self._chances = read_chances(use, sequences)
        self._kv_bytes = kv_bytes
        self._of_torch: dict[object, list[Launch]] = {}

    def launches(self, program: Program, is_on_card: Callable[[int], bool] = lambda rank: True) -> list[Launch]:
        found: list[Launch] = []
        for instruction in program.instructions:
            found += self._of(instruction, is_on_card)
        return found

    def _launch(self, kind: str, weights: float = 0.0, cache: float = 0.0, width: float = 0.0) -> Launch:
        """width: elements of each row that are read and left."""
        return Launch(kind, weights, cache, width * self._rows * BFLOAT16)

    def _of(self, one: Instruction, is_on_card: Callable[[int], bool]) -> Iterator[Launch]:
        if isinstance(one, Embed):
            row = one.weight.nbytes / one.weight.shape[0]
            yield self._launch("embed", weights=row * self._rows, width=one.out.width)
        elif isinstance(one, Normalize):  # with what is added before
            yield self._launch("norm", width=(4 if one.delta is not None else 2) * one.x.width)
        elif isinstance(one, Project):  # weights of one layout in one launch
            for kind in dict.fromkeys(_kind(part.weight) for part in one.projections):
                parts = [part for part in one.projections if _kind(part.weight) == kind]
                width = one.x.width + sum(part.out.width for part in parts)
                yield self._launch("project", sum(part.weight.nbytes for part in parts), width=width)
        elif isinstance(one, Attend):
            yield from self._attend(one)
        elif isinstance(one, Route):
            yield self._launch("route", one.weight.nbytes, width=one.x.width + 2 * one.k)
            yield self._launch("choose", width=2 * one.k + one.weight.shape[0])
        elif isinstance(one, Mix):
            yield from self._mix(one, is_on_card)
        elif isinstance(one, SwiGlu | Add):
            yield self._launch("elementwise", width=3 * one.out.width if isinstance(one, SwiGlu) else 3 * one.x.width)
        elif isinstance(one, Gelu):
            yield self._launch("elementwise", width=2 * one.x.width)
        elif isinstance(one, Head):
            yield self._launch("head", one.weight.nbytes, width=one.x.width + 2 * one.weight.shape[0])
        elif isinstance(one, Torch):
            key = type(one), tuple((rows.width, rows.stride) for rows in rows_of(one))
            if key not in self._of_torch:
                self._of_torch[key] = [Launch("torch", 0.0, 0.0, nbytes) for nbytes in self._by_torch(one)]
            yield from self._of_torch[key]
        else:
            raise NotImplementedError(type(one).__name__)

    def _by_torch(self, one: Torch) -> list[float]:
        """Bytes of each operator that an instruction is for torch, found by running it on tensors without memory."""
        states = [
            None if shape is None else LayerState(*(meta(self._rows, *part, dtype=torch.float32) for part in shape))
            for shape in self._spec.state_shapes
        ]
        sequences = [StepSequence([0], self._context, (), 1, SequenceState(slot, slot)) for slot in range(self._rows)]
        step = StepContext(sequences, cast(Cache, SimpleNamespace(states=states, device=torch.device("meta"))))
        frame = Frame(step, torch.bfloat16, ())
        for rows in rows_of(one):
            frame.put(rows, meta(self._rows, rows.width, dtype=torch.float32 if rows.is_wide else torch.bfloat16))
        with Launched() as found:
            execute(one, frame)
        return found.nbytes

    def _attend(self, one: Attend) -> Iterator[Launch]:
        kept = 2 * one.num_kv_heads * one.head_dim * self._kv_bytes
        width = one.query.width + one.key.width
        yield self._launch("prepare heads", cache=self._rows * kept, width=2 * width + one.value.width)
        reads = min(self._context, one.window or self._context)
        yield self._launch("attend", cache=self._rows * reads * kept, width=one.query.width + one.out.width)
        for _ in range(ATTENTION_LAUNCHES - 1):
            yield self._launch("attend", width=2 * one.out.width)

    def _mix(self, one: Mix, is_on_card: Callable[[int], bool]) -> Iterator[Launch]:
        """Choices by expert; a launch for each format of gate and up, with what joins them, and of down; the sum."""
        k, width, inner = self._spec.num_active_experts, one.x.width, one.experts[0].gate.shape[0]
        chances = self._chances * np.array([is_on_card(rank) for rank in range(len(one.experts))])
        yield self._launch("sort", width=2 * k)
        for name, (kinds, sizes) in expert_bytes(one.experts).items():
            for kind in dict.fromkeys(kinds):
                own = chances * np.array([each == kind for each in kinds])
                if own.any():
                    share = float(own.sum() / self._chances.sum())
                    yield self._launch(name, float(own @ sizes), width=share * k * (width + inner))
        yield self._launch("sum", width=(k + 1) * width)


@functools.cache
def expert_bytes(experts: ExpertTable) -> dict[str, tuple[list[Any], Floats]]:
    """Launch → of each expert the formats that it reads and their bytes."""
    parts = {"gate up": [(e.gate, e.up) for e in experts.experts], "down": [(e.down,) for e in experts.experts]}
    return {
        name: (
            [tuple(map(_kind, weights)) for weights in each],
            np.array([sum(weight.nbytes for weight in weights) for weights in each], dtype=float),
        )
        for name, each in parts.items()
    }


def _kind(weight: PackedWeight) -> tuple[str, torch.dtype]:
    return weight.layout.name, weight.parts["weight"].dtype


def weight_bytes(launches: Sequence[Launch]) -> float:
    return sum(launch.weight_bytes for launch in launches)


def seconds_of(launch: Launch, card: Card, least: float) -> float:
    assert card.bandwidth is not None, card
    return max(least, launch.nbytes / card.bandwidth)


@dataclass(frozen=True)
class Bound:
    """What a card cannot be faster than; never measured.

    Attributes:
        resident: share of the experts that lie on the card.
        processor_bytes: that the processors read in a step; 0: all lies on the card.
        share: of the card's bandwidth.
    """

    plan: str
    use: str
    card: str
    sequences: int
    launches: int
    card_bytes: float
    processor_bytes: float
    resident: float
    bytes_ms: float
    step_ms: float
    share: float
    tokens_per_second: float


@dataclass(frozen=True)
class Model:
    """One plan of the model at one load."""

    name: str
    use_name: str
    spec: ModelSpec
    program: Program
    weights_bytes: int
    sequences: int
    context: int
    use: Sequence[float]

    @property
    def counter(self) -> Counter:
        return Counter(self.spec, self.sequences, self.context, self.use)

    @cached_property
    def everything(self) -> list[Launch]:
        """What the step launches where all experts lie on the card."""
        return self.counter.launches(self.program)

    @cached_property
    def experts_bytes(self) -> Floats:
        """Of each rank, over all layers."""
        tables = (expert_bytes(one.experts) for one in self.program.instructions if isinstance(one, Mix))
        return np.asarray(np.sum([sizes for table in tables for _, sizes in table.values()], axis=0))

    def ranks_on(self, card: Card) -> int | None:
        """How many of each layer's experts, the most used first, lie on a card beside everything else; None: it does
        not hold that alone."""
        heads = (one.num_kv_heads * one.head_dim for one in self.program.instructions if isinstance(one, Attend))
        kept = self.sequences * self.context * sum(2 * width * BFLOAT16 for width in heads)
        kept += self.sequences * self.spec.state_bytes
        work = workspace_bytes(self.spec, self.sequences, self.sequences, torch.bfloat16)
        experts = self.experts_bytes
        room = card.memory_bytes - kept - work - (self.weights_bytes - int(experts.sum()))
        return None if room < 0 else int(np.searchsorted(np.cumsum(experts), room, side="right"))

    def bound(self, card: Card, least: float, host: Host) -> Bound | None:
        """None: the card does not even hold what is beside the experts."""
        ranks, all_ranks = self.ranks_on(card), self.spec.num_experts
        if ranks is None:
            return None
        launches = self.everything
        if ranks < all_ranks:
            launches = self.counter.launches(self.program, lambda rank: rank < ranks)
        far = weight_bytes(self.everything) - weight_bytes(launches)
        near = [seconds_of(launch, card, least) for launch in launches]
        total = sum(near)
        if ranks < all_ranks:
            layers = self.spec.num_layers
            mixing = sum(t for t, launch in zip(near, launches, strict=True) if launch.kind in ("gate up", "down"))
            crossing = 2 * self.sequences * self.spec.hidden_size * BFLOAT16 / (card.host_bandwidth or math.inf)
            processors = far / layers / host.bandwidth + crossing + 2 * host.wait
            total += layers * max(0.0, processors - mixing / layers)
        nbytes = sum(launch.nbytes for launch in launches)
        alone = nbytes / (card.bandwidth or math.inf)
        return Bound(
            self.name, self.use_name, card.name, self.sequences, len(launches), nbytes, far, ranks / all_ranks,
            1e3 * alone, 1e3 * total, alone / total, self.sequences / total,
        )  # fmt: skip


def models(spec: ModelSpec, sequences: Sequence[int], context: int, uses: dict[str, list[float]]) -> Iterator[Model]:
    for name, (experts, others) in PLANS.items():
        version = blank_version(spec, experts, others)
        program = emit(spec, version, ropes_of(spec))
        for use_name, use in uses.items():
            for count in sequences:
                yield Model(name, use_name, spec, program, version.nbytes, count, context, use)


def counts_of(model: Model) -> dict[str, Any]:
    """Bytes and launches of a step with all weights on the card."""
    launches = model.everything
    experts = sum(one.weight_bytes for one in launches if one.kind in ("gate up", "down"))
    return {
        "plan": model.name,
        "use": model.use_name,
        "sequences": model.sequences,
        "weights_bytes": model.weights_bytes,
        "launches": len(launches),
        "distinct_experts": float(read_chances(model.use, model.sequences).sum()),
        "expert_bytes": experts,
        "other_weight_bytes": weight_bytes(launches) - experts,
        "cache_bytes": sum(one.cache_bytes for one in launches),
        "activation_bytes": sum(one.activation_bytes for one in launches),
        "launches_by_kind": dict(Counted(one.kind for one in launches)),
    }


def print_steps(rows: Sequence[dict[str, Any]], context: int) -> None:
    table = Table(
        "plan", "weights GB", "use", "sequences", "launches", "experts a layer", "experts GB", "others GB", "KV GB",
        title=f"What a step reads, {context} tokens of context",
    )  # fmt: skip
    for row in rows:
        sizes = (f"{row[name] / 1e9:.2f}" for name in ("expert_bytes", "other_weight_bytes", "cache_bytes"))
        table.add_row(
            row["plan"], f"{row['weights_bytes'] / 1e9:.1f}", row["use"], str(row["sequences"]), str(row["launches"]),
            f"{row['distinct_experts']:.1f}", *sizes,
        )  # fmt: skip
    out.print(table)


def print_bounds(card: Card, bounds: Sequence[Bound], sequences: Sequence[int]) -> None:
    """Rows: plan and use; for each number of sequences the share of the bandwidth and the tokens a second."""
    title = (
        f"{card.name}, {card.memory_bytes / 1e9:g} GB at {(card.bandwidth or 0) / 1e9:g} GB/s: at most (not measured)"
    )
    table = Table("plan", "use", *(f"{count} seq." for count in sequences), title=title)
    for plan, use in dict.fromkeys((one.plan, one.use) for one in bounds):
        cells = []
        for count in sequences:
            found = next((b for b in bounds if (b.plan, b.use, b.sequences) == (plan, use, count)), None)
            cells.append("does not fit" if found is None else _cell(found))
        table.add_row(plan, use, *cells)
    out.print(table)


def _cell(bound: Bound) -> str:
    where = "" if bound.resident == 1 else f", {bound.resident:.0%} of the experts on it"
    return f"{bound.tokens_per_second:,.0f} tok/s, {bound.share:.0%}{where}"


COLOURS = {"bf16": "#8250df", "fp8, int8": "#1f6feb", "int4": "#d1242f", "mixed": "#bf8700"}
DRAWN = {"bf16": "bf16", "fp8": "fp8, int8", "int4": "int4", "mixed": "mixed"}  # int8 has fp8's line
GREY = "#59636e"
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 260, 56, 40, 84  # of a diagram, with room around it
MARKS = (1, 2, 4, 8, 16, 32, 64)


def diagram(title: str, lines: dict[str, list[tuple[int, float]]], left: int) -> Iterator[str]:
    """SVG elements: share of the bandwidth over sequences."""

    def point(sequences: float, share: float) -> tuple[float, float]:
        x = left + WIDTH * math.log2(sequences) / math.log2(MARKS[-1])
        return round(x, 1), round(TOP + HEIGHT * (1 - share), 1)

    def line(points: Iterable[tuple[float, float]], style: str) -> str:
        return f'<polyline points="{" ".join(f"{x},{y}" for x, y in points)}" fill="none" {style}/>'

    def text(x: float, y: float, words: object, style: str) -> str:
        return f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>'

    yield text(left, TOP - 14, title, 'font-size="14" fill="#1f2328"')
    for mark in MARKS:
        yield text(point(mark, 0)[0], TOP + HEIGHT + 18, mark, f'text-anchor="middle" fill="{GREY}"')
    for share in (0, 0.25, 0.5, 0.75, 1):
        yield line([point(1, share), point(MARKS[-1], share)], 'stroke="#eaeef2"')
        yield text(left - 8, point(1, share)[1] + 4, f"{share:.0%}", f'text-anchor="end" fill="{GREY}"')
    yield text(left + WIDTH / 2, TOP + HEIGHT + 38, "sequences", f'text-anchor="middle" fill="{GREY}"')
    for number, (plan, points) in enumerate(lines.items()):
        style = f'stroke="{COLOURS[plan]}" stroke-width="2"'
        yield line([point(*each) for each in points], style)
        x, y = left + number * 96, TOP + HEIGHT + 66
        yield line([(x, y), (x + 18, y)], style)
        yield text(x + 24, y + 4, plan, 'fill="#1f2328"')


def picture(spec: ModelSpec, context: int, cards: Sequence[Card], least: float, host: Host) -> str:
    """An SVG with a diagram for each card: which share of its bandwidth the launches leave, used evenly."""
    use = {"even": even_use(spec)}
    shares: dict[str, dict[str, list[tuple[int, float]]]] = {card.name: {} for card in cards}
    for model in models(spec, MARKS, context, use):
        for card in cards:
            bound = model.bound(card, least, host)
            if bound is not None and bound.resident == 1 and model.name in DRAWN:
                shares[card.name].setdefault(DRAWN[model.name], []).append((model.sequences, bound.share))
    step = LEFT + WIDTH + 24
    size = f'width="{len(cards) * step}" height="{TOP + HEIGHT + BOTTOM}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="12">',
        f'<rect {size} fill="#ffffff"/>',
    ]
    for number, card in enumerate(cards):
        title = f"{card.name}: share of its bandwidth, at most"
        parts.extend(diagram(title, shares[card.name], LEFT + number * step))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", default=list(known_cards()), help="as `amalgam fit --gpu` takes them")
    parser.add_argument("--sequences", type=int, nargs="+", default=list(SEQUENCES))
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence")
    parser.add_argument("--use", type=Path, help="a saved set of expert statistics, for a measured skew")
    parser.add_argument("--launch", type=float, default=3e-6, help="least seconds of a launch (default: %(default)g)")
    parser.add_argument("--host", default="89.6GB/s", help="the processors' memory: two channels of DDR5-5600")
    parser.add_argument("--wait", type=float, default=10e-6, help="seconds that a crossing of the bus takes at least")
    parser.add_argument("--picture", type=Path, help="where to write the diagrams as SVG")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    arguments = parser.parse_args()
    host = Host(rate_of(arguments.host), arguments.wait)
    cards = [parse_card(text, "--cards") for text in arguments.cards]
    _, spec = read_spec(QWEN3_30B, "Qwen3-30B-A3B")
    uses = {"even": even_use(spec)}
    if arguments.use is not None:
        uses["skewed"] = measured_use(arguments.use, spec)
    found = list(models(spec, arguments.sequences, arguments.context, uses))
    steps = [counts_of(model) for model in found]
    bounds = {card.name: [model.bound(card, arguments.launch, host) for model in found] for card in cards}
    if not arguments.json:
        print_steps(steps, arguments.context)
        for card in cards:
            print_bounds(card, [bound for bound in bounds[card.name] if bound is not None], arguments.sequences)
    if arguments.picture:
        chosen = [known_cards()[name] for name in ("rtx-4090", "h200")]
        arguments.picture.write_text(picture(spec, arguments.context, chosen, arguments.launch, host), encoding="utf-8")
    record = {"command": sys.argv, "commit": commit(), "cards": [asdict(card) for card in cards], "host": asdict(host)}
    rows = {name: [asdict(bound) for bound in each if bound is not None] for name, each in bounds.items()}
    print(json.dumps({**record, "launch_seconds": arguments.launch, "uses": uses, "steps": steps, "bounds": rows}))


if __name__ == "__main__":
    main()
