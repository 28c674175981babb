"""amalgam of any commit, run by that checkout's own Python: `with_checkout.py ROOT SHAPE WEIGHTS`.

Uses only what has had the same meaning in all commits, and looks where names have moved from.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from protocol import Measure, answer
from shapes import SHAPES

MAX_BATCH, STEPS = 16, 24
# The prompt of 512 and what follows; GPT-2's positions end at 1,024.
MAX_TOKENS = 1000


def first_of(name: str, *modules: str) -> Any:
    """What is called so, in the first of the modules that has it."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"{name} is in none of {', '.join(modules)}")


def load(stack: ExitStack) -> Measure:
    import amalgam
    from amalgam.tools import bench

    root, shape, weights = sys.argv[1:]
    place = Path(amalgam.__file__)
    if not place.is_relative_to(root):
        raise ImportError(f"{sys.executable} imports {place.parent}, which is not in {root}")
    bench.SHAPES = {**bench.SHAPES, **SHAPES}
    settings = first_of("load_settings", "amalgam.config.reading", "amalgam.config.settings", "amalgam.config")(
        None, {"model.base_path": "", "engine.kv_cache_bytes": 1 << 29}, {}
    )
    engine, spec = stack.enter_context(
        bench.shape_engine(shape, weights, settings, max_tokens=MAX_TOKENS, max_batch=MAX_BATCH)
    )
    seeds = count()

    def measure(scenario: str, size: int) -> float:
        seconds: float
        if scenario == "prompt":
            seconds = bench.prompt_seconds(engine, spec, size, next(seeds))
        else:
            seconds = bench.step_seconds(engine, spec, size, STEPS, next(seeds))
        return seconds

    return measure


with ExitStack() as running:
    answer(lambda: load(running))
