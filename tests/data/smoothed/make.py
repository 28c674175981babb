"""Makes the checkpoints of this folder with llm-compressor; see README.md.

python make.py
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).parent
PROMPT = [5, 9, 20, 31, 7, 14]
SPARED = ["lm_head", "re:.*mlp.gate$"]
INT4 = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
ATTENTION = [["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"], "re:.*input_layernorm$"]
EXPERTS = [["re:.*mlp.gate$", "re:.*gate_proj$", "re:.*up_proj$"], "re:.*post_attention_layernorm$"]
PAIRS = [AWQMapping("re:.*v_proj$", ["re:.*o_proj$"]), AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])]


def w4a16() -> QuantizationModifier:
    return QuantizationModifier(ignore=SPARED, config_groups={"group_0": {"targets": ["Linear"], "weights": INT4}})


def w8a8() -> QuantizationModifier:
    return QuantizationModifier(targets="Linear", scheme="W8A8", ignore=SPARED)


# The tool's own mappings of this class: AWQ moves scales over both norms and both pairs, SmoothQuant over the norm
# before attention only.
RECIPES: dict[str, Callable[[], list[Any]]] = {
    "awq": lambda: [AWQModifier(), w4a16()],
    "awq-pairs": lambda: [AWQModifier(mappings=PAIRS), w4a16()],
    "smoothquant": lambda: [SmoothQuantModifier(smoothing_strength=0.8), w8a8()],
    "smoothquant-experts": lambda: [SmoothQuantModifier(smoothing_strength=0.8, mappings=[ATTENTION, EXPERTS]), w8a8()],
}


def make_base() -> None:
    """A random Qwen3-MoE whose norms let a few channels through many times larger, as those of real models do."""
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        intermediate_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
                parameter[::7] *= 8 if "layernorm" in name else 1
            else:
                parameter.normal_(0, 0.2)
    model.bfloat16().save_pretrained(HERE / "base")


def make(name: str, recipe: list[Any]) -> None:
    torch.manual_seed(1)
    samples = [{"input_ids": torch.randint(3, 32, (32,)), "attention_mask": torch.ones(32).long()} for _ in range(8)]
    model = AutoModelForCausalLM.from_pretrained(HERE / "base", dtype=torch.bfloat16)
    oneshot(model=model, recipe=recipe, dataset=DataLoader(samples), num_calibration_samples=8, max_seq_length=32)
    model.save_pretrained(HERE / name)


def expanded(folder: Path) -> dict[str, Tensor]:
    """The weights as compressed-tensors expands them; their scales in float32, so that nothing is rounded."""
    tensors = load_file(folder / "model.safetensors")
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if quantization is None:
        return tensors
    group = quantization["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        modules[module][suffix] = tensor.float() if suffix == "weight_scale" else tensor
    return {
        f"{module}.weight": compressor.decompress(parts, scheme)["weight"] if len(parts) > 1 else parts["weight"]
        for module, parts in modules.items()
    }


def logits(folder: Path) -> Tensor:
    """What the Hugging Face class makes of the expanded weights, in float32."""
    with tempfile.TemporaryDirectory() as wide:
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
        Path(wide, "config.json").write_text(json.dumps(config))
        save_file(
            {n: t.contiguous() for n, t in expanded(folder).items()}, f"{wide}/model.safetensors", {"format": "pt"}
        )
        model, report = Qwen3MoeForCausalLM.from_pretrained(
            wide, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), report
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0].clone()


def main() -> None:
    torch.Tensor.pin_memory = lambda tensor, *args: tensor  # AWQModifier pins what it keeps, which takes a GPU
    make_base()
    for name, recipe in RECIPES.items():
        make(name, recipe())
    folders = [HERE / name for name in ("base", *RECIPES)]
    expected = {folder.name: logits(folder) for folder in folders}
    save_file({**expected, "prompt": torch.tensor(PROMPT)}, HERE / "expected.safetensors")
    for folder in folders:
        for unread in ("generation_config.json", "recipe.yaml"):
            (folder / unread).unlink(missing_ok=True)
        difference = (expected[folder.name] - expected["base"]).norm() / expected["base"].norm()
        print(f"{folder.name}: {float(difference):.4f} from the base")


if __name__ == "__main__":
    main()
