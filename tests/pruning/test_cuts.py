"""Cut models: their checkpoints by transformers' own classes, what they compute, what cannot be cut."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amalgam.composition.quantizing.shards import Shards
from amalgam.composition.wide import WideModel
from amalgam.errors import CheckpointError, ConfigError, ConflictError, UnsupportedError
from amalgam.models.registry import all_families
from amalgam.pruning.amounts import parse_amount, parse_sparsity
from amalgam.pruning.channels import kept_channels, widths_of
from amalgam.pruning.cut import Cut
from amalgam.pruning.experts import ExpertChoice, groups_of, kept_experts, scores_of
from amalgam.pruning.layers import by_divergence, by_influence
from amalgam.pruning.merging import merged
from amalgam.pruning.pruned import Pruned
from amalgam.pruning.sparsity import check_pattern, with_zeros
from amalgam.pruning.survey import LayerExperts, survey
from amalgam.pruning.writing import CutMaker, Maker, SparseMaker, write_pruned
from tests.errors import raises
from tests.models.harness import Runner, load_model
from tests.models.tiny import GEMMA4_MOE, save_tiny

FAMILIES = {family.name: family for family in all_families()}
TOKENS = [[(7 * step + 3 * number) % 250 + 3 for step in range(24)] for number in range(4)]


def opened(folder: Path, family: str, **changes: Any) -> WideModel:
    save_tiny(FAMILIES[family], folder, **changes)
    return WideModel.open(str(folder))


def pruned(model: WideModel, cut: Cut, widths: dict[int, int] | None = None) -> CutMaker:
    source = model.source
    return CutMaker(model, Pruned.of(source.config, source.config_place, model.spec, cut, widths))


def experts_cut(model: WideModel, amount: str, criterion: Any = "random", **changes: Any) -> Cut:
    choice = ExpertChoice(criterion, parse_amount("--experts", amount), **changes)
    layers = survey(model, TOKENS).experts
    groups = groups_of(kept_experts(choice, model.spec, scores_of(choice, layers)), layers, merges=choice.merges)
    weights = {layer_id: tuple(layers[layer_id].counts.tolist()) for layer_id in groups}
    return Cut(tuple(range(model.spec.num_layers)), groups, weights if choice.merges else {})


def logits(folder: Path) -> torch.Tensor:
    return Runner(*load_model(folder)).step({0: TOKENS[0]})[0]


def reference_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([TOKENS[0]])).logits[0, -1].float()


def check(maker: Maker, out: Path) -> None:
    """What is written is what transformers' class computes with."""
    write_pruned(maker.model, maker, out, {})
    torch.testing.assert_close(logits(out)[-1], reference_logits(out), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {}),
        ("gpt_oss", {}),
        ("deepseek_v3", {"n_routed_experts": 16}),
        ("granitemoe", {}),
        ("gemma4", GEMMA4_MOE),
        ("ernie4_5_moe", {}),  # its correction has the experts in columns
    ],
)
def test_experts(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = opened(tmp_path / "whole", family, **changes)
    cut = experts_cut(model, "25%")
    maker = pruned(model, cut)
    assert set(maker.pruned.spec.expert_counts) == {model.spec.num_experts * 3 // 4}
    if family == "deepseek_v3":  # its groups stay of equal size
        assert all(
            [first // 4 for first, *_ in groups] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
            for groups in cut.experts.values()
        )
        with raises(ConfigError):
            experts_cut(model, "2")
        with raises(ConfigError):
            experts_cut(model, "12")
    check(maker, tmp_path / "out")


def test_a_cut_of_nothing_is_refused(tmp_path: Path) -> None:
    model = opened(tmp_path / "whole", "qwen3_moe")
    with raises(ConfigError, "5%"):
        experts_cut(model, "5%")


@pytest.mark.parametrize("family", ["ernie4_5_moe", "deepseek_v3"])
def test_any_layer_goes_where_the_first_ones_are_of_another_kind(family: str, tmp_path: Path) -> None:
    model = opened(tmp_path / "whole", family, num_hidden_layers=3)
    for gone in range(3):
        kept = tuple(layer_id for layer_id in range(3) if layer_id != gone)
        spec = pruned(model, Cut(kept)).pruned.spec
        assert spec.expert_counts == tuple(n for n in (model.spec.layers[i].mlp.num_experts for i in kept) if n)


def test_experts_that_nobody_needs_are_not_missed(tmp_path: Path) -> None:
    model = opened(tmp_path / "whole", "gpt_oss", num_local_experts=8)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("router.bias"):
            tensor[[1, 4]] = -1e4
    save_file(tensors, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    model = WideModel.open(str(tmp_path / "whole"))
    for criterion in ("use", "gate-mass", "reap"):
        cut = experts_cut(model, "2", criterion)
        for layer_id, layer in survey(model, TOKENS).experts.items():
            kept = [first for first, *_ in cut.experts[layer_id]]
            assert len(kept) == 6 and not any(layer.counts[n] for n in range(8) if n not in kept)
    write_pruned(model, pruned(model, cut), tmp_path / "out", {})
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "whole"))


def test_layers_may_keep_different_numbers_which_config_json_says(tmp_path: Path) -> None:
    model = opened(tmp_path / "whole", "qwen3_moe", num_hidden_layers=3)
    layers = survey(model, TOKENS).experts
    for number, layer in enumerate(layers.values()):
        layer.counts = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], dtype=torch.float64) ** (number + 1)
    choice = ExpertChoice("use", parse_amount("--experts", "25%"), per_layer=True)
    kept = kept_experts(choice, model.spec, scores_of(choice, layers))
    counts = [len(each) for each in kept.values()]
    assert sum(counts) == 18 and counts == sorted(counts, reverse=True) and counts[0] > counts[2]
    maker = pruned(model, Cut((0, 1, 2), groups_of(kept, layers, merges=False)))
    write_pruned(model, maker, tmp_path / "out", {})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    own = {int(layer_id): values["num_local_experts"] for layer_id, values in config["per_layer_config"].items()}
    assert [own.get(layer_id, config["num_local_experts"]) for layer_id in range(3)] == counts
    again = WideModel.open(str(tmp_path / "out"))
    assert again.spec.expert_counts == tuple(counts)
    logits(tmp_path / "out")
    # Cut again, by as many: the config says one number, and nothing of its layers.
    least = min(counts)
    groups = {layer_id: tuple((n,) for n in range(least)) for layer_id in range(3)}
    assert "per_layer_config" not in pruned(again, Cut((0, 1, 2), groups)).pruned.config


def test_layers(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 1}
    model = opened(tmp_path / "whole", "qwen3_moe", **changes)
    maker = pruned(model, Cut((0, 1, 3)))
    assert maker.pruned.spec.layers == tuple(model.spec.layers[layer_id] for layer_id in (0, 1, 3))
    assert (maker.pruned.config["num_hidden_layers"], maker.pruned.config["mlp_only_layers"]) == (3, [1])
    check(maker, tmp_path / "out")
    assert by_influence([0.5, 0.1, 0.3, 0.1], 2) == (0, 2)
    values = {(1, 2): 3.0, (0, 2): 1.0, (0, 1): 2.0, (0,): 5.0, (2,): 4.0}
    assert by_divergence(3, 2, lambda kept: values[kept]) == ((2,), [(1, 1.0), (0, 4.0)])
    every_second = opened(tmp_path / "sparse", "qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2)
    moe = pruned(every_second, Cut((1, 2, 3))).pruned.spec
    assert moe.moe_layer_ids == (0, 2)
    with raises(UnsupportedError):
        sharing = opened(tmp_path / "sharing", "gemma4")
        pruned(sharing, Cut((0, 2, 3)))


@pytest.mark.parametrize("family", ["qwen2_moe", "phi3", "gpt2", "gpt_oss"])
def test_channels(family: str, tmp_path: Path) -> None:
    changes = {"intermediate_size": 64} if family == "gpt_oss" else {}
    model = opened(tmp_path / "whole", family, **changes)
    widths = widths_of(model.spec, parse_amount("--channels", "50%")) if family != "qwen2_moe" else {32: 16, 64: 32}
    found = survey(model, TOKENS)
    kept = kept_channels("activation", model, found, widths)
    for mlp, channels in kept.items():
        norms = found.channels[mlp].sqrt() * model.load(f"{mlp}down").dense.double().norm(dim=0)
        if bool(found.channels[mlp].any()):
            gone = [n for n in range(len(norms)) if n not in channels.tolist()]
            assert norms[channels].min() >= norms[gone].max()
    check(pruned(model, Cut((0, 1), channels=kept), widths), tmp_path / "out")


def test_widths_stay_multiples_of_what_kernels_like() -> None:
    amounts = [parse_amount("--channels", text) for text in ("25%", "0.25", "1")]
    assert [amount.of(128) for amount in amounts] == [32, 32, 1]
    for text in ("0", "1.5", "100%", "x", "-3"):
        with raises(ConfigError, text):
            parse_amount("--channels", text)


def test_merged_experts_are_means_of_matching_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    first = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    order = torch.randperm(24, generator=generator)
    other = {name: each[:, order] if name == "down" else each[order] for name, each in first.items()}
    experts = [first, other]
    for name in SHAPES:
        mean = merged((0, 1), (3.0, 1.0), lambda expert_id, part: experts[expert_id][part], name)
        torch.testing.assert_close(mean, first[name])


SHAPES = {"gate": (24, 8), "up": (24, 8), "down": (8, 24)}


def test_merged_experts_go_to_the_one_that_is_chosen_along_with_them(tmp_path: Path) -> None:
    model = opened(tmp_path / "whole", "qwen3_moe")
    layers = {layer_id: LayerExperts.nothing(8) for layer_id in (0, 1)}
    for layer in layers.values():
        layer.counts += torch.arange(8)
        layer.together += torch.eye(8)
        layer.together[0, 5] = layer.together[5, 0] = 0.9
    choice = ExpertChoice("use", parse_amount("--experts", "1"), merges=True)
    groups = groups_of(kept_experts(choice, model.spec, scores_of(choice, layers)), layers, merges=True)
    assert groups[0] == ((1,), (2,), (3,), (4,), (5, 0), (6,), (7,))
    check(pruned(model, experts_cut(model, "25%", "reap", merges=True)), tmp_path / "out")


def test_zeros(tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, -2, 3, -4], [5, 6, -7, 8]])
    sparse = with_zeros(weight, parse_sparsity("--weights", "2:4"))
    assert sparse.tolist() == [[0, 0, 3, -4], [0, 0, -7, 8]]
    norms = torch.tensor([9.0, 1, 1, 1])
    sparse = with_zeros(weight, parse_sparsity("--weights", "25%"), norms)
    assert sparse.tolist() == [[1, 0, 3, -4], [5, 0, -7, 8]]
    assert with_zeros(weight, parse_sparsity("--weights", "0.5")).tolist() == [[0, 0, 0, 0], [5, 6, -7, 8]]
    with raises(ConfigError, "4:2"):
        parse_sparsity("--weights", "4:2")
    model = opened(tmp_path / "whole", "qwen3_moe")
    with raises(ConfigError):
        check_pattern(model.spec, parse_sparsity("--weights", "3:7"))
    maker = SparseMaker(model, pruned(model, Cut.nothing(model.spec)).pruned, parse_sparsity("", "2:4"), TOKENS)
    check(maker, tmp_path / "out")
    assert maker.zeros * 2 == maker.values
    written = load_file(tmp_path / "out" / "model.safetensors")
    query = written["model.layers.1.self_attn.q_proj.weight"]
    assert (query.unflatten(1, (-1, 4)) == 0).sum(-1).eq(2).all()


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(tmp_path / "whole", "qwen3_moe")

    def maker() -> SparseMaker:
        nothing = pruned(model, Cut.nothing(model.spec)).pruned
        return SparseMaker(model, nothing, parse_sparsity("", "50%"), TOKENS)

    write_pruned(model, maker(), tmp_path / "once", {}, shard_bytes=2**17)
    add, count = Shards.add, 0

    def full(self: Shards, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *arguments)

    monkeypatch.setattr(Shards, "add", full)
    with raises(CheckpointError):
        write_pruned(model, maker(), tmp_path / "out", {}, shard_bytes=2**17)
    assert not (tmp_path / "out").exists()
    with raises(ConflictError):
        write_pruned(model, maker(), tmp_path / "out", {"amount": "another"}, shard_bytes=2**17)
    written = write_pruned(model, maker(), tmp_path / "out", {}, shard_bytes=2**17)
    assert written.num_resumed == 2 and digest(tmp_path / "out") == digest(tmp_path / "once")


def test_damaged_models_are_refused(tmp_path: Path) -> None:
    model = opened(tmp_path / "whole", "qwen3_moe")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    name = next(name for name in tensors if "layers.1" in name and "q_proj" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    model = WideModel.open(str(tmp_path / "whole"))
    with raises(CheckpointError, name):
        survey(model, TOKENS)
    with raises(CheckpointError, name):
        write_pruned(model, pruned(model, Cut((1,))), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
