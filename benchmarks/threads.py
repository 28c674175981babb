"""More threads than cores must cost nothing: steps of shape S on several numbers of threads, in turns.

    python benchmarks/threads.py                      # 2, 8, 16 and 64 threads; no more run than there are processors
    python benchmarks/threads.py --all-run            # as many run as are asked for, whatever the processors

A step is the program alone, without scheduling and sampling: one sequence and sixteen after 8 tokens of context, and a
prompt of 512. Ratios are medians over the rounds of the time to that of the first number of threads. All logits must
have the same bits. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median
from typing import Any

import torch
from rich.table import Table

from amalgam import _native
from amalgam.cli.console import out, progress_bar
from amalgam.config.inference import InferenceSettings
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.models.registry import read_spec
from amalgam.models.spec import ModelSpec
from amalgam.tools.bench import SHAPES, commit, hardware, random_weights

CONTEXT, BLOCK, LONGEST = 8, 16, 512
STEPS = {"1 sequence": (1, 1), "16 sequences": (16, 1), "prompt of 512": (1, LONGEST)}  # sequences, tokens of each


def steps_of(spec: ModelSpec) -> dict[str, StepContext]:
    blocks = LONGEST // BLOCK
    kv = KVCache.allocate(spec, 16 * blocks, BLOCK, torch.bfloat16, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    result = {}
    for name, (sequences, tokens) in STEPS.items():
        ids = torch.randint(0, spec.vocab_size, (sequences, tokens), generator=generator).tolist()
        first = CONTEXT if tokens == 1 else 0
        result[name] = StepContext(
            [StepSequence(own, first, range(i * blocks, (i + 1) * blocks), 1) for i, own in enumerate(ids)], kv
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int4", help="as `amalgam bench --shape S` takes them")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 8, 16, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="decoding steps that one figure is the mean of")
    parser.add_argument("--all-run", action="store_true", help="more threads than processors, too")
    arguments = parser.parse_args()
    _, spec = read_spec(SHAPES["S"], "shape S")
    device = torch.device("cpu")
    decoder = Decoder(spec, LONGEST, torch.bfloat16, device)
    with progress_bar() as progress:
        version = random_weights(spec, arguments.weights, InferenceSettings(), device, progress)
    if arguments.all_run:
        _native.limit_threads(max(arguments.threads))
    seconds: dict[str, dict[int, list[float]]] = {name: {n: [] for n in arguments.threads} for name in STEPS}
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for name, step in steps_of(spec).items():
            repeats = 1 if name.startswith("prompt") else arguments.steps
            expected = decoder.forward(step, version).clone()
            for _ in range(arguments.rounds):
                for threads in arguments.threads:
                    torch.set_num_threads(threads)
                    started = time.perf_counter()
                    for _ in range(repeats):
                        logits = decoder.forward(step, version)
                    seconds[name][threads].append((time.perf_counter() - started) / repeats)
                    if not torch.equal(logits, expected):
                        raise SystemExit(f"{name}: other bits with {threads} threads")
            first = seconds[name][arguments.threads[0]]
            results[name] = {
                threads: {
                    "milliseconds": 1e3 * median(own),
                    "ratio": median(one / other for one, other in zip(own, first, strict=True)),
                }
                for threads, own in seconds[name].items()
            }
    table = Table("step", *(f"{threads} threads, ms" for threads in arguments.threads))
    for name, row in results.items():
        table.add_row(name, *(f"{one['milliseconds']:.1f} ({one['ratio']:.2f})" for one in row.values()))
    out.print(table)
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), "steps": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
