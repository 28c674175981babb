"""Speed of each compiled kernel, per format and number of rows, against what the machine gives on the same buffers.

    python benchmarks/kernels.py                          all formats, linear and moe; what has states; an indexer
    python benchmarks/kernels.py --format int4 fp8 --rows 1 512 --layers 2
    python benchmarks/kernels.py --against avx512 --rows 1 4 8 16 32 128 512      on a machine with AMX
    python benchmarks/kernels.py --format published --kernel linear --rows 1   other layouts that are published
    python benchmarks/kernels.py --kernel delta_rule kimi_delta state_space convolution indexer --rows 1 16 512

The shape is that of a mixture with hidden size 2048, 64 experts of width 768, 8 active; every layer has weights of its
own, so that no cache holds them. GB/s counts the weights that a call reads (each active expert once); the share is of a
plain read of the same buffers between the repeats. Where there is a matrix unit, operations are told as a share of what
it does in registers. `--against` runs a second instruction set in turns, on the same inputs, and tells how many times
as fast the first one is. Prints a table and, as the last line, one JSON object.

Of recurrences up to 16 rows are sequences with a token each, more are one sequence's prompt. Their GB/s counts the
sequences' states twice: a step reads and writes them. The delta rule has 16 key heads and 32 value heads of 128
(Qwen3.5); Kimi delta attention 16 heads of 128 with a decay for each row of a state (Ling 3); the state space 48 heads
of 64 with 128 rows and one group (Granite 4). The short convolution has 2048 channels and 3 taps, and its rows are
multiplied before and behind it (LFM2): its GB/s counts the rows, as its states are small. The indexer scores 8192
positions with 64 heads of 128 (DeepSeek-V3.2); its GB/s counts the keys, once for each sequence.

int4-bf16: int4 with activations that stay bfloat16. The matrix unit's choices, to find the best ones on a machine:
`--int8-rows N`, from how many rows on int8 operands are multiplied on it (1: always), and `--scales-weights`, which
expands int4-bf16 and fp8 with the scales of their groups, rounded, instead of scaling the sum of each group.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contestants.moe_block import HIDDEN, NUM_ACTIVE, NUM_EXPERTS, NUM_LAYERS, WIDTH, route

from amalgam import _native
from amalgam.config.environment import NATIVE_ISA_VARIABLE
from amalgam.formats.gguf import FORMATS as GGUF_FORMATS
from amalgam.formats.gguf.blocks import GgufFormat
from amalgam.formats.registry import writable_format
from amalgam.kernels.backends.base import Compiled
from amalgam.kernels.backends.cpu import extension, panels
from amalgam.kernels.backends.cpu.backend import CpuBackend
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.cpu.products import matrix_of, prepare_experts, supports_moe
from amalgam.kernels.layouts import AFFINE4, CODEBOOKS, E2M1, INT4, TABLE4, dense, pack_nibbles
from amalgam.kernels.program import Convolve, DeltaRule, Embed, Head, Instruction, Program, Rows, ScanStates
from amalgam.kernels.step import AttentionBatch, LayerCache, LayerState, SequenceState, StepContext, StepSequence
from amalgam.kernels.weights import Expert, ExpertTable, PackedWeight
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest

LINEAR_SHAPE = (4096, 2048)
HEAD_DIM = 128
SPACE_HEADS, SPACE_DIM, STATE_DIM = 48, 64, 128
CHANNELS, TAPS = 2048, 3
INDEX_HEADS, POSITIONS = 64, 8192
MOST_SEQUENCES = 16
STATES, KEYS = "fp32", "bf16"  # what recurrences and an indexer read
PLAIN = "bf16-plain"  # in 16 bits
WIDENED = "int4-bf16"  # multiplied by bfloat16
BY_VALUE = (WIDENED, "groups-of-12")  # codes that become bfloat16
FORMATS = ("int4", WIDENED, "int8", "fp8", "bf16", PLAIN)
UNIT_ROUNDS = 100_000
# Random bits in what other tools publish.
GGUF_TYPES = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
)
TABLES = ("nvfp4", "nf4")
GROUPS = ("gptq-int2", "gptq-int3", "hqq-int3", "hqq-int4", "groups-of-12")
BOOKS = {"codebooks-1x16": (1, 16), "codebooks-2x8": (2, 8)}  # how many, bits of a code for 8 inputs
PUBLISHED = (*GGUF_TYPES, *TABLES, *GROUPS, *BOOKS)
ROWS = (1, 8, 16, 128, 512)
RECURRENCES = ("delta_rule", "kimi_delta", "state_space", "convolution")
KERNELS = ("linear", "moe", *RECURRENCES, "indexer")


@dataclass(frozen=True)
class Result:
    """One line of the table; medians over the repeats."""

    kernel: str
    format: str
    rows: int
    milliseconds: float  # for all layers
    bits: float  # in memory, of a weight
    gigabytes_per_second: float
    share_of_read: float
    gigaoperations_per_second: float
    share_of_unit: float | None  # of what the matrix unit does in registers
    times_as_fast: float | None  # as the instruction set that it runs against


Run = Callable[[int], tuple[Callable[[], None], int, float]]  # rows → (call, bytes read, operations)


@dataclass(frozen=True)
class Case:
    """A kernel over all layers: what it reads and computes, and how to run it once on fresh inputs."""

    kernel: str
    num_bytes: int  # of all weights, or states
    bits: float  # of one of them
    read: Callable[[], object]  # all of them
    run: Run
    unit: _native.Format | None = None  # whose operands a matrix unit takes them with


def source(name: str, shape: tuple[int, int]) -> PackedWeight:
    """Normally distributed weights in a format: fp8 takes longer where many codes are subnormal."""
    if name in PUBLISHED:
        return published(name, shape)
    values = torch.randn(shape) * 0.02
    if name in ("bf16", PLAIN):
        return dense(values.bfloat16())
    weight_format = writable_format(name.removesuffix("-bf16"))
    return weight_format.pack(quantize(values.bfloat16(), weight_format, round_to_nearest))


def prepare(weight: PackedWeight, name: str) -> PackedWeight:
    return panels.prepare(weight, "bf16" if name == WIDENED else "int8", codes=name != PLAIN)


def published(name: str, shape: tuple[int, int]) -> PackedWeight:
    """Random codes with scales of 0.01."""
    rows, columns = shape
    if name in GGUF_TYPES:
        found = next(one for one in GGUF_FORMATS if isinstance(one, GgufFormat) and one.type.name == name)
        values = math.prod(shape) // found.type.num_elements
        raw = torch.randint(0, 256, (values, found.type.num_bytes), dtype=torch.uint8)
        for offset in found.halves:
            raw[:, offset : offset + 2] = torch.tensor([0.01]).half().view(torch.uint8)
        if name == "MXFP4":
            raw[:, 0] = 120
        return found.pack_blocks(raw.view(rows, -1), shape)
    if name in BOOKS:
        books, bits = BOOKS[name]
        parts = {
            "weight": torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, columns // 8, books)),
            "codebooks": torch.randn(books, 1 << bits, 1, 8).half(),
            "scale": torch.full((rows, 1), 0.01).half(),
        }
        parts["weight"] = parts["weight"].to(torch.int8 if bits == 8 else torch.int16)
        return PackedWeight(CODEBOOKS, shape, parts, (1, columns))
    nibbles = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    if name in TABLES:
        group, dtype = (16, torch.float8_e4m3fn) if name == "nvfp4" else (64, torch.float32)
        table = torch.tensor(E2M1) if name == "nvfp4" else torch.linspace(-1, 1, 16) ** 3
        scale = torch.full((rows, columns // group), 0.01).to(dtype)
        return PackedWeight(TABLE4, shape, {"weight": nibbles, "scale": scale, "table": table}, (1, group))
    group = 12 if name == "groups-of-12" else 64 if name.startswith("hqq") else 128
    columns -= columns % group
    bits = int(name[-1]) if "int" in name else 4
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = torch.full((rows, columns // group), 0.01).half()
    parts = {"weight": pack_nibbles(codes), "scale": scale, "zero": torch.full_like(scale, 1.5)}
    if not name.startswith("hqq"):
        parts["zero"] = torch.full(scale.shape, 1, dtype=torch.uint8)
    return PackedWeight(AFFINE4 if name.startswith("hqq") else INT4, (rows, columns), parts, (1, group))


def linear_case(name: str, num_layers: int) -> Case:
    template = source(name, LINEAR_SHAPE)
    weights = [prepare(template, name) for _ in range(8 * num_layers)]

    def run(rows: int) -> tuple[Callable[[], None], int, float]:
        x = torch.randn(rows, template.shape[1]).bfloat16()

        def call() -> None:
            for weight in weights:
                CpuOperators.linear(x, weight)

        operations = 2.0 * rows * LINEAR_SHAPE[0] * LINEAR_SHAPE[1] * len(weights)
        return call, sum(weight.nbytes for weight in weights), operations

    return case_of("linear", name, weights, run)


def moe_case(name: str, num_layers: int) -> Case:
    first, last = source(name, (WIDTH, HIDDEN)), source(name, (HIDDEN, WIDTH))
    sources = (first, first, last)

    def expert() -> Expert:
        gate, up, down = (prepare(weight, name) for weight in sources)
        return Expert(gate, up, down)

    layers = [prepare_experts(ExpertTable(tuple(expert() for _ in range(NUM_EXPERTS)))) for _ in range(num_layers)]
    weights = [weight for table in layers for e in table.experts for weight in (e.gate, e.up, e.down)]
    expert_bytes = sum(weight.nbytes for weight in weights[:3])

    def run(rows: int) -> tuple[Callable[[], None], int, float]:
        x = torch.randn(rows, HIDDEN).bfloat16()
        assert all(supports_moe(x, table) for table in layers)  # or PyTorch would be timed
        routes = [route(rows) for _ in layers]

        def call() -> None:
            for table, (ids, gate_weights) in zip(layers, routes, strict=True):
                CpuOperators.moe(x, ids, gate_weights, table)

        num_bytes = sum(len(ids.unique()) for ids, _ in routes) * expert_bytes
        return call, num_bytes, 6.0 * rows * NUM_ACTIVE * HIDDEN * WIDTH * num_layers

    return case_of("moe", name, weights, run)


def case_of(kernel: str, name: str, weights: list[PackedWeight], run: Run) -> Case:
    matrices = [matrix_of(weight) for weight in weights]
    num_bytes = sum(weight.nbytes for weight in weights)
    bits = 8.0 * num_bytes / sum(math.prod(weight.shape) for weight in weights)
    unit = unit_operands(name, matrices[0].format.name)
    return Case(kernel, num_bytes, bits, lambda: _native.checksum(matrices, torch.get_num_threads()), run, unit)


def unit_operands(name: str, packed: str) -> _native.Format | None:
    """None for K-quants and IQ4_XS, which stay with the vectors."""
    if packed.startswith("k"):
        return None
    is_int8 = packed.startswith(("int", "table4")) and name not in BY_VALUE
    return _native.Format.int8 if is_int8 else _native.Format.bf16


@dataclass(frozen=True)
class Recurrence:
    """Attributes:
    width: columns that a layer reads.
    convolution, state: a sequence's, in one layer.
    emit: (what is read, layer) → the instruction.
    operations: of a row in one layer.
    row_bytes: that are counted of a row in one layer.
    """

    width: int
    out: Rows
    convolution: tuple[int, int]
    state: tuple[int, int, int]
    emit: Callable[[Rows, int], Instruction]
    operations: float
    row_bytes: int = 0


def delta_rule(key_heads: int, value_heads: int, *, is_kimi: bool) -> Recurrence:
    keys, values = key_heads * HEAD_DIM, value_heads * HEAD_DIM
    decays = keys if is_kimi else value_heads
    width = 2 * keys + values + decays + value_heads
    out = Rows("out", values, 0, values)
    rates, bound = (torch.zeros(value_heads), torch.zeros(decays)), -5.0 if is_kimi else None

    def emit(x: Rows, layer: int) -> DeltaRule:
        query, key, value = x.columns(0, keys), x.columns(keys, keys), x.columns(2 * keys, values)
        decay, strength = x.columns(2 * keys + values, decays), x.columns(width - value_heads, value_heads)
        return DeltaRule(query, key, value, decay, strength, out, layer, key_heads, value_heads, *rates, bound)

    state = value_heads, HEAD_DIM, HEAD_DIM
    return Recurrence(width, out, (0, 1), state, emit, 7.0 * math.prod(state))


def state_space() -> Recurrence:
    values = SPACE_HEADS * SPACE_DIM
    width = 2 * STATE_DIM + values + SPACE_HEADS
    out = Rows("out", values, 0, values)
    rate, bias, skip = torch.zeros(3, SPACE_HEADS)

    def emit(x: Rows, layer: int) -> ScanStates:
        write, read = x.columns(0, STATE_DIM), x.columns(STATE_DIM, STATE_DIM)
        inputs, steps = x.columns(2 * STATE_DIM, values), x.columns(width - SPACE_HEADS, SPACE_HEADS)
        return ScanStates(write, read, inputs, steps, out, layer, 1, SPACE_HEADS, rate, bias, skip, (0.0, math.inf))

    state = SPACE_HEADS, STATE_DIM, SPACE_DIM
    return Recurrence(width, out, (0, 1), state, emit, 5.0 * math.prod(state))


def convolution() -> Recurrence:
    out, weight = Rows("out", CHANNELS, 0, CHANNELS), torch.randn(CHANNELS, TAPS).bfloat16()

    def emit(x: Rows, layer: int) -> Convolve:
        before, behind, inputs = (x.columns(part * CHANNELS, CHANNELS) for part in range(3))
        return Convolve(inputs, weight, out, layer, before=before, behind=behind, activates=False)

    operations, row_bytes = 2.0 * (TAPS + 1) * CHANNELS, 4 * 2 * CHANNELS
    return Recurrence(3 * CHANNELS, out, (TAPS - 1, CHANNELS), (0, 0, 0), emit, operations, row_bytes)


def recurrence_of(kernel: str) -> Recurrence:
    makers: dict[str, Callable[[], Recurrence]] = {
        "delta_rule": lambda: delta_rule(16, 32, is_kimi=False),
        "kimi_delta": lambda: delta_rule(16, 16, is_kimi=True),
        "state_space": state_space,
        "convolution": convolution,
    }
    return makers[kernel]()


def recurrent_case(kernel: str, num_layers: int) -> Case:
    how = recurrence_of(kernel)
    memory = torch.randn(num_layers, MOST_SEQUENCES, *how.state)
    states = tuple(LayerState(torch.zeros(MOST_SEQUENCES, *how.convolution), one) for one in memory)
    layers = (LayerCache(*torch.zeros(2, 1 << 20, 0, 0)),) * num_layers
    indexes = (None,) * num_layers
    cache: Any = SimpleNamespace(layers=layers, states=states, indexes=indexes, block_size=1 << 20)
    x = Rows("x", how.width, 0, how.width)
    instructions = [how.emit(x, layer) for layer in range(num_layers)]
    backend = CpuBackend(torch.bfloat16)
    head = Head(how.out, backend.prepare(dense(torch.zeros(1, how.out.width)), "bf16", codes=False), None)

    def run(rows: int) -> tuple[Callable[[], None], int, float]:
        embed = Embed(dense(torch.randn(rows, how.width).bfloat16()), x)
        compiled: dict[str, Compiled] = {}
        shares = [[token] for token in range(rows)] if rows <= MOST_SEQUENCES else [list(range(rows))]
        step = StepContext(
            [StepSequence(share, 0, [0], 0, SequenceState(slot, slot)) for slot, share in enumerate(shares)], cache
        )

        def call() -> None:
            isa = extension.isa()
            if isa not in compiled:
                compiled[isa] = backend.compile(Program((embed, *instructions, head)), [])
            compiled[isa].run(step)

        elements = math.prod(how.state) + math.prod(how.convolution)
        num_bytes = num_layers * (len(shares) * elements * 2 * 4 + rows * how.row_bytes)
        return call, num_bytes, num_layers * rows * how.operations

    plain = memory if memory.nbytes else torch.zeros(1 << 24)  # what a plain read is measured on
    raw = plain.view(-1).view(torch.uint8)
    return Case(kernel, raw.nbytes, 32.0, lambda: _native.read_memory(raw, torch.get_num_threads()), run)


def indexer_case(num_layers: int) -> Case:
    memory = torch.randn(num_layers, MOST_SEQUENCES * POSITIONS, 1, HEAD_DIM).bfloat16()

    def run(rows: int) -> tuple[Callable[[], None], int, float]:
        count = rows if rows <= MOST_SEQUENCES else 1
        each = rows // count
        batch = AttentionBatch(
            torch.arange(count + 1) * each,
            torch.full((count,), POSITIONS),
            torch.arange(count).unsqueeze(1),
            POSITIONS,
        )
        query = torch.randn(rows, INDEX_HEADS, HEAD_DIM).bfloat16()
        weights = torch.rand(rows, INDEX_HEADS)

        def call() -> None:
            for keys in memory:
                CpuOperators.index_scores(query, weights, LayerCache(keys, keys[..., :0]), batch)

        num_bytes = num_layers * count * POSITIONS * HEAD_DIM * 2
        return call, num_bytes, 2.0 * num_layers * rows * POSITIONS * INDEX_HEADS * HEAD_DIM

    raw = memory.view(-1).view(torch.uint8)
    return Case("indexer", raw.nbytes, 16.0, lambda: _native.read_memory(raw, torch.get_num_threads()), run)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """`name` or the next lower one in use, chosen as a user does."""
    kept = os.environ.get(NATIVE_ISA_VARIABLE)
    os.environ[NATIVE_ISA_VARIABLE] = name
    extension.kernels.cache_clear()
    try:
        yield
    finally:
        if kept is None:
            del os.environ[NATIVE_ISA_VARIABLE]
        else:
            os.environ[NATIVE_ISA_VARIABLE] = kept
        extension.kernels.cache_clear()


def unit_gigaoperations(operands: _native.Format | None) -> float | None:
    """A second, in the registers of the matrix unit with all threads; None where it is not used."""
    unit = extension.kernels().unit
    if unit is None or operands is None:
        return None
    threads = torch.get_num_threads()
    rounds = 1 if extension.isa() == "amx_emulated" else UNIT_ROUNDS
    unit.run(operands, rounds, threads)
    start = time.perf_counter()
    operations = unit.run(operands, rounds, threads)
    return operations / (time.perf_counter() - start) / 1e9


def measure(case: Case, name: str, rows: tuple[int, ...], repeats: int, against: str | None) -> Iterator[Result]:
    for count in rows:
        samples, shares, ratios = [], [], []
        for _ in range(repeats):
            call, num_bytes, operations = case.run(count)
            if against is not None:
                with instruction_set(against):
                    other = seconds(call)
            elapsed = seconds(call)
            read = case.num_bytes / seconds(case.read) / 1e9
            samples.append(
                (elapsed, num_bytes / elapsed / 1e9, num_bytes / elapsed / 1e9 / read, operations / elapsed / 1e9)
            )
            unit = unit_gigaoperations(case.unit)
            if unit is not None:
                shares.append(operations / elapsed / 1e9 / unit)
            if against is not None:
                ratios.append(other / elapsed)
        medians = [statistics.median(column) for column in zip(*samples, strict=True)]
        yield Result(
            case.kernel,
            name,
            count,
            medians[0] * 1e3,
            case.bits,
            *medians[1:],
            share_of_unit=statistics.median(shares) if shares else None,
            times_as_fast=statistics.median(ratios) if ratios else None,
        )


def case_for(kernel: str, name: str, num_layers: int) -> Case:
    if kernel in RECURRENCES:
        return recurrent_case(kernel, num_layers)
    if kernel == "indexer":
        return indexer_case(num_layers)
    return {"linear": linear_case, "moe": moe_case}[kernel](name, num_layers)


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--format", nargs="+", choices=(*FORMATS, *PUBLISHED, "published"), default=list(FORMATS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", choices=_native.supported_isas(), metavar="ISA")
    parser.add_argument("--int8-rows", type=int, metavar="N")
    parser.add_argument("--scales-weights", action="store_true")
    arguments = parser.parse_args()
    unit = extension.kernels().unit
    if unit is None and (arguments.int8_rows is not None or arguments.scales_weights):
        parser.error(f"{extension.isa()} has no matrix unit: --int8-rows and --scales-weights change nothing")
    if unit is not None:
        unit.scales_weights = arguments.scales_weights
        if arguments.int8_rows is not None:
            unit.int8_rows = arguments.int8_rows
    if arguments.against == extension.isa():
        parser.error(f"{extension.isa()} is what runs; needed: another one of {', '.join(_native.supported_isas())}")
    torch.manual_seed(0)
    names = [one for name in arguments.format for one in (PUBLISHED if name == "published" else (name,))]
    results: list[Result] = []
    against = "" if arguments.against is None else f"  × {arguments.against}"
    columns = f"{'ms':>10}{'bits':>7}{'GB/s':>8}{'of read':>9}{'Gop/s':>8}{'of unit':>9}"
    print(f"{'kernel':12}{'format':13}{'rows':>5}{columns}{against}")
    for kernel in arguments.kernel:
        for name in {"indexer": [KEYS]}.get(kernel, [STATES] if kernel in RECURRENCES else names):
            case = case_for(kernel, name, arguments.layers)
            for r in measure(case, name, tuple(arguments.rows), arguments.repeats, arguments.against):
                results.append(r)
                share = "" if r.share_of_unit is None else f"{r.share_of_unit:.0%}"
                ratio = "" if r.times_as_fast is None else f"{r.times_as_fast:.2f}"
                print(
                    f"{r.kernel:12}{r.format:13}{r.rows:5}{r.milliseconds:10.2f}{r.bits:7.3f}"
                    f"{r.gigabytes_per_second:8.1f}{r.share_of_read:9.0%}{r.gigaoperations_per_second:8.0f}{share:>9}{ratio:>{len(against)}}",
                    flush=True,
                )
            del case
    report = {
        "command": sys.argv,
        "commit": commit(),
        "isa": extension.isa(),
        "against": arguments.against,
        "unit": None if unit is None else {"int8_rows": unit.int8_rows, "scales_weights": unit.scales_weights},
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "results": [asdict(result) for result in results],
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
