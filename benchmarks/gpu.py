"""What a GPU is to reach, measured on the card that is here: one command, at most eight minutes.

    python benchmarks/gpu.py                                             # Qwen3-30B-A3B's shape, random weights
    python benchmarks/gpu.py --plans bf16 --without-transformers
    python benchmarks/gpu.py --tiny --device cpu                         # the script itself, where there is no card

First the kernels: a layer in each format, as steps of 1, 16 and 64 sequences and as a prompt, against PyTorch in
float32; they may be about as far from that as PyTorch in bfloat16 is, and repeat their bits. Then the engine as it
serves, sampling included: the median step of so many sequences behind `--context` tokens, as the share that its bytes
(counted by `gpu_model.py`, experts used evenly) are of the card's published bandwidth; a prompt, as the share that its
products are of the published bf16 peak; as many sequences with transformers; a mixed plan against its formats alone.

Each figure has its target beside it. What the time does not suffice for is said to be missing. The last line is one
JSON object. The first run compiles the kernels, which `~/.triton` keeps. **No run on a card is known.**
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from gpu_model import PLANS, QWEN3_30B, Model, blank_version, even_use
from rich.table import Table
from torch import Tensor

from amalgam.cli.console import out
from amalgam.config.reading import load_settings
from amalgam.engine.core import Engine
from amalgam.kernels.backends import Backend, choose_backend
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.kernels.weights import PackedWeight
from amalgam.models.decoder import Decoder, emit, ropes_of
from amalgam.models.kv_cache import KVCache
from amalgam.models.registry import read_spec
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion
from amalgam.planning.cards import card_named, rate_of
from amalgam.runtime.threads import set_threads
from amalgam.tools.bench import commit, hardware, prompt_seconds, step_seconds, word_tokenizer

TINY = {
    **QWEN3_30B,
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}
# bf16 products with float32 sums, a second, without sparsity; by what PyTorch's name of a card contains. NVIDIA's data
# sheets of the A100, H100, H200, L40S; the Ada and Blackwell white papers.
PEAKS = {"A100": 312e12, "H100 80GB HBM3": 989e12, "H200": 989e12, "L40S": 362e12, "RTX 4090": 165e12, "B200": 2250e12}
DECODE_TARGETS = {1: 0.35, 16: 0.50, 64: 0.60}
PROMPT_TARGET, TRANSFORMERS_TARGET, MIXED_TARGET = 0.50, 10.0, 1.10
SIZE = 0.02  # of weights
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    spec: ModelSpec
    config: dict[str, Any]
    sequences: tuple[int, ...]
    context: int
    prompt: int
    beside_transformers: int
    num_tokens: int
    repeats: int


@dataclass(frozen=True)
class Place:
    """Where it runs.

    Attributes:
        bandwidth, peak: published, of a second; None: not known.
    """

    device: torch.device
    bandwidth: float | None
    peak: float | None

    def is_met(self, has_met: bool) -> bool | None:
        """Targets of speed are a card's."""
        return has_met if self.device.type == "cuda" else None


@dataclass(frozen=True)
class Figure:
    """One line of the result; target: None: there is none. is_met: None: not measured, or without a target."""

    name: str
    value: float | None
    unit: str
    target: str = ""
    is_met: bool | None = None
    note: str = ""


@dataclass
class Report:
    """Figures as they come, and how much time is left for more."""

    minutes: float
    figures: list[Figure] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def has_time_for(self, name: str, seconds: float) -> bool:
        """Whether so much is left; else the figure is noted as missing."""
        if self.seconds + seconds <= 60 * self.minutes:
            return True
        self.add(Figure(name, None, "", note=f"left out: {self.seconds:.0f} s of {60 * self.minutes:.0f} are gone"))
        return False

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        value = "–" if figure.value is None else f"{figure.value:.4g}"
        print(f"{self.seconds:6.1f} s  {figure.name}: {value} {figure.unit} {figure.note}", file=sys.stderr, flush=True)


def filled(weight: PackedWeight, device: torch.device) -> PackedWeight:
    """A weight of a shape and a layout with random values of about `SIZE`, in memory of its own on the device."""
    values = weight.parts["weight"]
    # By how much codes are larger than one on average.
    codes = {torch.float8_e4m3fn: 1.0, torch.int8: 73.0, torch.uint8: 4.6}.get(values.dtype, 1.0)
    parts = {}
    for name, part in weight.parts.items():
        if name == "table":
            parts[name] = part.to(device)
        elif part.dtype is torch.uint8:
            parts[name] = torch.randint(0, 256, part.shape, dtype=torch.uint8, device=device)
        elif part.dtype is torch.int8:
            parts[name] = torch.randint(-127, 128, part.shape, dtype=torch.int8, device=device)
        elif name == "weight" and part.dtype is not torch.float8_e4m3fn:
            is_norm = part.dim() == 1
            parts[name] = torch.randn(part.shape, device=device).mul_(SIZE).add_(float(is_norm)).to(part.dtype)
        elif name == "weight":
            parts[name] = torch.randn(part.shape, device=device).to(part.dtype)
        else:
            parts[name] = (torch.rand(part.shape, device=device) + 0.5).mul_(SIZE / codes).to(part.dtype)
    return PackedWeight(weight.layout, weight.shape, parts, weight.block)


def version_of(spec: ModelSpec, plan: str, backend: Backend, device: torch.device) -> WeightVersion:
    """Random weights under one of `PLANS`, as the backend reads them."""
    torch.manual_seed(0)
    experts, others = PLANS[plan]
    blank = blank_version(spec, experts, others)
    made = {}
    for slot in spec.slots:
        weight = filled(blank[slot.name], device)
        if slot.is_linear or slot.decides:
            weight = backend.prepare(weight, "bf16", codes=False)
        made[slot.name] = weight
    return WeightVersion(1, made, {}, {})


# --- Correctness ---


def check(scale: Scale, place: Place, plan: str) -> Figure:
    """One layer's logits: how far from float32 they are, in parts of how far PyTorch in bfloat16 is."""
    _, spec = read_spec({**scale.config, "num_hidden_layers": 1}, "one layer")
    version = version_of(spec, plan, choose_backend(torch.bfloat16, place.device), place.device)
    longest = max(scale.prompt // 8, 16)
    ours = Decoder(spec, longest, torch.bfloat16, place.device)
    theirs = Decoder(spec, longest, torch.bfloat16, place.device, ReferenceBackend)
    exact = Decoder(spec, longest, torch.float32, place.device, ReferenceBackend)
    worst, repeats = 0.0, True
    steps = [[[(31 * row + 7) % spec.vocab_size] for row in range(count)] for count in scale.sequences]
    for tokens in [*steps, [[(17 * row) % spec.vocab_size for row in range(longest)]]]:
        expected = logits_of(exact, version, tokens)
        far, near = (distance(logits_of(one, version, tokens), expected) for one in (theirs, ours))
        worst = max(worst, near / far)
        first = logits_of(ours, version, tokens)
        repeats &= all(torch.equal(logits_of(ours, version, tokens), first) for _ in range(3))
    note = "" if repeats else "the same step gave other bits"
    return Figure(f"kernels, {plan}", worst, "of PyTorch's error", "≤ 1.5, same bits", worst <= 1.5 and repeats, note)


@torch.inference_mode()
def logits_of(decoder: Decoder, version: WeightVersion, tokens: Sequence[list[int]]) -> Tensor:
    """Of the last token of each sequence, over a cache of their own."""
    blocks = -(-max(map(len, tokens)) // BLOCK_SIZE)
    kv = KVCache.allocate(decoder.spec, blocks * len(tokens), BLOCK_SIZE, decoder.dtype, decoder.device)
    sequences = [
        StepSequence(ids, 0, range(index * blocks, (index + 1) * blocks), 1) for index, ids in enumerate(tokens)
    ]
    return decoder.forward(StepContext(sequences, kv), version).float().clone()


def distance(logits: Tensor, expected: Tensor) -> float:
    """The mean difference: a token that is sent to another expert, where two are as good, does not decide."""
    return float((logits - expected).abs().mean() / expected.std())


# --- Speed ---


@contextmanager
def running(scale: Scale, place: Place, plan: str) -> Iterator[Engine]:
    """The engine as it serves, over random weights."""
    most = max(*scale.sequences, scale.beside_transformers)
    longest = max(scale.prompt, scale.context + scale.num_tokens) + BLOCK_SIZE
    tokens = max(most * (scale.context + scale.num_tokens + BLOCK_SIZE), longest)
    per_token = KVCache.bytes_per_block(scale.spec, BLOCK_SIZE, torch.bfloat16) // BLOCK_SIZE
    settings = load_settings(
        None,
        {
            "model.base_path": "",
            "inference.max_seq_length": longest,
            "inference.max_batch_size": most,
            "engine.kv_cache_bytes": tokens * per_token,
            "engine.block_size": BLOCK_SIZE,
            "engine.max_step_tokens": max(512, scale.prompt),
        },
        {},
    )
    set_threads(settings.engine)
    version = version_of(scale.spec, plan, choose_backend(torch.bfloat16, place.device), place.device)
    decoder = Decoder(scale.spec, longest, torch.bfloat16, place.device)
    tokenizer = word_tokenizer(scale.spec.vocab_size)
    engine = Engine(decoder, version, tokenizer, settings, place.device, torch.bfloat16)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def step_bytes(scale: Scale, plan: str, sequences: int) -> float:
    """What a step reads and leaves in the card's memory."""
    experts, others = PLANS[plan]
    version = blank_version(scale.spec, experts, others)
    program = emit(scale.spec, version, ropes_of(scale.spec))
    use = even_use(scale.spec)
    model = Model(plan, "even", scale.spec, program, version.nbytes, sequences, scale.context, use)
    return sum(launch.nbytes for launch in model.everything)


def prompt_operations(spec: ModelSpec, length: int) -> float:
    """Floating-point operations of a prompt's products and attention, of which one row reaches the head."""
    share = spec.num_active_experts / spec.num_experts
    total = 0.0
    for slot in spec.slots:
        if (slot.is_linear or slot.role == "router") and slot.role != "head":
            rows, columns = slot.shape
            total += 2.0 * rows * columns * length * (share if slot.role == "expert" else 1.0)
    heads = sum(layer.attention.num_heads * layer.attention.head_dim for layer in spec.layers)
    return total + 4.0 * heads * length * (length + 1) / 2


def measure(scale: Scale, place: Place, plan: str, report: Report) -> dict[int, float]:
    """Adds a plan's figures; returns the seconds of a step by its sequences."""
    seconds: dict[int, float] = {}
    with running(scale, place, plan) as engine:
        for count in dict.fromkeys((*scale.sequences, scale.beside_transformers)):
            if not report.has_time_for(f"decode, {plan}, {count}", 10):
                continue
            found = [
                step_seconds(engine, scale.spec, count, scale.num_tokens, seed, scale.context)
                for seed in range(scale.repeats + 1)
            ]
            seconds[count] = median(found[1:])  # the first records the step
            share = None
            if place.bandwidth is not None:
                share = step_bytes(scale, plan, count) / seconds[count] / place.bandwidth
            note = f"{1e3 * seconds[count]:.2f} ms, {count / seconds[count]:.0f} tokens/s"
            target = DECODE_TARGETS.get(count)
            is_met = None if share is None or target is None else share >= target
            wanted = "" if target is None else f"≥ {target:.0%}"
            report.add(Figure(f"decode, {plan}, {count}", share, "of the bandwidth", wanted, is_met, note))
        if report.has_time_for(f"prompt, {plan}", 10):
            times = [prompt_seconds(engine, scale.spec, scale.prompt, seed) for seed in range(scale.repeats + 1)]
            taken = median(times[1:])
            share = None if place.peak is None else prompt_operations(scale.spec, scale.prompt) / taken / place.peak
            is_met = None if share is None else share >= PROMPT_TARGET
            note = f"{scale.prompt} tokens in {1e3 * taken:.0f} ms"
            report.add(Figure(f"prompt, {plan}", share, "of the bf16 peak", f"≥ {PROMPT_TARGET:.0%}", is_met, note))
    return seconds


@torch.inference_mode()
def transformers_step(scale: Scale, device: torch.device) -> float:
    """The median step of as many sequences with transformers."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(**{name: value for name, value in scale.config.items() if name != "architectures"})
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.randint(0, scale.spec.vocab_size, (scale.beside_transformers, scale.context))
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    times = []
    for _ in range(scale.num_tokens):
        wait_for(device)
        started = time.perf_counter()
        logits = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
        ids = logits[:, -1:].argmax(dim=-1)
        wait_for(device)
        times.append(time.perf_counter() - started)
    return median(times[len(times) // 4 :])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    """Give the last model's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare_mixed(scale: Scale, place: Place, steps: dict[str, dict[int, float]], report: Report) -> None:
    """A mixed plan against what its two formats take alone, weighed by their bytes."""
    parts = ("fp8", "int4", "mixed")
    for count in scale.sequences:
        if all(count in steps.get(plan, {}) for plan in parts):
            high, low, mixed = (step_bytes(scale, plan, count) for plan in parts)
            share = (mixed - low) / (high - low)
            expected = share * steps["fp8"][count] + (1 - share) * steps["int4"][count]
            ratio = steps["mixed"][count] / expected
            is_met = place.is_met(ratio <= MIXED_TARGET)
            report.add(Figure(f"mixed, {count}", ratio, "of its parts", f"≤ {MIXED_TARGET}", is_met))


# --- What is run ---


def place_of(arguments: argparse.Namespace) -> Place:
    bandwidth = None if arguments.bandwidth is None else rate_of(arguments.bandwidth)
    peak = None if arguments.peak is None else 1e12 * arguments.peak
    device = torch.device("cpu") if arguments.device == "cpu" else torch.device("cuda", 0)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("There is no CUDA device. --device cpu --tiny tries the script itself.")
        name = torch.cuda.get_device_name(device)
        card = card_named(name)
        bandwidth = bandwidth or (None if card is None else card.bandwidth)
        peak = peak or next((value for part, value in PEAKS.items() if part in name), None)
    return Place(device, bandwidth, peak)


def scale_of(is_tiny: bool, context: int) -> Scale:
    config = dict(TINY if is_tiny else QWEN3_30B)
    _, spec = read_spec(config, "Qwen3-30B-A3B")
    if is_tiny:
        return Scale(spec, config, (1, 2), 4, 128, 3, 4, 1)
    return Scale(spec, config, tuple(DECODE_TARGETS), context, 4096, 32, 32, 2)


def run(scale: Scale, place: Place, plans: Sequence[str], has_transformers: bool, report: Report) -> None:
    for plan in plans:
        if report.has_time_for(f"kernels, {plan}", 20):
            report.add(check(scale, place, plan))
            free()
    steps: dict[str, dict[int, float]] = {}
    for plan in plans:
        steps[plan] = measure(scale, place, plan, report)
        free()
        if plan == plans[0] and has_transformers and report.has_time_for("transformers", 60):
            ours, theirs = steps[plan].get(scale.beside_transformers), transformers_step(scale, place.device)
            free()
            ratio = None if ours is None else theirs / ours
            is_met = None if ratio is None or plan != "bf16" else place.is_met(ratio >= TRANSFORMERS_TARGET)
            note = f"{scale.beside_transformers} sequences, {plan}; theirs {1e3 * theirs:.1f} ms"
            report.add(Figure("transformers", ratio, "× as fast", f"≥ {TRANSFORMERS_TARGET:.0f}", is_met, note))
    compare_mixed(scale, place, steps, report)


def show(report: Report, place: Place) -> None:
    table = Table(title=f"{hardware().get('gpu', place.device)}, {report.seconds:.0f} s")
    for name in ("", "measured", "target", "", ""):
        table.add_column(name)
    for one in report.figures:
        value = "–" if one.value is None else f"{one.value:.3g} {one.unit}"
        table.add_row(one.name, value, one.target, {True: "met", False: "missed", None: ""}[one.is_met], one.note)
    out.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--plans", nargs="+", choices=sorted(PLANS), default=["bf16", "fp8", "int4", "mixed"])
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence before it is timed")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun")
    parser.add_argument("--bandwidth", help="of the card's memory, such as 3350GB/s; known of some cards")
    parser.add_argument("--peak", type=float, help="bf16 TFLOP/s of the card; known of some")
    parser.add_argument("--tiny", action="store_true", help="a model of one small layer")
    arguments = parser.parse_args()
    place, scale = place_of(arguments), scale_of(arguments.tiny, arguments.context)
    report = Report(arguments.minutes)
    run(scale, place, arguments.plans, not arguments.without_transformers, report)
    show(report, place)
    record = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "seconds": report.seconds}
    print(json.dumps({**record, "figures": [asdict(figure) for figure in report.figures]}))
    return int(any(figure.is_met is False for figure in report.figures if figure.name.startswith("kernels")))


if __name__ == "__main__":
    sys.exit(main())
