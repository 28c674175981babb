"""A larger mixture than the demo model, grown from it and trained further: docs/planning.md plans it, too.

    python benchmarks/grow.py OUT --text FILE … [--model FOLDER] [--steps 600] [--held-out FILE …]

Each expert is there twice, with noise, its router's row too (sparse upcycling, Komatsuzaki et al. 2023,
arXiv:2212.05055), and layers are repeated; a repeated layer starts with a tenth of what it adds. Then AdamW on the
texts, with transformers' class of the model. Prints losses and, at the end, the perplexity of each held-out file. A
step of 2,048 tokens takes two to three seconds of processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (0, 0, 1, 2, 3, 3, 4, 5)  # of the model that it is grown from
REPEATED = (1, 5)  # of its own
NOISE = 0.15  # of an expert's standard deviation
REPEATED_SCALE = 0.1  # of what a repeated layer adds to the hidden state
WINDOW, WINDOWS = 256, 8  # tokens, of a step
RATE, LEAST_RATE, WARM_STEPS = 4e-4, 0.03, 50  # LEAST_RATE: of RATE


def grow(model: Path) -> Qwen3MoeForCausalLM:
    """Twice the experts, `LAYERS` layers, float32."""
    small = Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = json.loads((model / "config.json").read_text("utf-8"))
    number = 2 * settings["num_local_experts"]
    settings |= {"num_hidden_layers": len(LAYERS), "num_local_experts": number, "num_experts": number}
    settings.pop("dtype", None)
    grown = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)).float()
    weights = small.state_dict()
    for name, weight in grown.state_dict().items():
        source = weights[name] if not name.startswith("model.layers.") else _of_layer(weights, name)
        if source.shape != weight.shape:  # of all experts
            source = torch.cat([source, source])
            source = source + NOISE * source.std() * torch.randn_like(source)
        weight.copy_(source * REPEATED_SCALE if _adds_in_repeated(name) else source)
    type(grown.model.layers[0].mlp.experts).forward = _experts  # transformers' own are slow on a CPU
    return grown


def _adds_in_repeated(name: str) -> bool:
    is_repeated = name.startswith("model.layers.") and int(name.split(".")[2]) in REPEATED
    return is_repeated and ("o_proj" in name or "down_proj" in name)


def _of_layer(weights: dict[str, Tensor], name: str) -> Tensor:
    layer = int(name.split(".")[2])
    return weights[name.replace(f"layers.{layer}.", f"layers.{LAYERS[layer]}.")]


def _experts(self: torch.nn.Module, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Experts one after the other, their tensors taken apart once: indexing them, backward would fill a gradient of all
    experts for each.
    """
    matrices = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(self.down_proj)).tolist()
    tokens = order // chosen.shape[1]
    outputs = []
    for rows, (gate_up, down) in zip(hidden[tokens].split(counts), matrices, strict=True):
        gate, up = (rows @ gate_up.T).chunk(2, -1)
        outputs.append((functional.silu(gate) * up) @ down.T)
    weighted = torch.cat(outputs) * shares.flatten()[order].unsqueeze(1)
    return torch.zeros_like(hidden).index_add(0, tokens, weighted)


def tokens_of(file: Path, tokenizer: AutoTokenizer) -> list[list[int]]:
    """Of each text of a JSON list, which ends with the token 0."""
    texts = [text if isinstance(text, str) else text["text"] for text in json.loads(file.read_text("utf-8"))]
    return [[*tokenizer(text)["input_ids"], 0] for text in texts]


def batches(documents: Sequence[list[int]]) -> Iterator[Tensor]:
    """[windows, tokens] without end: all documents in another order each time."""
    generator = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        joined = torch.tensor([token for index in order for token in documents[index]])
        joined = joined[int(torch.randint(WINDOW, (), generator=generator)) :]
        windows = joined[: len(joined) // WINDOW * WINDOW].view(-1, WINDOW)
        yield from windows[torch.randperm(len(windows), generator=generator)].split(WINDOWS)[:-1]


def train(model: Qwen3MoeForCausalLM, documents: Sequence[list[int]], steps: int) -> None:
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    model.train()
    for step, tokens in zip(range(steps), batches(documents), strict=False):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_STEPS) * (LEAST_RATE + (1 - LEAST_RATE) * cosine)
        loss = model(input_ids=tokens, labels=tokens, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.no_grad()
def perplexity(model: Qwen3MoeForCausalLM, documents: Sequence[list[int]]) -> float:
    """Of the first windows."""
    joined = torch.tensor([token for tokens in documents for token in tokens])
    windows = joined[: len(joined) // WINDOW * WINDOW].view(-1, WINDOW)[:WINDOWS]
    return math.exp(model(input_ids=windows, labels=windows).loss.item())


def save(model: Qwen3MoeForCausalLM, of: Path, out: Path) -> None:
    """In bfloat16, with the tokenizer."""
    model.to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(of / name, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    model = grow(options.model)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} million weights")
    train(model, [tokens for file in options.text for tokens in tokens_of(file, tokenizer)], options.steps)
    for file in options.held_out:
        print(f"{file.name}: perplexity {perplexity(model, tokens_of(file, tokenizer)):.1f}")
    save(model, options.model, options.out)


if __name__ == "__main__":
    main()
