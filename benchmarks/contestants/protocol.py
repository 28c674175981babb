"""How a contestant is asked: a line `SCENARIO SIZE` on its standard input, a line with the seconds on its output.

Only the standard library, so that it runs in every engine's own environment. Whatever the engine prints goes to the
standard error. A first line `ready` says that the model is loaded; `failed: why` that the engine cannot.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

Measure = Callable[[str, int], float]
VOCAB_SIZE = 32000


def token_ids(count: int, seed: int) -> list[int]:
    """The same random-looking tokens for every engine."""
    return [300 + (index * 7919 + seed * 31337) % 20000 for index in range(count)]


def answer(load: Callable[[], Measure]) -> None:
    """Load the engine, then answer until the input ends.

    Args:
        load: returns what measures `prompt` (seconds for a prompt of so many tokens) and `decode` (seconds of one step
            of so many sequences).
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        measure = load()
    except Exception as error:
        traceback.print_exc()
        print(f"failed: {type(error).__name__}: {error}".splitlines()[0], file=replies, flush=True)
        return
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        scenario, size = line.split()
        print(measure(scenario, int(size)), file=replies, flush=True)
