"""What a step costs whose experts lie on two devices, against the same step on one, and how many bytes move.

    python benchmarks/placement.py --weights bf16+int4 --rounds 9

The model runs on the processors, and a stand-in for a card (`cpu:1`, a second CPU backend with one compute thread) has
some or all of the experts. All placements share the weights and take turns, step by step, in an order that changes, so
that a disturbance hits all of them. Of each there are the median step, and the median of its rounds' ratios to the step
on one device, with the least and the greatest. It says what the seam costs and what moves, not how fast a card is.
Prints a table and, as the last line, one JSON object. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from amalgam.config.engine import EngineSettings
from amalgam.config.inference import InferenceSettings
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.models.registry import read_spec
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import Origin, WeightVersion, is_expert
from amalgam.runtime.threads import set_threads
from amalgam.tools.bench import SHAPES, commit, hardware, random_ids, random_weights

DEVICE, BLOCK_SIZE = "cpu:1", 16
SHARES = (0.0, 0.125, 0.5, 1.0)  # of a layer's experts that lie on the stand-in


@dataclass
class Timings:
    """Steps of one placement with so many tokens.

    Attributes:
        share: of the experts on the stand-in.
        rows: (token, expert) pairs that it has multiplied, per step.
        sent_bytes, returned_bytes: per step.
    """

    tokens: int
    share: float
    seconds: list[float] = field(default_factory=list)
    rows: float = 0.0
    sent_bytes: float = 0.0
    returned_bytes: float = 0.0


def placed(version: WeightVersion, spec: ModelSpec, share: float) -> WeightVersion:
    """The same weights, with the first experts of each layer on the stand-in."""
    origins = {}
    for slot in spec.slots:
        if slot.role == "expert" and int(slot.name.split(".")[4]) < share * spec.num_experts:
            origins[slot.name] = Origin(slot.name, slot.name, "", "", "", slot.shape, "", (), DEVICE)
    weights = {slot.name: version[slot.name] for slot in spec.slots}
    made = WeightVersion(1, weights, origins, {})
    assert sum(map(is_expert, made.devices)) == int(share * spec.num_experts) * spec.num_layers
    return made


class Steps:
    """Steps of one placement, in which each of some sequences has its first token."""

    def __init__(self, spec: ModelSpec, version: WeightVersion, dtype: torch.dtype, most: int) -> None:
        self._spec = spec
        self._decoder = Decoder(spec, BLOCK_SIZE, dtype, torch.device("cpu"))
        self._compiled = self._decoder.compile(version)
        self._cache = KVCache.allocate(spec, most, BLOCK_SIZE, dtype, torch.device("cpu"))

    def run(self, tokens: int, seed: int) -> float:
        """Seconds of a step of so many sequences."""
        ids = random_ids(self._spec, tokens, seed)
        step = StepContext([StepSequence([token], 0, [place], 1) for place, token in enumerate(ids)], self._cache)
        started = time.perf_counter()
        self._compiled.run(step)
        return time.perf_counter() - started

    @property
    def moved(self) -> tuple[int, int, int]:
        traffic = self._decoder.traffic.get(DEVICE)
        return (0, 0, 0) if traffic is None else (traffic.num_rows, traffic.sent_bytes, traffic.returned_bytes)


@torch.inference_mode()
def measure(
    spec: ModelSpec, version: WeightVersion, dtype: torch.dtype, sizes: Sequence[int], rounds: int, repeats: int
) -> list[Timings]:
    """Placements in turns."""
    steps = {share: Steps(spec, placed(version, spec, share), dtype, max(sizes)) for share in SHARES}
    found = []
    for tokens in sizes:
        timings = {share: Timings(tokens, share) for share in SHARES}
        before = {share: steps[share].moved for share in SHARES}
        for number in range(rounds + 1):  # the first round warms up
            order = SHARES if number % 2 else SHARES[::-1]
            taken: dict[float, list[float]] = {share: [] for share in SHARES}
            for repeat in range(repeats):
                for share in order:
                    taken[share].append(steps[share].run(tokens, number * repeats + repeat))
            if number:
                for share in SHARES:
                    timings[share].seconds.append(median(taken[share]))
        for share, one in timings.items():
            count = (rounds + 1) * repeats
            moved = [(now - then) / count for now, then in zip(steps[share].moved, before[share], strict=True)]
            one.rows, one.sent_bytes, one.returned_bytes = moved
        found += timings.values()
    return found


def show(found: Sequence[Timings]) -> None:
    table = Table("tokens", "experts apart", "step, ms", "against one device", "rows", "sent/token", "returned/token")
    alone: Timings | None = None
    for one in found:
        alone = one if one.share == 0 else alone
        assert alone is not None
        ratios = sorted(mine / its for mine, its in zip(one.seconds, alone.seconds, strict=True))
        table.add_row(
            str(one.tokens),
            f"{one.share:.1%}",
            f"{1e3 * median(one.seconds):.2f}",
            f"{median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})",
            f"{one.rows:.0f}",
            f"{one.sent_bytes / one.tokens / 1e3:.1f} KB",
            f"{one.returned_bytes / one.tokens / 1e3:.1f} KB",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default=next(iter(SHAPES)))
    parser.add_argument("--weights", default="bf16+int4", help="as `amalgam bench --weights`")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 4, 16, 64))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5, help="steps of a round")
    args = parser.parse_args()
    set_threads(EngineSettings())
    inference = InferenceSettings(dtype=args.dtype)
    _, spec = read_spec(SHAPES[args.shape], f"shape {args.shape}")
    version = random_weights(spec, args.weights, inference, torch.device("cpu"))
    found = measure(spec, version, getattr(torch, args.dtype), args.tokens, args.rounds, args.repeats)
    show(found)
    report = {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "hardware": hardware(),
        "timings": [asdict(one) for one in found],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
