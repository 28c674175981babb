"""vLLM on the CPU, weights as the folder has them, all else bfloat16: `with_vllm.py FOLDER`."""

from __future__ import annotations

import os
import sys
import time
from itertools import count

from protocol import Measure, answer, token_ids

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_NO_USAGE_STATS": "1",
}
STEPS, CONTEXT = 24, 8


def load() -> Measure:
    from vllm import LLM, SamplingParams

    model = LLM(
        model=sys.argv[1],
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=16,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    seeds = count()

    def run(num_sequences: int, length: int, num_new: int) -> float:
        prompts = [{"prompt_token_ids": token_ids(length, next(seeds))} for _ in range(num_sequences)]
        params = SamplingParams(max_tokens=num_new, ignore_eos=True, temperature=1.0, detokenize=False)
        started = time.perf_counter()
        model.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started

    def measure(scenario: str, size: int) -> float:
        if scenario == "prompt":
            return run(1, size, 1)
        short = run(size, CONTEXT, 2)
        return (run(size, CONTEXT, STEPS + 2) - short) / STEPS

    return measure


if __name__ == "__main__":  # vLLM starts its workers as processes that import this file
    answer(load)
