"""Speed of each compiled kernel, per format and number of rows, against what the machine gives on the same buffers.

    python benchmarks/kernels.py                          all formats, linear and moe
    python benchmarks/kernels.py --format int4 fp8 --rows 1 512 --layers 2

The shape is that of a mixture with hidden size 2048, 64 experts of width 768, 8 active; every layer has weights of its
own, so that no cache holds them. GB/s counts the weights that a call reads (each active expert once); the share is of a
plain read of the same buffers between the repeats. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from amalgam import _native
from amalgam.formats.registry import writable_format
from amalgam.kernels.backends.cpu import extension, panels
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.cpu.products import matrix_of, prepare_experts, supports_moe
from amalgam.kernels.layouts import dense
from amalgam.kernels.packed import Expert, ExpertTable, PackedWeight
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest

HIDDEN, WIDTH, NUM_EXPERTS, NUM_ACTIVE = 2048, 768, 64, 8
LINEAR_SHAPE = (4096, 2048)
PLAIN = "bf16-plain"  # in 16 bits
FORMATS = ("int4", "int8", "fp8", "bf16", PLAIN)
ROWS = (1, 8, 16, 128, 512)


@dataclass(frozen=True)
class Result:
    """One line of the table; medians over the repeats."""

    kernel: str
    format: str
    rows: int
    milliseconds: float  # for all layers
    gigabytes_per_second: float
    share_of_read: float
    gigaoperations_per_second: float


@dataclass(frozen=True)
class Case:
    """A kernel over all layers: what it reads and computes, and how to run it once on fresh inputs."""

    kernel: str
    weights: list[PackedWeight]
    run: Callable[[int], tuple[Callable[[], None], int, float]]  # rows → (call, bytes read, operations)


def source(name: str, shape: tuple[int, int]) -> PackedWeight:
    """Normally distributed weights in a format: fp8 takes longer where many codes are subnormal."""
    values = torch.randn(shape) * 0.02
    if name in ("bf16", PLAIN):
        return dense(values.bfloat16())
    weight_format = writable_format(name)
    return weight_format.pack(quantize(values.bfloat16(), weight_format, round_to_nearest))


def linear_case(name: str, num_layers: int) -> Case:
    template = source(name, LINEAR_SHAPE)
    weights = [panels.prepare(template, codes=name != PLAIN) for _ in range(8 * num_layers)]

    def run(rows: int) -> tuple[Callable[[], None], int, float]:
        x = torch.randn(rows, LINEAR_SHAPE[1]).bfloat16()

        def call() -> None:
            for weight in weights:
                CpuOperators.linear(x, weight)

        operations = 2.0 * rows * LINEAR_SHAPE[0] * LINEAR_SHAPE[1] * len(weights)
        return call, sum(weight.nbytes for weight in weights), operations

    return Case("linear", weights, run)


def moe_case(name: str, num_layers: int) -> Case:
    first, last = source(name, (WIDTH, HIDDEN)), source(name, (HIDDEN, WIDTH))
    sources = (first, first, last)

    def expert() -> Expert:
        gate, up, down = (panels.prepare(weight, codes=name != PLAIN) for weight in sources)
        return Expert(gate, up, down)

    layers = [prepare_experts(ExpertTable(tuple(expert() for _ in range(NUM_EXPERTS)))) for _ in range(num_layers)]
    weights = [weight for table in layers for e in table.experts for weight in (e.gate, e.up, e.down)]
    expert_bytes = sum(weight.nbytes for weight in weights[:3])

    def route(rows: int) -> tuple[Tensor, Tensor]:
        ids = torch.stack([torch.randperm(NUM_EXPERTS)[:NUM_ACTIVE] for _ in range(rows)])
        return ids, torch.rand(rows, NUM_ACTIVE)

    def run(rows: int) -> tuple[Callable[[], None], int, float]:
        x = torch.randn(rows, HIDDEN).bfloat16()
        assert all(supports_moe(x, table) for table in layers)  # or PyTorch would be timed
        routes = [route(rows) for _ in layers]

        def call() -> None:
            for table, (ids, gate_weights) in zip(layers, routes, strict=True):
                CpuOperators.moe(x, ids, gate_weights, table)

        num_bytes = sum(len(ids.unique()) for ids, _ in routes) * expert_bytes
        return call, num_bytes, 6.0 * rows * NUM_ACTIVE * HIDDEN * WIDTH * num_layers

    return Case("moe", weights, run)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(case: Case, name: str, rows: tuple[int, ...], repeats: int) -> Iterator[Result]:
    matrices = [matrix_of(weight) for weight in case.weights]
    total_bytes = sum(weight.nbytes for weight in case.weights)
    threads = torch.get_num_threads()
    for count in rows:
        samples = []
        for _ in range(repeats):
            call, num_bytes, operations = case.run(count)
            elapsed = seconds(call)
            read = total_bytes / seconds(lambda: _native.checksum(matrices, threads)) / 1e9
            samples.append(
                (elapsed, num_bytes / elapsed / 1e9, num_bytes / elapsed / 1e9 / read, operations / elapsed / 1e9)
            )
        medians = [statistics.median(column) for column in zip(*samples, strict=True)]
        yield Result(case.kernel, name, count, medians[0] * 1e3, *medians[1:])


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", choices=("linear", "moe"), default=["linear", "moe"])
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if not extension.is_available():
        print(extension.why_unavailable(), file=sys.stderr)
        return 1
    torch.manual_seed(0)
    makers = {"linear": linear_case, "moe": moe_case}
    results: list[Result] = []
    print(f"{'kernel':8}{'format':8}{'rows':>5}{'ms':>10}{'GB/s':>8}{'of read':>9}{'Gop/s':>8}")
    for kernel in arguments.kernel:
        for name in arguments.format:
            case = makers[kernel](name, arguments.layers)
            for r in measure(case, name, tuple(arguments.rows), arguments.repeats):
                results.append(r)
                print(
                    f"{r.kernel:8}{r.format:8}{r.rows:5}{r.milliseconds:10.2f}{r.gigabytes_per_second:8.1f}"
                    f"{r.share_of_read:9.0%}{r.gigaoperations_per_second:8.0f}",
                    flush=True,
                )
            del case
    report = {
        "command": sys.argv,
        "commit": commit(),
        "isa": extension.isa(),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "results": [asdict(result) for result in results],
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
