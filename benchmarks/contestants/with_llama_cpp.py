"""llama.cpp through llama-cpp-python's low-level interface: `with_llama_cpp.py MODEL.gguf`."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

from llama_cpp import llama_cpp
from protocol import Measure, answer, token_ids

THREADS, MAX_BATCH, STEPS, WARM_UP = 2, 16, 24, 3


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    pass


def load() -> Measure:
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 8192, 2048, 512
    params.n_threads = params.n_threads_batch = THREADS
    params.n_seq_max, params.kv_unified = MAX_BATCH, True
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot load {sys.argv[1]}")
    seeds = count()

    def run(tokens: Sequence[tuple[int, int, int, bool]]) -> float:
        """One call with (token, position, sequence, whether its logits are wanted)."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, (token, position, sequence, wants_logits) in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wants_logits
        started = time.perf_counter()
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_synchronize(context)
        elapsed = time.perf_counter() - started
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")
        return elapsed

    def measure(scenario: str, size: int) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        ids = token_ids(size if scenario == "prompt" else size * STEPS, next(seeds))
        if scenario == "prompt":
            return run([(token, index, 0, index == size - 1) for index, token in enumerate(ids)])
        steps = [
            run([(ids[step * size + sequence], step, sequence, True) for sequence in range(size)])
            for step in range(STEPS)
        ]
        return statistics.median(steps[WARM_UP:])

    return measure


answer(load)
