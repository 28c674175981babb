"""Speed and memory of a whole model, measured through the engine as traffic would see it.

In: settings of a real model, or the name of a shape whose weights are made on the fly. Out: a `BenchReport`.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from amalgam.base.counting import counted
from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import activation_for, codes_bf16
from amalgam.composition.progress import Progress
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import ModelSettings
from amalgam.config.settings import Settings
from amalgam.engine.core import Engine
from amalgam.engine.memory import peak_memory_bytes
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import RequestOutput
from amalgam.errors import ConfigError
from amalgam.formats.registry import writable_format
from amalgam.kernels.backends import choose_backend
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.models.decoder import Decoder
from amalgam.models.registry import read_spec
from amalgam.models.routing import RoutingObserver
from amalgam.models.spec import ModelSpec, Slot
from amalgam.models.weights import WeightVersion
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.device import choose_device
from amalgam.runtime.threads import set_threads
from amalgam.text.parts import TokenizerParts
from amalgam.text.tokenizer import Tokenizer
from amalgam.version import commit as commit

PROMPT_LENGTHS = (128, 512)
BATCH_SIZES = (1, 8, 16)
_SHORT_PROMPT = 8  # tokens of context before decoding is timed

# Shape S: eight layers of Qwen3-30B-A3B's block, half of its experts. 2.70 billion parameters, 0.52 active per token.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "S": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
}
# What `--weights mixed` stands for; see `random_weights`.
_MIXED = "bf16+int4/fp8"


@dataclass(frozen=True)
class Measurement:
    """One figure with its repeats; `value` is their median."""

    name: str
    unit: str
    value: float
    repeats: tuple[float, ...] = ()


@dataclass
class BenchReport:
    """Everything that one run measured, and on what."""

    model: str
    weights: dict[str, int]  # format or layout → bytes
    measurements: list[Measurement] = field(default_factory=list)
    hardware: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bench_model(
    deployment: Deployment,
    *,
    prompts: Sequence[int] = PROMPT_LENGTHS,
    batches: Sequence[int] = BATCH_SIZES,
    num_tokens: int = 32,
    repeats: int = 3,
) -> BenchReport:
    """Time a loaded model: load, memory, prompt and decoding speed."""
    info = deployment.model_info()
    formats = {name: row["bytes"] for name, row in info["precisions"].items()}
    report = BenchReport(deployment.model_name, formats, hardware=hardware(), kernels=deployment.engine.kernels)
    report.measurements.append(Measurement("load", "s", deployment.loaded_seconds))
    longest = deployment.settings.inference.max_seq_length - num_tokens
    fitting = [length for length in prompts if length <= longest]
    report.measurements += measure_engine(deployment.engine, deployment.spec, fitting, batches, num_tokens, repeats)
    report.measurements.append(Measurement("peak memory", "MiB", peak_memory_bytes() / 2**20))
    return report


def bench_shape(
    name: str,
    weights: str,
    settings: Settings,
    *,
    prompts: Sequence[int] = PROMPT_LENGTHS,
    batches: Sequence[int] = BATCH_SIZES,
    num_tokens: int = 32,
    repeats: int = 3,
    progress: Progress | None = None,
) -> BenchReport:
    """Time a shape with random weights; see `random_weights` for what `weights` may be.

    Raises:
        ConfigError: no such shape.
        UnsupportedError: no such format, or one that cannot quantize.
    """
    started = time.monotonic()
    max_tokens = max(prompts, default=0) + _SHORT_PROMPT + num_tokens
    with shape_engine(
        name, weights, settings, max_tokens=max_tokens, max_batch=max(batches, default=1), progress=progress
    ) as (engine, spec):
        made = Measurement("make weights", "s", time.monotonic() - started)
        sizes = bytes_by_layout(engine.version)
        report = BenchReport(f"shape {name}, {weights}", sizes, hardware=hardware(), kernels=engine.kernels)
        report.measurements.append(made)
        report.measurements += measure_engine(engine, spec, prompts, batches, num_tokens, repeats)
        report.measurements.append(Measurement("peak memory", "MiB", peak_memory_bytes() / 2**20))
    return report


@contextmanager
def shape_engine(
    name: str,
    weights: str,
    settings: Settings,
    *,
    max_tokens: int,
    max_batch: int,
    progress: Progress | None = None,
    observer: RoutingObserver | None = None,
) -> Iterator[tuple[Engine, ModelSpec]]:
    """A running engine over a shape with random weights.

    Args:
        max_tokens: of the longest sequence.
        max_batch: sequences that run together.
        observer: sees which experts each token is routed to.

    Raises:
        ConfigError: no such shape.
        UnsupportedError: no such format, or one that cannot quantize.
    """
    if name not in SHAPES:
        raise ConfigError(f"Shape {name!r} is unknown.", remedy=f"Known shapes: {', '.join(SHAPES)}.")
    set_threads(settings.engine)
    _, spec = read_spec(SHAPES[name], f"shape {name}")
    version = random_weights(spec, weights, settings.inference, choose_device(settings.inference.device_map), progress)
    with _running(spec, version, settings, max_tokens, max_batch, observer) as engine:
        yield engine, spec


@contextmanager
def file_engine(
    path: str, settings: Settings, *, max_tokens: int, max_batch: int, observer: RoutingObserver | None = None
) -> Iterator[tuple[Engine, ModelSpec]]:
    """The same over a checkpoint's weights; words stand for its tokens.

    Raises:
        AmalgamError: the checkpoint cannot be loaded.
    """
    set_threads(settings.engine)
    device = choose_device(settings.inference.device_map)
    loader = ModelLoader(ModelSettings(base_path=path), settings.inference, device, settings.engine.num_load_threads)
    version = loader.build(loader.plan(), 1).version
    with _running(loader.spec, version, settings, max_tokens, max_batch, observer) as engine:
        yield engine, loader.spec


@contextmanager
def _running(
    spec: ModelSpec,
    version: WeightVersion,
    settings: Settings,
    max_tokens: int,
    max_batch: int,
    observer: RoutingObserver | None,
) -> Iterator[Engine]:
    device = choose_device(settings.inference.device_map)
    dtype: torch.dtype = getattr(torch, settings.inference.dtype)
    inference = settings.inference.model_dump() | {"max_seq_length": max_tokens, "max_batch_size": max_batch}
    settings = settings.replace(inference=inference, engine=settings.engine.model_dump() | {"max_step_tokens": 512})
    decoder = Decoder(spec, max_tokens, dtype, device)
    engine = Engine(decoder, version, word_tokenizer(spec.vocab_size), settings, device, dtype, observer)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def measure_engine(
    engine: Engine, spec: ModelSpec, prompts: Sequence[int], batches: Sequence[int], num_tokens: int, repeats: int
) -> list[Measurement]:
    """Prompt and decoding speed in tokens per second; the contestants take turns, so that a disturbance hits all."""
    timings: dict[str, list[float]] = {f"prompt of {length}": [] for length in prompts}
    timings |= {f"decode {counted(batch, 'sequence')}": [] for batch in batches}
    for repeat in range(repeats + 1):  # the first round warms up
        measured = [length / prompt_seconds(engine, spec, length, repeat) for length in prompts]
        measured += [batch / step_seconds(engine, spec, batch, num_tokens, repeat) for batch in batches]
        if repeat:
            for samples, value in zip(timings.values(), measured, strict=True):
                samples.append(value)
    return [Measurement(name, "tokens/s", median(samples), tuple(samples)) for name, samples in timings.items()]


def prompt_seconds(engine: Engine, spec: ModelSpec, length: int, seed: int) -> float:
    """From handing in a prompt of random tokens to its first new token."""
    started = time.monotonic()
    (answer,) = engine.generate([random_ids(spec, length, seed)], _sampling(1, seed))
    if answer.error is not None:
        raise answer.error
    return time.monotonic() - started


def step_seconds(
    engine: Engine, spec: ModelSpec, batch: int, num_tokens: int, seed: int, context: int = _SHORT_PROMPT
) -> float:
    """The median step in which `batch` sequences decode, all of them after `context` tokens.

    Raises:
        ConfigError: the prompts take so many steps that the first sequence ends before the last one decodes.
    """
    arrivals: dict[int, list[float]] = {}
    errors: list[Exception] = []
    ended = threading.Semaphore(0)

    def on_output(output: RequestOutput) -> None:
        arrivals.setdefault(output.request_id, []).extend([time.monotonic()] * len(output.token_ids))
        if output.is_finished:
            errors.extend([output.error] if output.error else [])
            ended.release()

    params = [_sampling(max(2, num_tokens), seed + index) for index in range(batch)]
    prompts = [random_ids(spec, context, seed + index) for index in range(batch)]
    with engine.between_steps():
        ids = [engine.submit(prompt, chosen, on_output) for prompt, chosen in zip(prompts, params, strict=True)]
    for _ in ids:
        ended.acquire()  # looking at the engine's status now and then would take a core from it
    if errors:
        raise errors[0]
    latest = max((arrivals[request_id] for request_id in ids), key=lambda times: times[0])
    until = min(arrivals[request_id][-1] for request_id in ids)
    times = latest[: 1 + sum(time_ < until for time_ in latest)]  # a step delivers to one sequence after another
    if len(times) < 2:
        raise ConfigError(
            f"No step had all of {batch} sequences: with {num_tokens} tokens each, the first has ended before the last "
            "one's prompt is computed.",
            remedy="Raise --num-tokens or engine.max_step_tokens.",
        )
    return median(b - a for a, b in pairwise(times))


def _sampling(num_tokens: int, seed: int) -> SamplingParams:
    """Sampled, not the likeliest: with random weights greedy sequences soon repeat one token, and so its experts."""
    return SamplingParams(max_new_tokens=num_tokens, temperature=1.0, seed=seed, ignore_eos=True)


def random_ids(spec: ModelSpec, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, spec.vocab_size, (length,), generator=generator).tolist()
    return ids


def random_weights(
    spec: ModelSpec,
    weights: str,
    inference: InferenceSettings,
    device: torch.device,
    progress: Progress | None = None,
) -> WeightVersion:
    """Weights for every slot, each in memory of its own; one random tensor per shape and format is drawn and copied.

    Args:
        weights: a format for all linear weights, or `OTHERS+EXPERTS` with a format for the experts' own, or
            `OTHERS+A/B` for experts of which a random half is in A and the rest in B; `mixed` is bf16+int4/fp8.
    """
    dtype: torch.dtype = getattr(torch, inference.dtype)
    backend = choose_backend(dtype, device)
    templates: dict[tuple[tuple[int, ...], str], PackedWeight] = {}
    made: dict[str, PackedWeight] = {}
    format_of = _expert_formats(spec, _MIXED if weights == "mixed" else weights)
    for index, slot in enumerate(spec.slots):
        key = (slot.shape, format_of(slot) if slot.is_linear else "wide")
        if key not in templates:
            templates[key] = _random_weight(*key, dtype)
        weight = _copy(templates[key])
        if slot.is_linear or slot.decides:
            codes = codes_bf16(slot, inference, backend)
            weight = backend.prepare(weight, activation_for(spec, inference), codes=codes)
        made[slot.name] = weight.to(device)
        if progress is not None:
            progress("Making weights", index + 1, len(spec.slots))
    return WeightVersion(1, made, {}, {})


def _expert_formats(spec: ModelSpec, weights: str) -> Callable[[Slot], str]:
    others, _, experts = weights.partition("+")
    formats = (experts or others).split("/")
    generator = torch.Generator().manual_seed(0)
    # Every layer has as many experts of each format, in an order of its own.
    orders: list[list[int]] = [torch.randperm(spec.num_experts, generator=generator).tolist() for _ in spec.layers]

    def format_of(slot: Slot) -> str:
        if slot.role != "expert":
            return others
        layer, expert = (int(part) for part in slot.name.split(".") if part.isdigit())
        return formats[orders[layer][expert] % len(formats)]

    return format_of


def bytes_by_layout(version: WeightVersion) -> dict[str, int]:
    """Memory of a version's weights."""
    sizes: dict[str, int] = {}
    for weight in version.weights:
        sizes[weight.layout.name] = sizes.get(weight.layout.name, 0) + weight.nbytes
    return sizes


def _random_weight(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> PackedWeight:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * (0.02 if len(shape) > 1 else 1)
    if name == "wide":
        return dense(tensor.to(dtype))
    wide = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name in wide:
        return dense(tensor.to(wide[name]))
    weight_format = writable_format(name)
    return weight_format.pack(quantize(tensor.to(torch.bfloat16), weight_format, round_to_nearest))


def _copy(weight: PackedWeight) -> PackedWeight:
    parts = {name: part.clone() for name, part in weight.parts.items()}
    return PackedWeight(weight.layout, weight.shape, parts, weight.block)


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with one word per id, for models that exist only as a shape; its text is bytes, as most have it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import WordLevel

    backend = Backend(WordLevel({f"w{index}": index for index in range(vocab_size)}, unk_token="w0"))
    backend.decoder = ByteLevel()
    return Tokenizer(TokenizerParts(backend), frozenset())


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {
        "processor": next(_cpu_models(), platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "compute_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_models() -> Iterator[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                yield line.partition(":")[2].strip()
