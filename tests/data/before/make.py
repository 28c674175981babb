"""Makes the files of this folder with the commit that README.md names.

git checkout COMMIT && python tests/data/before/make.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch
import yaml

from amalgam import LLM, SamplingParams
from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.settings import Settings
from amalgam.formats.contract import QuantizeOptions
from amalgam.models.families.qwen3_moe import FAMILY
from amalgam.tools.quantize import quantize_checkpoint

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from tests.models.tiny import save_tiny  # noqa: E402

SIZES = {"num_hidden_layers": 1, "vocab_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
QUANTIZED = {
    "fp8": QuantizeOptions(scale="block"),
    "int8": QuantizeOptions(),
    "int4": QuantizeOptions(group_size=16),
}
MAPPING = {
    "model.layers.*.mlp.experts.0.*": "fp8",
    "model.layers.*.mlp.experts.1.*": "int8",
    "model.layers.*.mlp.experts.2.*": "int4",
}


def make_statistics(folder: Path) -> None:
    """The demo model's traffic: a set that was saved, and one that a server goes on from, with its history."""
    settings = {
        "inference.max_seq_length": 64,
        "statistics.file": str(folder / "continued.npz"),
        "statistics.bucket_seconds": 0.2,
        "statistics.pair_sampling": 1,
    }
    greedy = SamplingParams(max_new_tokens=8, do_sample=False)
    with LLM(model=ROOT / "models/demo", settings=settings) as llm:
        for label, text in (("prose", "The old man"), ("code", "def main("), (None, "It was")):
            llm.generate(text, greedy, domain=label)
            time.sleep(0.3)
        llm.save_expert_stats(folder / "saved.npz")
        summary = llm.expert_stats()["summary"]
    kept = ("total_activations", "prompt_tokens", "generated_tokens", "total_requests")
    (folder / "statistics.json").write_text(json.dumps({name: summary[name] for name in kept}, indent=1) + "\n")


def make_packed_cache(folder: Path, root: Path = Path("/srv/amalgam-before")) -> None:
    """A tiny checkpoint in four formats, and the packed cache of a model that is made of them."""
    save_tiny(FAMILY, root / "base", dtype=torch.bfloat16, **SIZES)
    for name, options in QUANTIZED.items():
        quantize_checkpoint(str(root / "base"), root / name, name, options)
    mixed = MixedPrecisionSettings(sources={name: str(root / name) for name in QUANTIZED}, weight_mapping=MAPPING)
    model = ModelSettings(base_path=str(root / "base"), mixed_precision=mixed)
    inference = InferenceSettings(packed_cache=str(root / "cache"))
    loader = ModelLoader(model, inference, torch.device("cpu"), 1)
    loader.build(loader.make_plan(), 1)
    shutil.move(root, folder / "model")


def make_configuration(folder: Path) -> None:
    """The demo's configuration, and one that names every setting with its default."""
    shutil.copy(ROOT / "config/model_config.yaml", folder / "demo.yaml")
    settings = Settings(model=ModelSettings(base_path="/models/base")).model_dump(mode="json")
    (folder / "every_setting.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


if __name__ == "__main__":
    made = Path(sys.argv[1])
    made.mkdir(parents=True, exist_ok=True)
    make_statistics(made)
    make_packed_cache(made)
    make_configuration(made)
