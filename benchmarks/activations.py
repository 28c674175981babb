"""What the type of activations does to the logits, on the demo model: KL divergence and top-1 agreement.

    python benchmarks/activations.py [--sequences 24] [--tokens 192]

Text: answers that the bfloat16 checkpoint samples at temperature 1 to prompts in English, verse and Python, computed in
float32. Each row compares with float32 arithmetic over the same weights (what activations do) and over the bfloat16
weights (what weights and activations do together). Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.reading import load_settings
from amalgam.engine.params import SamplingParams
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.runtime.opening import open_deployment
from amalgam.tools.bench import commit

DEMO = Path(__file__).parent.parent / "models/demo"
CPU = torch.device("cpu")
BLOCK_SIZE = 16
PROMPTS = (
    "It was a dark night, and the captain",
    "She looked at him and said,",
    "明月几时有，",
    "春风",
    "import os\n\ndef main(",
    "class Reader:\n    def __init__(self",
)
WEIGHTS = ("bf16", "fp8", "int8", "int4")
ARITHMETIC = {
    "float32": {"dtype": "float32"},
    "int8 activations": {"dtype": "bfloat16", "activation": "int8"},
    "bf16 activations": {"dtype": "bfloat16", "activation": "bf16"},
}


def write_texts(count: int, num_tokens: int) -> list[list[int]]:
    """Token ids of sampled texts."""
    settings = load_settings(None, {"model.base_path": str(DEMO), "inference.dtype": "float32"}, {})
    deployment = open_deployment(settings)
    try:
        encode = deployment.tokenizer.encode
        prompts = [encode(PROMPTS[index % len(PROMPTS)]) for index in range(count)]
        params = [
            SamplingParams(max_new_tokens=num_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=index, ignore_eos=True)
            for index in range(count)
        ]
        answers = deployment.engine.generate(prompts, params)
        return [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
    finally:
        deployment.close()


@torch.inference_mode()
def log_probabilities(folder: Path, texts: list[list[int]], arithmetic: dict[str, str]) -> Tensor:
    """float64 `[tokens, vocabulary]` over all places of all texts."""
    inference = InferenceSettings(**arithmetic)
    mixed = MixedPrecisionSettings(sources={"other": str(folder)}, default_source="other")
    loader = ModelLoader(ModelSettings(base_path=str(DEMO), mixed_precision=mixed), inference, CPU, threads=2)
    version = loader.build(loader.plan(), 1).version
    dtype: torch.dtype = getattr(torch, inference.dtype)
    longest = max(map(len, texts))
    decoder = Decoder(loader.spec, longest, dtype, CPU)
    num_blocks = -(-longest // BLOCK_SIZE)
    cache = KVCache.allocate(loader.spec, num_blocks, BLOCK_SIZE, dtype, CPU)
    rows = []
    for text in texts:
        sequence = StepSequence(text, 0, range(num_blocks), len(text))
        logits = decoder.forward(StepContext([sequence], cache), version)
        rows.append(logits.double().log_softmax(-1))
    return torch.cat(rows)


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL divergence of `other` from `reference`, in nats per token."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def agreement(reference: Tensor, other: Tensor) -> float:
    return float((reference.argmax(-1) == other.argmax(-1)).double().mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=192)
    arguments = parser.parse_args()
    texts = write_texts(arguments.sequences, arguments.tokens)
    print(f"{sum(map(len, texts))} tokens in {len(texts)} texts")
    print(f"{'weights':8}{'arithmetic':20}{'KL, same weights':>18}{'top-1':>8}{'KL, bf16 weights':>18}{'top-1':>8}")
    results = []
    with tempfile.TemporaryDirectory() as work:
        base = log_probabilities(DEMO, texts, ARITHMETIC["float32"])
        for weights in WEIGHTS:
            folder = DEMO if weights == "bf16" else Path(work) / weights
            if weights != "bf16":
                quantize_checkpoint(str(DEMO), folder, weights, QuantizeOptions())
            same = log_probabilities(folder, texts, ARITHMETIC["float32"])
            for name, arithmetic in ARITHMETIC.items():
                if name == "bf16 activations" and not weights.startswith("int"):
                    continue  # the setting concerns integer weights
                other = log_probabilities(folder, texts, arithmetic)
                label = "bfloat16" if name == "int8 activations" and not weights.startswith("int") else name
                row = (divergence(same, other), agreement(same, other), divergence(base, other), agreement(base, other))
                results.append({"weights": weights, "arithmetic": label, "figures": row})
                print(f"{weights:8}{label:20}{row[0]:18.6f}{row[1]:8.2%}{row[2]:18.6f}{row[3]:8.2%}", flush=True)
    print(json.dumps({"command": sys.argv, "commit": commit(), "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
