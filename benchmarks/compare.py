"""Shape S in amalgam and in other engines, in one run: what docs/performance.md is written from.

Whole models first; then (`experts-…`) the block of experts alone, as kt-kernel has no whole model on a CPU.

    python benchmarks/compare.py FOLDER                      everything; FOLDER keeps environments and models (70 GB)
    python benchmarks/compare.py FOLDER --only int4 int8     some rows of the table
    python benchmarks/compare.py FOLDER --only Q4_K_M Q6_K   the same GGUF file in llama.cpp and here, by its type
    python benchmarks/compare.py FOLDER --only S-mix qwen3.5-mix    int4 with fp8 experts, shape S and layers of
                                                             Qwen3.5-35B-A3B (18 GB)
    python benchmarks/compare.py FOLDER --only Q5_0 --random-codes     without quantizing, which takes llama.cpp long
    python benchmarks/compare.py FOLDER --only int4-vllm int8-vllm fp8-vllm    one checkpoint for both; on machines with
                                                             AMX, as vLLM's experts need it
    python benchmarks/compare.py FOLDER --only experts-int4 experts-int8 experts-fp8 experts-bf16
    python benchmarks/compare.py FOLDER --without vllm       without an engine that does not install

An engine that refuses its model on this processor, or dies, is shown with its own reason, and the others are measured.
llama.cpp is built again without AMX where it crashes with it, and is called so.

Every engine is a process of its own and is stopped (SIGSTOP) while another is asked. Within a comparison they take
turns round by round, so that a disturbance of the machine hits all; a ratio is the median of the rounds' ratios. Prints
tables and, as the last line, one JSON object. Needs a quiet machine: nothing else may compute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engines import Engine, EngineError, exit_on_signals, running
from environments import QUANTIZED, prepare
from llama_builds import labelled

from amalgam.tools.bench import commit, hardware

OTHERS = ("kt-kernel", "llama", "transformers", "vllm")
LABEL = 36  # characters of an engine's name
ROWS = tuple(("rows", count) for count in (1, 8, 16, 128, 512))  # of a block of experts
SCENARIOS = (("prompt", 128), ("prompt", 512), ("decode", 1), ("decode", 8), ("decode", 16))


# Types of GGUF whose files both read as they are.
GGUF_KINDS = ("Q4_1", "Q5_0", "Q5_1", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS")


READS = tuple(("read", size) for scenario, size in SCENARIOS if scenario == "decode")


def ours(weights: str, *extra: tuple[str, int], options: tuple[str, ...] = ()) -> Engine:
    return Engine("with_amalgam.py", options=(weights, *options), extra=(*READS, *extra))


def our_file(model: str) -> Engine:
    return Engine("with_amalgam.py", model, extra=READS)


def same_checkpoint(model: str) -> dict[str, Engine]:
    """Embeddings and head are wide in both."""
    kind = model.removeprefix("S-")
    return {f"amalgam {kind}": our_file(model), f"vllm {kind}": Engine("with_vllm.py", model, "vllm")}


LLAMA = {kind: Engine("with_llama_cpp.py", f"S-{kind}.gguf", "llama") for kind in ("bf16", "Q4_0", "Q8_0")}
# Subject first. No more than fits 24 GB at once.
COMPARISONS: dict[str, dict[str, Engine]] = {
    "int4": {"amalgam int4": ours("int4", ("context", 8192)), "llama.cpp Q4_0": LLAMA["Q4_0"]},
    "int8": {"amalgam int8": ours("int8"), "llama.cpp Q8_0": LLAMA["Q8_0"]},
    "bf16": {"amalgam bf16": ours("bf16"), "llama.cpp bf16": LLAMA["bf16"]},
    "bf16-transformers": {
        "amalgam bf16": ours("bf16"),
        "transformers bf16": Engine("with_transformers.py", "S", "transformers"),
    },
    "bf16-vllm": {"amalgam bf16": ours("bf16"), "vllm bf16": Engine("with_vllm.py", "S", "vllm")},
    **{f"{model.removeprefix('S-')}-vllm": same_checkpoint(model) for model in QUANTIZED},
    # bf16 in 16 bits a weight, and in the 12 that it is kept in unless told otherwise.
    "fp8": {
        "amalgam fp8": ours("fp8"),
        "amalgam bf16, 16 bits": ours("bf16", options=("inference.bf16_coding=false",)),
        "amalgam bf16": ours("bf16"),
    },
    # Attention and head bf16; a random half of each layer's experts int4, the others fp8.
    "mixed": {
        "amalgam bf16+int4/fp8": ours("bf16+int4/fp8"),
        "amalgam bf16+int4": ours("bf16+int4"),
        "amalgam bf16+fp8": ours("bf16+fp8"),
        "amalgam int8": ours("int8"),
    },
}
# Eight layers' experts. kt-kernel as its wheel ships.
BLOCKS: dict[str, dict[str, Engine]] = {
    f"experts-{kind}": {
        f"amalgam {kind}": Engine("moe_with_amalgam.py", options=(kind,)),
        f"vllm {kind}": Engine("moe_with_vllm.py", environment="vllm", options=(kind,)),
        f"kt-kernel {kind}": Engine("moe_with_kt_kernel.py", environment="kt-kernel", options=(kind,)),
    }
    for kind in ("int4", "int8", "fp8", "bf16")
}
COMPARISONS |= BLOCKS
DEFAULT = list(COMPARISONS)
COMPARISONS |= {
    kind: {
        f"amalgam {kind}": our_file(f"S-{kind}.gguf"),
        f"llama.cpp {kind}": Engine("with_llama_cpp.py", f"S-{kind}.gguf", "llama"),
    }
    for kind in GGUF_KINDS
}
# Half of the experts in eight bits a weight, all else in four. llama.cpp has no fp8, and all experts of a layer in one
# type.
COMPARISONS |= {
    mix: {
        "amalgam int4, fp8": our_file(mix),
        "llama.cpp Q4_0, Q8_0": Engine("with_llama_cpp.py", f"{mix}.gguf", "llama"),
    }
    for mix in ("S-mix", "qwen3.5-mix")
}
COMPARISONS["qwen3.5-attention"] = {
    "amalgam qwen3.5": ours("qwen3.5-layers:int4+int4/fp8"),
    "all layers attention": ours("qwen3.5-attention:int4+int4/fp8"),
}


@dataclass
class Timings:
    """Seconds of one engine, by scenario, one for each round; none if it failed."""

    engine: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failure: str | None = None

    def add(self, scenario: str, size: int, seconds: float) -> None:
        self.seconds.setdefault(f"{scenario} {size}", []).append(seconds)

    def fail(self, reason: EngineError) -> None:
        self.failure = str(reason)
        self.seconds.clear()


def without(comparisons: Mapping[str, dict[str, Engine]], environments: Sequence[str]) -> dict[str, dict[str, Engine]]:
    """Without engines of these environments, and without comparisons that they leave nobody else in."""
    left = {}
    for name, engines in comparisons.items():
        kept = {key: engine for key, engine in engines.items() if engine.environment not in environments}
        if len(kept) == len(engines) or any(engine.environment for engine in kept.values()):
            left[name] = kept
    return left


def compare(
    engines: Mapping[str, Engine], folder: Path, rounds: int, scenarios: Sequence[tuple[str, int]] = SCENARIOS
) -> list[Timings]:
    timings = {name: Timings(name) for name in engines}
    failures: dict[str, EngineError] = {}
    with running(engines, folder, failures) as contestants:

        def ask(name: str, scenario: tuple[str, int], *, counts: bool) -> None:
            if name in failures:
                return
            try:
                seconds = contestants[name].ask(*scenario)
            except EngineError as error:
                failures[name] = error
                return
            if counts:
                timings[name].add(*scenario, seconds)

        for index in range(rounds + 1):  # the first one warms up
            for scenario in scenarios:
                order = list(engines)
                for name in order if index % 2 else order[::-1]:
                    ask(name, scenario, counts=index > 0)
            for name in engines:
                for scenario in engines[name].extra:
                    if index == 0 or (scenario[0] == "context" and index > 2):  # long: two rounds do
                        continue
                    ask(name, scenario, counts=True)
    for name, error in failures.items():
        timings[name].fail(error)
    return list(timings.values())


def ratios(subject: Timings, peer: Timings, scenario: str) -> list[float]:
    """How many times faster the subject is, round by round."""
    return [b / a for a, b in zip(subject.seconds[scenario], peer.seconds[scenario], strict=True)]


def ratio(subject: Timings, peer: Timings, scenario: str) -> str:
    samples = ratios(subject, peer, scenario)
    return f"{statistics.median(samples):.2f} ({min(samples):.2f}–{max(samples):.2f})"


def report(name: str, timings: Sequence[Timings]) -> None:
    is_block = name in BLOCKS
    keys = [f"{scenario} {size}" for scenario, size in (ROWS if is_block else SCENARIOS)]
    title = f"{name}, {'ms' if is_block else 'tokens/s'}"
    print(f"\n{title:>{LABEL}}" + "".join(f"{key:>18}" for key in keys))
    for timing in timings:
        print(f"{timing.engine:>{LABEL}}", end="")
        if timing.failure is not None:
            print(f"  failed: {timing.failure}")
            continue
        medians = [(int(key.split()[1]), statistics.median(timing.seconds[key])) for key in keys]
        print("".join(f"{seconds * 1e3 if is_block else size / seconds:18.1f}" for size, seconds in medians))
    subject, *peers = timings
    if subject.failure is not None:
        return
    for peer in peers:
        if peer.failure is None:
            print(f"{'× ' + peer.engine:>{LABEL}}" + "".join(f"{ratio(subject, peer, key):>18}" for key in keys))
    if not is_block:
        report_whole(name, subject, peers)


def report_whole(name: str, subject: Timings, peers: Sequence[Timings]) -> None:
    """What is said of whole models beside their speeds."""
    keys = [f"{scenario} {size}" for scenario, size in SCENARIOS]
    for size in (size for scenario, size in SCENARIOS if scenario == "decode"):
        seconds = zip(subject.seconds[f"read {size}"], subject.seconds[f"decode {size}"], strict=True)
        share = statistics.median(read / step for read, step in seconds)
        label = f"decode {size}"
        print(f"{label:>{LABEL}}: a plain read of the same weights takes {share:.0%} of the step")
    if name == "mixed" and not any(peer.failure for peer in peers):
        int4, fp8, _ = peers
        for key in keys:
            predicted = [(a + b) / 2 for a, b in zip(int4.seconds[key], fp8.seconds[key], strict=True)]
            against = [a / b for a, b in zip(subject.seconds[key], predicted, strict=True)]
            print(f"{key:>{LABEL}}: {statistics.median(against):.3f} of the time that its parts predict")
    if "context 8192" in subject.seconds:
        context, short = (statistics.median(subject.seconds[key]) for key in ("context 8192", "decode 1"))
        print(
            f"{'context':>{LABEL}}: a step after 8192 tokens takes {context * 1e3:.1f} ms, after 8 {short * 1e3:.1f} ms"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="keeps environments and models")
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), default=DEFAULT)
    parser.add_argument("--without", nargs="+", choices=OTHERS, default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--random-codes", action="store_true", help="GGUF files of random codes, made in seconds")
    arguments = parser.parse_args()
    exit_on_signals()
    chosen = without({name: COMPARISONS[name] for name in arguments.only}, arguments.without)
    needed = [engine for engines in chosen.values() for engine in engines.values()]
    environments = {engine.environment for engine in needed if engine.environment}
    if arguments.random_codes:
        environments.add("llama-server")  # its llama-quantize says which tensor gets which type
    models = {engine.model for engine in needed if engine.model}
    prepare(arguments.folder, environments, models, random_codes=arguments.random_codes)
    results: dict[str, list[Timings]] = {}
    for name, engines in chosen.items():
        started = time.monotonic()
        named = {labelled(engine, arguments.folder, how.environment): how for engine, how in engines.items()}
        results[name] = compare(named, arguments.folder, arguments.rounds, ROWS if name in BLOCKS else SCENARIOS)
        report(name, results[name])
        print(f"{'took':>{LABEL}}: {time.monotonic() - started:.0f} s", flush=True)
    document = {
        "command": sys.argv,
        "commit": commit(),
        "hardware": hardware(),
        "results": {name: [asdict(timing) for timing in timings] for name, timings in results.items()},
    }
    print(json.dumps(document))
    return any(timings[0].failure is not None for timings in results.values())


if __name__ == "__main__":
    sys.exit(main())
