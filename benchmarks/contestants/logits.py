"""Log-probabilities that another engine gives: `logits.py transformers|vllm FOLDER TOKEN_IDS.json OUT.pt`.

In: lists of token ids. Out: float32 `[tokens that are known, vocabulary]`, one sequence after the other: of every
position but the last.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def with_transformers(folder: str, sequences: list[list[int]], dtype: str) -> list:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1) for ids in sequences]


def with_vllm(folder: str, sequences: list[list[int]], dtype: str) -> list:
    import torch
    from vllm import LLM, SamplingParams

    model = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=max(map(len, sequences)) + 1,
        max_num_seqs=1,
        max_logprobs=-1,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    params = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    found = model.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)
    rows = []
    for output in found:
        for position in output.prompt_logprobs[1:]:
            row = torch.full((len(position),), float("-inf"))
            row[list(position)] = torch.tensor([each.logprob for each in position.values()])
            rows.append(row)
    return [torch.stack(rows)]


def main() -> None:
    import torch

    engine, folder, ids, out, dtype = sys.argv[1:]
    sequences = json.loads(Path(ids).read_text())
    found = {"transformers": with_transformers, "vllm": with_vllm}[engine](folder, sequences, dtype)
    torch.save(torch.cat(found), out)


if __name__ == "__main__":  # vLLM starts its workers as processes that import this file
    main()
