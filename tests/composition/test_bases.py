"""One model in two bases: whatever part is taken from the other, the answer is right or the plan is refused, and what
a refusal advises is right too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amalgam.checkpoint.store import TensorStore
from amalgam.composition.gauges import axes_of
from amalgam.composition.rules import Choices
from amalgam.config.placement import Rule
from amalgam.errors import PlanError
from amalgam.models.families import deepseek_v2, llama, phimoe, qwen2, qwen3_moe
from amalgam.models.registry import all_families, read_spec
from amalgam.models.spec import Family
from tests.composition.test_agreement import changed, logits
from tests.errors import raises
from tests.models.tiny import save_tiny

Tensors = dict[str, Tensor]
Movement = tuple[Callable[[Tensors], None], list[list[str]], list[list[str]]]
EXPERTS, HEADS, KV_HEADS, LAYERS, NOPE = 8, 4, 2, 2, 16
CLOSE = {"atol": 2e-4, "rtol": 1e-3}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator(), dtype=torch.float64))[0].float()


def rotate_stream(tensors: Tensors) -> None:
    """QuaRot and SpinQuant's R1: norms go into what reads them, and the residual stream is rotated."""
    turn = rotation(tensors["model.norm.weight"].shape[0])
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, tensor in tensors.items():
            if not name.startswith(prefix) or tensor.dim() < 2:
                continue
            block = "input_layernorm" if "self_attn" in name else "post_attention_layernorm"
            if "o_proj" in name or "down_proj" in name:
                tensors[name] = turn.T @ tensor
            else:
                tensors[name] = (tensor * tensors[f"{prefix}{block}.weight"]) @ turn
        for block in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{block}.weight"] = torch.ones_like(tensors[f"{prefix}{block}.weight"])
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] @ turn
    tensors["lm_head.weight"] = (tensors["lm_head.weight"] * tensors["model.norm.weight"]) @ turn
    tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"])


def fold_norms(tensors: Tensors) -> None:
    """Norms become ones, and what reads them takes their gains."""
    readers = {
        "input_layernorm": r"self_attn\.[qkv]_proj\.weight",
        "post_attention_layernorm": r"mlp\.(gate|(experts\.\d+\.)?(gate|up)_proj)\.weight",
    }
    for layer in range(LAYERS):
        for norm, pattern in readers.items():
            gain = tensors[f"model.layers.{layer}.{norm}.weight"]
            for name in tensors:
                if re.fullmatch(rf"model\.layers\.{layer}\.{pattern}", name):
                    tensors[name] = tensors[name] * gain
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones_like(gain)


def permute_experts(tensors: Tensors) -> None:
    order = torch.randperm(EXPERTS, generator=generator()).tolist()
    old = dict(tensors)
    for name in old:
        if found := re.match(r"(.*\.mlp\.experts\.)(\d+)(\..*)", name):
            tensors[name] = old[f"{found[1]}{order[int(found[2])]}{found[3]}"]
        elif name.endswith("mlp.gate.weight"):
            tensors[name] = old[name][order]


def permute_channels(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.endswith("gate_proj.weight"):
            order = torch.randperm(len(tensors[name]), generator=generator())
            stem = name.removesuffix("gate_proj.weight")
            for part in ("gate_proj", "up_proj"):
                tensors[f"{stem}{part}.weight"] = tensors[f"{stem}{part}.weight"][order]
            tensors[f"{stem}down_proj.weight"] = tensors[f"{stem}down_proj.weight"][:, order]


def scale_channels(tensors: Tensors) -> None:
    """AWQ over up and down."""
    for name in list(tensors):
        if name.endswith("up_proj.weight"):
            factors = torch.exp(0.3 * torch.randn(len(tensors[name]), generator=generator()))
            tensors[name] = tensors[name] / factors[:, None]
            down = name.replace("up_proj", "down_proj")
            tensors[down] = tensors[down] * factors


def by_head(tensor: Tensor, heads: int) -> Tensor:
    return tensor.view(heads, -1, *tensor.shape[1:])


def rotate_values(tensors: Tensors) -> None:
    """SpinQuant's R2: each head's values by a rotation of their own."""
    for layer in range(LAYERS):
        value, out = (f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "vo")
        size = len(tensors[value]) // KV_HEADS
        turns = [rotation(size) @ torch.diag(torch.tensor([1.0] * (size - 1) + [sign])) for sign in (1.0, -1.0)]
        tensors[value] = torch.cat([turns[i].T @ part for i, part in enumerate(by_head(tensors[value], KV_HEADS))])
        columns = tensors[out].view(len(tensors[out]), HEADS, size)
        shared = HEADS // KV_HEADS
        tensors[out] = torch.stack([columns[:, h] @ turns[h // shared] for h in range(HEADS)], dim=1).flatten(1)


def permute_heads(tensors: Tensors) -> None:
    """The KV heads in another order, with the query heads that share them."""
    for layer in range(LAYERS):
        for part, groups in (("q", KV_HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            tensors[name] = by_head(tensors[name], groups).flip(0).flatten(0, 1)
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        tensors[name] = tensors[name].view(len(tensors[name]), KV_HEADS, -1).flip(1).flatten(1)


def scale_queries(tensors: Tensors) -> None:
    """Factors between queries and keys, the same for both of a rotary pair."""
    for layer in range(LAYERS):
        query, key = (f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qk")
        size = len(tensors[key]) // KV_HEADS
        factors = torch.exp(0.4 * torch.randn(size // 2, generator=generator())).repeat(2)
        tensors[query] = (by_head(tensors[query], HEADS) * factors[:, None]).flatten(0, 1)
        tensors[key] = (by_head(tensors[key], KV_HEADS) / factors[:, None]).flatten(0, 1)


def permute_queries(tensors: Tensors) -> None:
    """Query heads among those that share a key and value: neither of these tells."""
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        for name in [f"{prefix}q_proj.weight", f"{prefix}q_proj.bias"]:
            if name in tensors:
                tensors[name] = tensors[name].unflatten(0, (KV_HEADS, HEADS // KV_HEADS, -1)).flip(1).flatten(0, 2)
        out = tensors[f"{prefix}o_proj.weight"]
        columns = out.unflatten(1, (KV_HEADS, HEADS // KV_HEADS, -1)).flip(2)
        tensors[f"{prefix}o_proj.weight"] = columns.flatten(1)


def fold_one_norm(tensors: Tensors) -> None:
    """SmoothQuant over the last layer's MLP; a bias of zeros beside the norm stays what it is."""
    prefix = f"model.layers.{LAYERS - 1}."
    scale = torch.exp(0.5 * torch.randn(len(tensors["model.norm.weight"]), generator=generator()))
    norm = f"{prefix}post_attention_layernorm"
    for name in (f"{norm}.weight", f"{norm}.bias"):
        if name in tensors:
            tensors[name] = tensors[name] / scale
    for name in tensors:
        if name.startswith(prefix) and re.search(r"(\.gate|gate_proj|up_proj|\.w1|\.w3)\.weight$", name):
            tensors[name] = tensors[name] * scale


def latent_parts(tensors: Tensors, layer: int) -> tuple[str, str, str, str, str]:
    prefix = f"model.layers.{layer}.self_attn."
    query = f"{prefix}q_b_proj.weight" if f"{prefix}q_b_proj.weight" in tensors else f"{prefix}q_proj.weight"
    names = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    down, norm, expand, out = (f"{prefix}{name}.weight" for name in names)
    return query, down, norm, expand, out


def rotate_latent(tensors: Tensors) -> None:
    for layer in range(LAYERS):
        _, down, norm, expand, _ = latent_parts(tensors, layer)
        size = len(tensors[norm])
        turn = rotation(size)
        tensors[expand] = (tensors[expand] * tensors[norm]) @ turn
        tensors[norm] = torch.ones(size)
        tensors[down] = torch.cat([turn.T @ tensors[down][:size], tensors[down][size:]])


def rotate_latent_keys(tensors: Tensors) -> None:
    """The part of queries and keys that has no positions."""
    for layer in range(LAYERS):
        query, _, _, expand, _ = latent_parts(tensors, layer)
        turn = rotation(NOPE)
        for name in (query, expand):
            heads = tensors[name].unflatten(0, (HEADS, -1)).clone()
            heads[:, :NOPE] = turn @ heads[:, :NOPE]
            tensors[name] = heads.flatten(0, 1)


def rotate_latent_values(tensors: Tensors) -> None:
    for layer in range(LAYERS):
        _, _, _, expand, out = latent_parts(tensors, layer)
        heads = tensors[expand].unflatten(0, (HEADS, -1)).clone()
        turn = rotation(heads.shape[1] - NOPE)
        heads[:, NOPE:] = turn.T @ heads[:, NOPE:]
        tensors[expand] = heads.flatten(0, 1)
        tensors[out] = (tensors[out].unflatten(1, (HEADS, -1)) @ turn).flatten(1)


LAYER, ATTENTION, MLP = "model.layers.*", "model.layers.*.self_attn", "model.layers.*.mlp"
NORM, INPUT_NORM = f"{LAYER}.post_attention_layernorm.weight", f"{LAYER}.input_layernorm.weight"
# Movement, and then parts that can be taken and parts that cannot.
MOE: list[Movement] = [
    (rotate_stream, [], [[LAYER], [f"{MLP}.experts.*"], [f"{MLP}.*", NORM], ["model.embed_tokens.weight"], [NORM]]),
    (fold_norms, [[f"{MLP}.*", NORM], [f"{ATTENTION}.*", INPUT_NORM], [LAYER]], [[f"{MLP}.experts.*"], [NORM]]),
    (permute_experts, [[f"{MLP}.*"], [f"{ATTENTION}.*"]], [[f"{MLP}.experts.*"], [f"{MLP}.gate.weight"]]),
    (permute_channels, [[f"{MLP}.experts.*"]], [[f"{MLP}.experts.*.down_proj.weight"]]),
    (scale_channels, [[f"{MLP}.experts.*"], [f"{MLP}.experts.3.*"]], [[f"{MLP}.experts.*.up_proj.weight"]]),
    (rotate_values, [[f"{ATTENTION}.*"]], [[f"{ATTENTION}.o_proj.weight"], [f"{ATTENTION}.v_proj.weight"]]),
]
DENSE: list[Movement] = [
    (permute_heads, [[f"{ATTENTION}.*"]], [[f"{ATTENTION}.{{q,k}}_proj.weight"], [f"{ATTENTION}.o_proj.weight"]]),
    (scale_queries, [[f"{ATTENTION}.{{q,k}}_proj.weight"]], [[f"{ATTENTION}.q_proj.weight"]]),
    (permute_channels, [[f"{MLP}.*"]], [[f"{MLP}.up_proj.weight"]]),
    (rotate_stream, [], [["model.layers.1.*"], ["lm_head.weight", "model.norm.weight"]]),
]


BIASED: list[Movement] = [
    (permute_queries, [[f"{ATTENTION}.*"]], [[f"{ATTENTION}.{{q,o}}_proj.weight"], [f"{ATTENTION}.{{v,o}}_proj.*"]]),
    (fold_one_norm, [[f"{MLP}.*", NORM]], [[NORM], [f"{MLP}.up_proj.weight"]]),
]
WITH_NORM_BIAS: list[Movement] = [
    (fold_one_norm, [["*.block_sparse_moe.*", "*.post_attention_layernorm.*"]], [["*.block_sparse_moe.*"]]),
]
LATENT: list[Movement] = [
    (rotate_latent, [[f"{ATTENTION}.kv_*"], [f"{ATTENTION}.*"]], [[f"{ATTENTION}.kv_b_proj.weight"], ["*.kv_a_*"]]),
    (
        rotate_latent_keys,
        [[f"{ATTENTION}.*"], [f"{ATTENTION}.{{q,kv}}*"]],
        [[f"{ATTENTION}.kv_*"], [f"{ATTENTION}.{{kv_b,o}}_proj.weight"], [f"{ATTENTION}.q_proj.weight"]],
    ),
    (rotate_latent_values, [[f"{ATTENTION}.*"]], [[f"{ATTENTION}.o_proj.weight"], [f"{ATTENTION}.kv_*"]]),
]
MODELS: dict[str, tuple[Family, list[Movement]]] = {
    "qwen3_moe": (qwen3_moe.FAMILY, MOE),
    "llama": (llama.FAMILY, DENSE),
    "qwen2": (qwen2.FAMILY, BIASED),
    "phimoe": (phimoe.FAMILY, WITH_NORM_BIAS),
    "deepseek_v2": (deepseek_v2.FAMILY, LATENT),
}
CASES = [(name, index) for name, (_, movements) in MODELS.items() for index in range(len(movements))]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, (family, _) in MODELS.items():
        save_tiny(family, folders[name], num_attention_heads=HEADS)
    return folders


@pytest.mark.parametrize(("model", "index"), CASES)
def test_whatever_part_is_taken(bases: dict[str, Path], tmp_path: Path, model: str, index: int) -> None:
    base = bases[model]
    move, together, apart = MODELS[model][1][index]
    other = changed(base, tmp_path / "other", move)
    expected = logits(base)
    torch.testing.assert_close(logits(other), expected, **CLOSE)  # the same function, elsewhere
    for part in together:
        torch.testing.assert_close(logits(base, other, dict.fromkeys(part, "other")), expected, **CLOSE)
    for part in apart:
        with raises(PlanError, "'other'", "'base'") as refusal:
            logits(base, other, dict.fromkeys(part, "other"))
        advised = re.search(r"Take (.+) from one source", str(refusal.value))
        assert (advised is None) == (move is rotate_stream), str(refusal.value)
        if advised is None:
            continue
        for source in ("other", "base"):
            mapping = following(base, part, advised[1], source)
            torch.testing.assert_close(logits(base, other, mapping), expected, **CLOSE)


def following(base: Path, part: Sequence[str], advice: str, source: str) -> dict[str, str]:
    """A plan that takes a part from the other checkpoint, but what the advice names from one source."""
    store = TensorStore.open(base)
    patterns = re.split(r", (?![^{]*\})", advice)
    taken = Choices(store, [Rule(pattern=pattern, source="other") for pattern in part], "base")
    advised = Choices(store, [Rule(pattern=pattern, source=source) for pattern in patterns], "")
    return {name: advised[name].source or taken[name].source for name in store}


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_every_weight_has_its_place(family: Family, tmp_path: Path) -> None:
    """A slot that no gauge knows would not be compared at all."""
    save_tiny(family, tmp_path)
    _, spec = read_spec(json.loads((tmp_path / "config.json").read_text()), "config.json")
    assert [slot.name for slot in spec.slots if not axes_of(slot.name).all and slot.name != "head_bias"] == []
