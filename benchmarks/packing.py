"""How fast weights are packed, in GB/s of what they are stored in: one thread, and several on weights of their own.

    python benchmarks/packing.py [--threads 2] [--formats bf16-coded bf16 int4 int8 fp8]

The weight is an expert's projection, random and in the processor's cache at most in part; memory that is packed into is
given back and taken anew. Rounds take turns; medians. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from rich.table import Table

from amalgam.cli.console import out
from amalgam.formats.registry import writable_format
from amalgam.kernels.backends.cpu import extension, panels
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.tools.bench import commit, hardware

SHAPE = (768, 2048)
NUM_WEIGHTS = 32  # 100 MB in bf16: more than most caches hold
CODED = "bf16-coded"


def weights_of(name: str) -> list[PackedWeight]:
    values = [(torch.randn(SHAPE) * 0.02).bfloat16() for _ in range(NUM_WEIGHTS)]
    if name.startswith("bf16"):
        return [dense(value) for value in values]
    weight_format = writable_format(name)
    template = weight_format.pack(quantize(values[0], weight_format, round_to_nearest))
    return [
        PackedWeight(
            template.layout, SHAPE, {name: part.clone() for name, part in template.parts.items()}, template.block
        )
        for _ in values
    ]


def seconds_of(weights: list[PackedWeight], codes: bool, threads: int) -> float:
    def pack(weight: PackedWeight) -> None:
        panels.prepare(weight, codes=codes)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(pack, weights[:threads]))  # threads that run
        started = time.perf_counter()
        list(pool.map(pack, weights))
        return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", nargs="+", default=[CODED, "bf16", "int4", "int8", "fp8"])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    weights = {name: weights_of(name) for name in arguments.formats}
    rates: dict[str, dict[int, list[float]]] = {name: {n: [] for n in arguments.threads} for name in weights}
    for _ in range(arguments.rounds):
        for name, own in weights.items():
            for threads in arguments.threads:
                nbytes = sum(weight.nbytes for weight in own)
                rates[name][threads].append(nbytes / 1e9 / seconds_of(own, name == CODED, threads))
    table = Table("format", *(f"{threads} threads, GB/s" for threads in arguments.threads), title=extension.isa())
    medians = {name: {threads: median(values) for threads, values in row.items()} for name, row in rates.items()}
    for name, row in medians.items():
        table.add_row(name, *(f"{rate:.2f}" for rate in row.values()))
    out.print(table)
    record = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "isa": extension.isa()}
    print(json.dumps({**record, "gigabytes_per_second": medians}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
