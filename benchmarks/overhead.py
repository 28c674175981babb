"""What a step costs outside the extension: scheduling, calls, sampling's set-up, text; shape S, random weights.

    python benchmarks/overhead.py [--weights int4] [--sequences 1 16] [--steps 200]

Every call into the extension is timed where it is made, and what is left of a step is Python's. Its parts are timed
likewise, each without what it calls of the others; medians, which need not add up. The timing itself is part of all
that, a fraction of a microsecond for each call. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

from amalgam import _native
from amalgam.config.reading import load_settings
from amalgam.engine import runner, step_loop
from amalgam.engine.runner import Runner
from amalgam.engine.scheduler import Scheduler
from amalgam.engine.step_loop import StepLoop
from amalgam.models.decoder import Decoder
from amalgam.tools import bench

EXTENSION, REST = "the extension", "the rest"
# Where Python's time in a step goes, by the functions that take it.
PARTS = {
    "scheduling": [(Scheduler, "schedule"), (Scheduler, "commit")],
    "the step's input": [(Runner, "execute")],
    "the model's call": [(Decoder, "forward")],
    "sampling's set-up": [(runner, "sample")],
    "tokens and text": [(step_loop, "_take")],
    "counting": [(StepLoop, "_measure"), (Runner, "commit")],
    REST: [(StepLoop, "_step")],
}


class Steps:
    """Seconds of every step, by part."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._parts: dict[str, float] = defaultdict(float)
        self._callees = [0.0]  # seconds in what is timed by itself, for each call under way
        for owner in (_native.Kernels, _native.AttentionKernels, _native.Program, _native):
            for name, member in list(vars(owner).items()):
                if callable(member) and not name.startswith("_") and not isinstance(member, type):
                    setattr(owner, name, self._timed(EXTENSION, member))
        for part, functions in PARTS.items():
            for owner, name in functions:
                setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._callees.append(0.0)
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds = time.perf_counter() - started
                self._parts[part] += seconds - self._callees.pop()
                self._callees[-1] += seconds
                if part == REST:  # the step's end
                    self.steps.append(dict(self._parts))
                    self._parts.clear()

        return call


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", default="int4", help="as `amalgam bench --shape S` takes them")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    steps = Steps()
    settings = load_settings(None, {"model.base_path": "", "engine.kv_cache_bytes": 1 << 30}, {})
    max_tokens, results = arguments.steps + 64, []
    print(f"{'sequences':>9}{'step ms':>9}{'outside µs':>12}{'quartiles':>14}")
    with bench.shape_engine(
        "S", arguments.weights, settings, max_tokens=max_tokens, max_batch=max(arguments.sequences)
    ) as (engine, spec):
        for count in arguments.sequences:
            bench.step_seconds(engine, spec, count, 10, 0)
            steps.steps.clear()
            bench.step_seconds(engine, spec, count, arguments.steps, 1)
            measured = steps.steps[2:]
            outside = [(sum(step.values()) - step[EXTENSION]) * 1e6 for step in measured]
            low, middle, high = quantiles(outside)
            milliseconds = median(sum(step.values()) for step in measured) * 1e3
            print(f"{count:9}{milliseconds:9.2f}{middle:12.0f}{f'{low:.0f} to {high:.0f}':>14}")
            parts = {part: median(step[part] for step in measured) * 1e6 for part in PARTS}
            for part, value in parts.items():
                print(f"{part:>18}{value:12.0f}")
            figures = {"step_milliseconds": milliseconds, "outside_microseconds": middle, "parts_microseconds": parts}
            results.append({"sequences": count, **figures})
    document = {"command": sys.argv, "commit": bench.commit(), "hardware": bench.hardware(), "results": results}
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
