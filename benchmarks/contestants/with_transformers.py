"""transformers, bfloat16, experts through grouped matrix products: `with_transformers.py FOLDER`."""

from __future__ import annotations

import statistics
import sys
import time
from itertools import count

import torch
from protocol import Measure, answer, token_ids
from transformers import AutoModelForCausalLM

STEPS, WARM_UP, CONTEXT = 10, 2, 8


@torch.inference_mode()
def load() -> Measure:
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).eval()
    seeds = count()

    @torch.inference_mode()
    def measure(scenario: str, size: int) -> float:
        if scenario == "prompt":
            ids = torch.tensor([token_ids(size, next(seeds))])
            started = time.perf_counter()
            model(ids, logits_to_keep=1)
            return time.perf_counter() - started
        cache = model(torch.tensor(token_ids(size * CONTEXT, next(seeds))).view(size, CONTEXT)).past_key_values
        steps = []
        for _ in range(STEPS):
            ids = torch.tensor(token_ids(size, next(seeds))).view(size, 1)
            started = time.perf_counter()
            model(ids, past_key_values=cache, use_cache=True)
            steps.append(time.perf_counter() - started)
        return statistics.median(steps[WARM_UP:])

    return measure


answer(load)
