"""XVERSE in numpy and float64, written from its published description: no class of it is in transformers.

Llama's layers; in the mixture models every layer has experts:

    p = softmax(x Wᵣᵀ) over all experts in at least float32, the top k divided by (their sum + 1e-6)
    y = Σ p × expert(x) + shared(x), the shared experts being one MLP of num_shared_experts × intermediate_size
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

Array = NDArray[np.float64]


class Xverse:
    """The whole sequence at once, without a cache."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: weight.double().numpy() for name, weight in weights.items()}

    def logits(self, prompt: list[int]) -> Tensor:
        x = self.weights["model.embed_tokens.weight"][prompt]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self._attention(self._norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
            normed = self._norm(x, f"{name}.post_attention_layernorm")
            x = x + (self._moe if "num_experts" in self.config else self._mlp)(normed, f"{name}.mlp")
        x = self._norm(x, "model.norm")
        return torch.from_numpy(x @ self.weights["lm_head.weight"].T).float()

    def _linear(self, x: Array, name: str) -> Array:
        product: Array = x @ self.weights[f"{name}.weight"].T
        return product

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        normed: Array = x / scale * self.weights[f"{name}.weight"]
        return normed

    def _attention(self, x: Array, name: str) -> Array:
        tokens, heads = len(x), self.config["num_attention_heads"]
        q, k, v = (self._linear(x, f"{name}.{part}_proj").reshape(tokens, heads, -1) for part in "qkv")
        dim = q.shape[-1]
        angle = np.arange(tokens)[:, None] / self.config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
        turn = np.exp(1j * angle)[:, None]

        def rotate(heads: Array) -> Array:
            turned = (heads[..., : dim // 2] + 1j * heads[..., dim // 2 :]) * turn
            return np.concatenate((turned.real, turned.imag), -1)

        scores = np.einsum("ihd,jhd->hij", rotate(q), rotate(k)) / np.sqrt(dim)
        scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
        return self._linear(np.einsum("hij,jhd->ihd", _softmax(scores), v).reshape(tokens, -1), f"{name}.o_proj")

    def _mlp(self, x: Array, name: str) -> Array:
        gate = self._linear(x, f"{name}.gate_proj")
        return self._linear(gate / (1 + np.exp(-gate)) * self._linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def _moe(self, x: Array, name: str) -> Array:
        probabilities = _softmax(self._linear(x, f"{name}.router"))
        y = self._mlp(x, f"{name}.shared_experts")
        for token, row in enumerate(probabilities):
            chosen = np.argsort(-row)[: self.config["moe_top_k"]]
            total = row[chosen].sum() + 1e-6
            for expert in chosen:
                y[token] += row[expert] / total * self._mlp(x[token], f"{name}.experts.{expert}")
        return y


def _softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    result: Array = exponentials / exponentials.sum(-1, keepdims=True)
    return result


def save(folder: Path, settings: dict[str, Any], dtype: torch.dtype) -> Xverse:
    """A random checkpoint, and the reference for it. `num_experts` None: the dense architecture."""
    config = {key: value for key, value in settings.items() if value is not None}
    config |= {"architectures": ["XverseForCausalLM"], "model_type": "xverse"}
    generator = torch.Generator().manual_seed(7)
    hidden, vocab, size = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    weights = {"model.norm.weight": torch.rand(hidden, generator=generator) + 0.5}

    def linear(name: str, out: int, into: int) -> None:
        weights[f"{name}.weight"] = torch.randn((out, into), generator=generator) * 0.08

    def mlp(name: str, width: int) -> None:
        linear(f"{name}.gate_proj", width, hidden)
        linear(f"{name}.up_proj", width, hidden)
        linear(f"{name}.down_proj", hidden, width)

    linear("model.embed_tokens", vocab, hidden)
    linear("lm_head", vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}.{norm}.weight"] = torch.rand(hidden, generator=generator) + 0.5
        for part in "qkvo":
            linear(f"{name}.self_attn.{part}_proj", hidden, hidden)
        if "num_experts" not in config:
            mlp(f"{name}.mlp", size)
            continue
        linear(f"{name}.mlp.router", config["num_experts"], hidden)
        mlp(f"{name}.mlp.shared_experts", size * config["num_shared_experts"])
        for expert in range(config["num_experts"]):
            mlp(f"{name}.mlp.experts.{expert}", size)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return Xverse(config, weights)
