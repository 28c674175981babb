"""Every pair of published layouts among the experts of one layer: equal to the model of dequantized weights.

A layer has 16 experts in 16 layouts, and every token goes to all of them; the layers are chosen so that each two
layouts meet in one of them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from amalgam.config import MixedPrecisionSettings
from amalgam.models.families.qwen3_moe import FAMILY
from tests.models.harness import Runner, hand_built, load_model
from tests.models.tiny import tiny_model
from tests.precision.layouts import LAYOUTS

# Blocks of 8 layouts; a layer holds two blocks, so that each two layouts meet.
_NAMES = list(LAYOUTS)
_BLOCKS = [(_NAMES + _NAMES)[start : start + 8] for start in range(0, len(_NAMES), 8)]
LAYERS = [first + second for first, second in combinations(_BLOCKS, 2)]
SIZES = {
    "num_hidden_layers": len(LAYERS),
    "hidden_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 16,
    "num_experts_per_tok": 16,
    "vocab_size": 32,
}


def test_each_two_layouts_meet() -> None:
    met = {frozenset(pair) for layer in LAYERS for pair in combinations(layer, 2)}
    assert met >= {frozenset(pair) for pair in combinations(LAYOUTS, 2)}


def test_equals_the_model_of_dequantized_weights(tmp_path: Path) -> None:
    model = tiny_model(FAMILY, **SIZES).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    kept = {n: t for n, t in load_file(tmp_path / "base/model.safetensors").items() if ".experts." not in n}
    save_file(kept, tmp_path / "base/model.safetensors", {"format": "pt"})

    torch.manual_seed(11)
    tensors: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    mapping = {}
    for layer, names in enumerate(LAYERS):
        for expert, name in enumerate(names):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            mapping[f"{prefix}.*"] = name
            for part, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
                for suffix, tensor in LAYOUTS[name].make(*shape).items():
                    tensors[name][f"{prefix}.{part}_proj.{suffix}"] = tensor
    for name, stored in tensors.items():
        (tmp_path / name).mkdir()
        save_file(stored, tmp_path / name / "model.safetensors", {"format": "pt"})
        declared = {"quantization_config": LAYOUTS[name].quantization} if LAYOUTS[name].quantization else {}
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **declared}))

    mixed = MixedPrecisionSettings(sources={name: str(tmp_path / name) for name in tensors}, weight_mapping=mapping)
    decoder, version = load_model(tmp_path / "base", mixed=mixed, max_positions=16)
    for layer, names in enumerate(LAYERS):
        found = [version.origins[f"layers.{layer}.mlp.experts.{expert}.down"].format for expert in range(16)]
        assert found == [LAYOUTS[name].format for name in names]

    composed, expected = (
        Runner(decoder, v, num_sequences=1, blocks_each=2).step({0: [3, 7, 5]})[0]
        for v in (version, hand_built(version))
    )
    assert bool(torch.isfinite(expected).all())
    assert torch.equal(composed, expected)
