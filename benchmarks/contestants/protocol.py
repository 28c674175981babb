"""How a contestant is asked: a line `SCENARIO SIZE` on its standard input, a line with the seconds on its output.

Only the standard library, so that it runs in every engine's own environment. Whatever the engine prints goes to the
standard error. A first line `ready` says that the model is loaded; `failed: why` that the engine cannot.
"""

from __future__ import annotations

import os
import random
import string
import sys
import traceback
from collections.abc import Callable, Sequence

Measure = Callable[[str, int], float]
VOCAB_SIZE = 32000


def token_ids(count: int, seed: int) -> list[int]:
    """The same random-looking tokens for every engine."""
    return [300 + (index * 7919 + seed * 31337) % 20000 for index in range(count)]


def text(length: int, seed: int) -> str:
    """So many characters, which are as many tokens for a vocabulary without merges; the same for every engine.

    Seeds that are each other's negatives give the same.
    """
    return "".join(random.Random(seed).choices(string.ascii_letters + string.digits, k=length))


def texts(lengths: Sequence[int], count: int, seed: int) -> list[str]:
    """So many prompts, of each length equally many, in a random order."""
    chosen = [lengths[index % len(lengths)] for index in range(count)]
    random.Random(seed).shuffle(chosen)
    return [text(length, seed * 100_003 + index) for index, length in enumerate(chosen)]


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
