"""amalgam in this process: `with_llm.py MODEL TOKENS LEAST LENGTH...`.

Answers `streams N`: seconds for N prompts (LEAST, if that is more) of the LENGTHs, TOKENS new ones each, N together.
The same prompts as the server gets in `serving.py`, round by round.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count

from protocol import Measure, answer, texts

from amalgam import LLM, SamplingParams


def load(stack: ExitStack, streams: int) -> Measure:
    model, *numbers = sys.argv[1:]
    num_tokens, least, *lengths = map(int, numbers)
    longest = max(lengths) + num_tokens
    settings = {
        "inference.max_seq_length": longest,
        "inference.max_batch_size": streams,
        "engine.kv_cache_bytes": longest * streams * 16384,
    }
    model_here = stack.enter_context(LLM(model=model, settings=settings))
    params = SamplingParams(
        max_new_tokens=num_tokens, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, do_sample=True, ignore_eos=True
    )
    seeds: defaultdict[int, Iterator[int]] = defaultdict(count)  # for each size, a round after the other

    def measure(scenario: str, size: int) -> float:
        prompts = texts(lengths, max(size, least), next(seeds[size]))
        with ThreadPoolExecutor(size) as clients:
            started = time.perf_counter()
            for [result] in clients.map(lambda prompt: model_here.generate(prompt, params), prompts):
                if result.error is not None:
                    raise result.error
            return time.perf_counter() - started

    return measure


with ExitStack() as running:
    answer(lambda: load(running, streams=16))
