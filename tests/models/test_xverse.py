"""XVERSE-MoE against a class that transformers has, and its router's last digit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from amalgam.kernels.backends.reference.execution import execute
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.layouts import dense
from amalgam.kernels.program import Rows
from amalgam.kernels.step import LayerCache, StepContext
from amalgam.models.blocks.mixture import SoftmaxRouter
from amalgam.models.families.qwen2_moe import FAMILY as QWEN2_MOE
from amalgam.models.families.xverse import FAMILY as XVERSE
from amalgam.models.kv_cache import KVCache
from amalgam.models.weights import BlockWeights
from tests.models.harness import Runner, load_model
from tests.models.tiny import BASE_CONFIG, HuggingFace, tiny_model, write_checkpoint

PROMPT = list(range(3, 50))


def test_equals_qwen2_moe_with_a_half_open_shared_gate(tmp_path: Path) -> None:
    """sigmoid(0) = ½: with a shared gate of zeros and the shared down projection doubled, Qwen2-MoE is XVERSE-MoE."""
    size, num_shared = XVERSE.tiny_config["intermediate_size"], XVERSE.tiny_config["num_shared_experts"]
    model = tiny_model(
        QWEN2_MOE,
        num_key_value_heads=4,
        qkv_bias=False,
        norm_topk_prob=True,
        moe_intermediate_size=size,
        shared_expert_intermediate_size=size * num_shared,
        rope_parameters={"rope_type": "default", "rope_theta": XVERSE.tiny_config["rope_theta"]},
    )
    model.save_pretrained(tmp_path / "qwen2_moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.shared_expert_gate.weight.zero_()
            layer.mlp.shared_expert.down_proj.weight.mul_(2)

    renames = {".mlp.gate.": ".mlp.router.", ".shared_expert.": ".shared_experts."}
    tensors = {}
    for name, tensor in load_file(tmp_path / "qwen2_moe" / "model.safetensors").items():
        for old, new in renames.items():
            name = name.replace(old, new)
        if "shared_expert_gate" not in name:
            tensors[name] = tensor
    config = {**BASE_CONFIG, **XVERSE.tiny_config, "architectures": list(XVERSE.architectures)}
    write_checkpoint(tmp_path / "xverse", json.loads(json.dumps(config)), tensors)

    logits = Runner(*load_model(tmp_path / "xverse")).step({0: PROMPT})[0]
    torch.testing.assert_close(logits, HuggingFace(model).logits(PROMPT), atol=1e-4, rtol=0)


def test_router_adds_a_millionth_to_the_sum() -> None:
    """Too little for the logits' tolerance to notice."""
    x, weight = torch.randn(50, 64), torch.randn(8, 64)
    router = SoftmaxRouter(8, 2, normalises=True, sum_eps=1e-6)
    frame, rows = Frame(StepContext([], KVCache([LayerCache(x, x)], 1)), torch.float32, []), Rows("x", 64, 0, 64)
    frame.put(rows, x)
    execute(router.route(rows, BlockWeights({"router": dense(weight)}), 0), frame)
    assert frame.routing is not None
    expert_ids, gate_weights = frame.routing
    probabilities = torch.softmax(x.double() @ weight.double().T, dim=-1)
    chosen = probabilities.gather(1, expert_ids)
    expected = chosen / (chosen.sum(-1, keepdim=True) + 1e-6)
    assert float((gate_weights.sum(-1) - expected.sum(-1)).abs().max()) < 3e-7
    assert float((1 - expected.sum(-1)).min()) > 9e-7
