"""Paged attention alone: decoding against a plain read of the same keys and values, prompts in GFLOP/s.

    python benchmarks/attention.py [--dtype float32] [--cache int8] [--heads 32 --kv-heads 4 --head-dim 128]
    python benchmarks/attention.py --against avx512      on a machine with AMX

Prints a table, and as the last line one JSON object. Every case and its plain read take turns over several layers'
caches, so that what is read is not in a cache of the processor and a disturbance hits both. `--against` runs a second
instruction set in turns, over the same caches, and tells how many times as fast the first one is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from amalgam import _native
from amalgam.kernels.backends.cpu import attention, extension
from amalgam.kernels.step import AttentionBatch, LayerCache
from amalgam.models.kv_cache import KV_TYPES, kv_type
from amalgam.tools.bench import commit, hardware

DECODE = [(context, sequences) for sequences in (1, 16) for context in (128, 1024, 8192)]
PROMPTS = (512, 2048)
BLOCK_SIZE = 16
CACHE_BYTES = 256 << 20  # read in turn before the first is read again


def empty_cache(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory as the engine's cache takes it."""
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def make_batch(lengths: list[int], contexts: list[int], generator: torch.Generator) -> tuple[AttentionBatch, int]:
    """Sequences over scattered blocks; the batch and the number of blocks."""
    counts = [-(-context // BLOCK_SIZE) for context in contexts]
    order = torch.randperm(sum(counts), generator=generator)
    tables = torch.zeros(len(contexts), max(counts), dtype=torch.int64)
    for row, ids in enumerate(order.split(counts)):
        tables[row, : len(ids)] = ids
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return AttentionBatch(starts, torch.tensor(contexts), tables, BLOCK_SIZE), sum(counts)


def take_turns(contestants: list[Callable[[int], object]], apart: int, repeats: int) -> list[list[float]]:
    """Seconds of each contestant's calls, in turns. Contestant i gets the number turn + i * apart."""
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(-2, repeats):
        for place, (contestant, seconds) in enumerate(zip(contestants, times, strict=True)):
            started = time.perf_counter()
            contestant(turn + place * apart)
            if turn >= 0:
                seconds.append(time.perf_counter() - started)
    return times


def measure(options: argparse.Namespace, lengths: list[int], contexts: list[int]) -> dict[str, float]:
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    batch, num_blocks = make_batch(lengths, contexts, generator)
    shape = (num_blocks * BLOCK_SIZE, options.kv_heads, options.head_dim)
    cache_type = kv_type(options.cache, dtype)
    is_coded = cache_type in (torch.int8, torch.float8_e4m3fn)
    row_bytes = options.head_dim * cache_type.itemsize + 4 * is_coded
    num_bytes = 2 * sum(contexts) * options.kv_heads * row_bytes
    layers = max(2 + (options.against is not None), min(64, CACHE_BYTES // num_bytes))
    caches = []
    for _ in range(layers):
        pair = empty_cache(shape, cache_type), empty_cache(shape, cache_type)
        scales = [empty_cache(shape[:2], torch.float32) for _ in pair] if is_coded else [None, None]
        layer = LayerCache(*pair, *scales)
        for part in pair:  # a part of it, again and again
            rows = torch.randn(min(len(part), 4096), *shape[1:], generator=generator)
            for slots in torch.arange(len(part)).split(4096):
                piece = rows[: len(slots)]
                attention.write_kv(layer, piece, piece, slots)
        caches.append(layer)
    query = torch.randn(sum(lengths), options.heads, options.head_dim, generator=generator).to(dtype)
    threads = torch.get_num_threads()

    def attend(isa: str, turn: int) -> None:
        extension.isa = lambda: isa  # type: ignore[method-assign]
        attention.paged_attention(query, caches[turn % layers], batch, scale=options.head_dim**-0.5)

    def read(turn: int) -> None:
        for cache in caches[turn % layers]:
            if cache is not None:
                _native.read_memory(cache, threads)

    contestants: list[Callable[[int], object]] = [partial(attend, options.isa), read]
    if options.against is not None:
        contestants.append(partial(attend, options.against))
    # Some layers apart, so that none finds in the processor's cache what another has read.
    ours, plain, *others = take_turns(contestants, layers // len(contestants), options.repeats)
    flops = sum(
        4 * options.heads * options.head_dim * sum(range(context - length + 1, context + 1))
        for length, context in zip(lengths, contexts, strict=True)
    )
    result = {
        "microseconds": median(ours) * 1e6,
        "gigabytes_per_second": num_bytes / median(ours) / 1e9,
        "plain_read": num_bytes / median(plain) / 1e9,
        "share_of_plain_read": median(b / a for a, b in zip(ours, plain, strict=True)),
        "gflops": flops / median(ours) / 1e9,
    }
    for theirs in others:
        result["times_as_fast"] = median(b / a for a, b in zip(ours, theirs, strict=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--cache", choices=("auto", *KV_TYPES), default="auto", help="of keys and values")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--isa", choices=_native.supported_isas(), default=extension.isa())
    parser.add_argument("--only", choices=("decode", "prompt"))
    parser.add_argument("--against", choices=_native.supported_isas(), metavar="ISA")
    options = parser.parse_args()
    if options.against == options.isa:
        parser.error(f"{options.isa} is what runs; needed: another one of {', '.join(_native.supported_isas())}")
    torch.set_num_threads(options.threads)

    cases = {f"decode {n} × {context}": ([1] * n, [context] * n) for context, n in DECODE}
    cases |= {f"prompt of {length}": ([length], [length]) for length in PROMPTS}
    results: dict[str, dict[str, float]] = {}
    against = "" if options.against is None else f"  × {options.against}"
    print(f"{'case':<18} {'µs':>10} {'GB/s':>7} {'plain':>7} {'share':>6} {'GFLOP/s':>8}{against}")
    for name, (lengths, contexts) in cases.items():
        if options.only and not name.startswith(options.only):
            continue
        row = results[name] = measure(options, lengths, contexts)
        ratio = f"{row['times_as_fast']:>{len(against)}.2f}" if against else ""
        print(
            f"{name:<18} {row['microseconds']:10.1f} {row['gigabytes_per_second']:7.1f} {row['plain_read']:7.1f} "
            f"{row['share_of_plain_read']:6.2f} {row['gflops']:8.1f}{ratio}",
            flush=True,
        )
    record = {
        "command": sys.argv,
        "commit": commit(),
        "hardware": hardware(),
        "isa": options.isa,
        "against": options.against,
        "shape": {"heads": options.heads, "kv_heads": options.kv_heads, "head_dim": options.head_dim},
        "dtype": options.dtype,
        "cache": options.cache,
        "results": results,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
