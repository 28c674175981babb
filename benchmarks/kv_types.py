"""What the type of the KV cache does to logits, against a cache in float32.

    python benchmarks/kv_types.py [--model FOLDER_OR_GGUF] [--text README.md] [--tokens 512] [--texts 4]

Cuts a text into pieces, computes each as one prompt, and compares the logits of all places: all of a piece's attention
reads keys and values back from the cache. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import ModelSettings
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KV_TYPES, KVCache
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.bench import commit, hardware

ROOT = Path(__file__).resolve().parents[1]
CPU, BLOCK_SIZE = torch.device("cpu"), 16


class Model:
    """A model on the CPU, with activations of one type."""

    def __init__(self, path: str, dtype: str, longest: int) -> None:
        inference = InferenceSettings(dtype=dtype)  # type: ignore[arg-type]
        loader = ModelLoader(ModelSettings(base_path=path), inference, CPU, threads=2)
        self.version = loader.build(loader.plan(), 1).version
        self.decoder = Decoder(loader.spec, longest, getattr(torch, dtype), CPU)
        self.tokenizer = Tokenizer.load(loader.base_folder, loader.base_metadata)

    @torch.inference_mode()
    def logits(self, pieces: list[list[int]], cache_type: torch.dtype) -> Tensor:
        """float64 `[tokens, vocabulary]` over all places of all pieces."""
        rows = []
        for piece in pieces:
            num_blocks = -(-len(piece) // BLOCK_SIZE)
            cache = KVCache.allocate(self.decoder.spec, num_blocks, BLOCK_SIZE, cache_type, CPU)
            sequence = StepSequence(piece, 0, range(num_blocks), len(piece))
            rows.append(self.decoder.forward(StepContext([sequence], cache), self.version).double())
        return torch.cat(rows)

    def token_bytes(self, cache_type: torch.dtype) -> int:
        return KVCache.bytes_per_block(self.decoder.spec, BLOCK_SIZE, cache_type) // BLOCK_SIZE


def compare(base: Tensor, other: Tensor) -> dict[str, float]:
    """Mean KL divergence in nats per token, largest and typical difference of a logit, equal first choices."""
    reference, found = base.log_softmax(-1), other.log_softmax(-1)
    return {
        "kl": float((reference.exp() * (reference - found)).sum(-1).mean()),
        "largest": float((base - other).abs().max()),
        "rms": float((base - other).square().mean().sqrt()),
        "top1": float((base.argmax(-1) == other.argmax(-1)).double().mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "demo"))
    parser.add_argument("--text", type=Path, default=ROOT / "README.md")
    parser.add_argument("--tokens", type=int, default=512, help="of a piece")
    parser.add_argument("--texts", type=int, default=4, help="pieces")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    print(f"{'activations':13}{'cache':11}{'bytes/token':>12}{'mean KL':>12}{'max |Δ|':>10}{'rms Δ':>10}{'top-1':>9}")
    base: Tensor | None = None
    for dtype in ("float32", "bfloat16"):
        model = Model(options.model, dtype, options.tokens)
        ids = list(model.tokenizer.encode(options.text.read_text(encoding="utf-8")))
        pieces = [ids[at : at + options.tokens] for at in range(0, len(ids), options.tokens)][: options.texts]
        if base is None:
            base = model.logits(pieces, torch.float32)
        for name, cache_type in KV_TYPES.items():
            figures = compare(base, model.logits(pieces, cache_type))
            row = {"activations": dtype, "cache": name, "bytes_per_token": model.token_bytes(cache_type), **figures}
            results.append(row)
            print(
                f"{dtype:13}{name:11}{row['bytes_per_token']:12}{figures['kl']:12.2e}{figures['largest']:10.3f}"
                f"{figures['rms']:10.4f}{figures['top1']:9.2%}",
                flush=True,
            )
    document = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "results": results}
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
