"""What a step costs outside the extension: scheduling, tensors, sampling's set-up, delivery; shape S, random weights.

    python benchmarks/overhead.py [--weights int4] [--sequences 1 16] [--steps 200]

Every call into the extension is timed where it is made, and what is left of a step is Python's. The timing itself is
part of that, a fraction of a microsecond for each call. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

from amalgam import _native
from amalgam.config import load_settings
from amalgam.engine.core import Engine
from amalgam.tools import bench


class Steps:
    """Seconds of every step, and of the calls into the extension within it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.inside: list[float] = []
        self._inside = 0.0
        for owner in (_native.Kernels, _native.AttentionKernels, _native.Stack, _native):
            for name, member in list(vars(owner).items()):
                if callable(member) and not name.startswith("_") and not isinstance(member, type):
                    setattr(owner, name, self._timed(member))
        step = Engine._step

        def timed_step(engine: Engine) -> Any:
            self._inside, started = 0.0, time.perf_counter()
            result = step(engine)
            self.seconds.append(time.perf_counter() - started)
            self.inside.append(self._inside)
            return result

        Engine._step = timed_step  # type: ignore[method-assign]

    def clear(self) -> None:
        self.seconds.clear()
        self.inside.clear()

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self._inside += time.perf_counter() - started

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
            steps.clear()
            bench.step_seconds(engine, spec, count, arguments.steps, 1)
            outside = [(a - b) * 1e6 for a, b in zip(steps.seconds[2:], steps.inside[2:], strict=True)]
            low, middle, high = quantiles(outside)
            step = median(steps.seconds[2:]) * 1e3
            print(f"{count:9}{step:9.2f}{middle:12.0f}{f'{low:.0f} to {high:.0f}':>14}")
            results.append({"sequences": count, "step_milliseconds": step, "outside_microseconds": middle})
    document = {"command": sys.argv, "commit": bench.commit(), "hardware": bench.hardware(), "results": results}
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
