"""Every pair of published layouts among the experts of one layer: equal to the model of dequantized weights.

A layer has 16 experts in 16 layouts, and every token goes to all of them; the layers are chosen so that each two
layouts meet in one of them. GGUF's blocks are 256 inputs long, so its types meet one layout of each other format in a
wider model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from amalgam.composition import loader
from amalgam.config.model import MixedPrecisionSettings
from amalgam.formats.registry import all_formats
from amalgam.models.families.qwen3_moe import FAMILY
from tests.formats.layouts import LAYOUTS
from tests.formats.test_gguf_formats import TYPES, plausible_blocks
from tests.models.gguf_writer import write_metadata
from tests.models.harness import Runner, hand_built, load_model
from tests.models.tiny import tiny_model

GGUF = [name for name in TYPES if TYPES[name].num_elements > 1]
ONE_OF_EACH_FORMAT = list({layout.format: name for name, layout in LAYOUTS.items()}.values())
NUM_EXPERTS = 16


def layers_of(names: Sequence[str]) -> list[list[str]]:
    """The layouts of each layer's experts: blocks of 8 layouts, two blocks in a layer, so that each two meet."""
    blocks = [[*names, *names][start : start + 8] for start in range(0, len(names), 8)]
    return [first + second for first, second in combinations(blocks, 2)]


def format_of(name: str) -> str:
    return f"gguf_{name.lower()}" if name in GGUF else LAYOUTS[name].format


CASES = {"layouts": (list(LAYOUTS), (32, 64)), "formats and GGUF": (GGUF + ONE_OF_EACH_FORMAT, (256, 256))}


def test_no_format_is_left_out() -> None:
    names, _ = CASES["formats and GGUF"]
    no_expert = {"gguf_latent"}  # keys and values of latent attention
    assert {format_of(name) for name in names} >= {f.name for f in all_formats() if not f.is_wide} - no_expert


@pytest.mark.parametrize("case", CASES)
def test_each_two_layouts_meet(case: str) -> None:
    names, _ = CASES[case]
    met = {frozenset(pair) for layer in layers_of(names) for pair in combinations(layer, 2)}
    assert met >= {frozenset(pair) for pair in combinations(names, 2)}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_model_of_dequantized_weights(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The blocks are random, so that each source is a model of its own.
    monkeypatch.setattr(loader, "check_agreement", lambda *_: None)
    names, (width, hidden) = CASES[case]
    layers = layers_of(names)
    sizes = {
        "num_hidden_layers": len(layers),
        "hidden_size": hidden,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "moe_intermediate_size": width,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": NUM_EXPERTS,
        "vocab_size": 32,
    }
    model = tiny_model(FAMILY, **sizes).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    kept = {n: t for n, t in load_file(tmp_path / "base/model.safetensors").items() if ".experts." not in n}
    save_file(kept, tmp_path / "base/model.safetensors", {"format": "pt"})

    torch.manual_seed(11)
    places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for layer, layouts in enumerate(layers):
        for expert, name in enumerate(layouts):
            places[name].append((layer, expert))
    sources = {
        name: write_gguf(tmp_path, config, name, found) if name in GGUF else write(tmp_path, config, name, found)
        for name, found in places.items()
    }
    mapping = {
        f"model.layers.{layer}.mlp.experts.{expert}.*": name for name in places for layer, expert in places[name]
    }
    mixed = MixedPrecisionSettings(sources=sources, weight_mapping=mapping)
    decoder, version = load_model(tmp_path / "base", mixed=mixed, max_positions=16)
    for layer, layouts in enumerate(layers):
        found = [version.origins[f"layers.{layer}.mlp.experts.{expert}.down"].stored_format for expert in range(16)]
        assert found == [format_of(name) for name in layouts]

    composed, expected = (
        Runner(decoder, v, num_sequences=1, blocks_each=2).step({0: [3, 7, 5]})[0]
        for v in (version, hand_built(version))
    )
    assert bool(torch.isfinite(expected).all())
    assert torch.equal(composed, expected)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    width, hidden = config["moe_intermediate_size"], config["hidden_size"]
    return {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}


def write(root: Path, config: dict[str, Any], name: str, places: Sequence[tuple[int, int]]) -> str:
    """A checkpoint with nothing but these experts, in one layout."""
    (root / name).mkdir()
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.{suffix}": tensor
        for layer, expert in places
        for part, shape in shapes(config).items()
        for suffix, tensor in LAYOUTS[name].make(*shape).items()
    }
    save_file(tensors, root / name / "model.safetensors", {"format": "pt"})
    declared = {"quantization_config": LAYOUTS[name].quantization} if LAYOUTS[name].quantization else {}
    (root / name / "config.json").write_text(json.dumps({**config, **declared}))
    return str(root / name)


def write_gguf(root: Path, config: dict[str, Any], name: str, places: Sequence[tuple[int, int]]) -> str:
    """A GGUF file with the stacks of these layers."""
    file = root / f"{name}.gguf"
    writer = gguf.GGUFWriter(file, "qwen3moe")
    write_metadata(writer, config, "qwen3moe", False)
    hidden = config["hidden_size"]
    for tensor, rows in (("token_embd", 32), ("output", 32), ("blk.0.ffn_gate_inp", NUM_EXPERTS)):  # their sizes count
        writer.add_tensor(f"{tensor}.weight", np.zeros((rows, hidden), np.float32))
    for layer in sorted({layer for layer, _ in places}):
        for part, (rows, columns) in shapes(config).items():
            blocks_each = columns // TYPES[name].num_elements
            blocks = plausible_blocks(name, NUM_EXPERTS * rows, blocks_each, seed=layer)
            stack = np.ascontiguousarray(blocks.reshape(NUM_EXPERTS, rows, -1))
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", stack, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)
