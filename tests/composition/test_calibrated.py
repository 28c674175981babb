"""Quantizing with texts: less error at the same bytes, every expert covered, and what goes wrong said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amalgam.composition.quantize import make_checkpoint
from amalgam.composition.quantizing.recipe import ACTIVATIONS, Activations, CalibrationTexts, Method, Recipe
from amalgam.errors import CheckpointError, ConfigError, ConflictError
from amalgam.formats.grid import QuantizeOptions
from amalgam.models.registry import all_families
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO
from tests.errors import raises
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny

FAMILIES = {family.name: family for family in all_families()}
TEXT = (
    "The lamp in the hall had gone out, and Anna felt her way along the wall. Nobody had told her that the stairs were "
    "new. def count(items):\n    total = 0\n    for item in items:\n        total += item.size\n    return total\n"
    "我在山上看见一只白色的鸟，它慢慢地飞过了河。"
)
HELD_OUT = "He opened the window and looked down at the river, which was higher than yesterday. import json\n花开了。"
GROUPS = QuantizeOptions(group_size=32)


@pytest.fixture
def texts(tmp_path: Path) -> CalibrationTexts:
    file = tmp_path / "texts.json"
    words = TEXT.split()
    file.write_text(json.dumps([" ".join(words[shift:] + words[:shift]) for shift in range(len(words))]))
    return CalibrationTexts((file,), max_tokens=1024, sequence_tokens=128, min_expert_tokens=200)


def tiny(folder: Path, family: str) -> Path:
    """A random model with the demo's tokenizer."""
    vocab_size = Tokenizer.load(DEMO).vocab_size
    save_tiny(FAMILIES[family], folder, vocab_size=vocab_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


def logits(folder: Path, text: str = HELD_OUT) -> torch.Tensor:
    token_ids = Tokenizer.load(DEMO).encode(text)
    return torch.log_softmax(Runner(*load_model(folder), blocks_each=64).step({0: token_ids})[0], -1)


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("method", ["search", "gptq", "awq"])
def test_calibrated_int4_is_nearer_to_the_model_than_rounding_at_the_same_bytes(
    method: Method, texts: CalibrationTexts, tmp_path: Path
) -> None:
    base = tiny(tmp_path / "base", "qwen3_moe")
    rounded = make_checkpoint(str(base), tmp_path / "round", Recipe("int4", GROUPS))
    report = make_checkpoint(str(base), tmp_path / method, Recipe("int4", GROUPS, method, texts=texts))
    assert report.bytes_after == rounded.bytes_after
    assert report.num_tokens == 1024 and report.rounded == []
    assert all(shown >= max(200, sent) for sent, shown in report.expert_tokens.values())
    assert any(sent < 200 for sent, _ in report.expert_tokens.values())
    reference = logits(base, TEXT)  # of the kind that it was calibrated with: so few words tell of no other
    distances = [divergence(reference, logits(tmp_path / name, TEXT)) for name in (method, "round")]
    assert distances[0] < distances[1]


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_oss", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_family_can_be_calibrated(family: str, method: Method, texts: CalibrationTexts, tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", family)
    options = QuantizeOptions(scale="channel")
    report = make_checkpoint(str(base), tmp_path / "out", Recipe("int8-packed", options, method, texts=texts))
    assert report.rounded == []
    assert divergence(logits(base), logits(tmp_path / "out")) < 0.02


def test_factors_move_no_norm_and_no_router(texts: CalibrationTexts, tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", "qwen3_moe")
    make_checkpoint(str(base), tmp_path / "awq", Recipe("int4", GROUPS, "awq", texts=texts))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "awq" / "model.safetensors")
    kept = [name for name in before if "norm" in name or name.endswith("mlp.gate.weight") or "embed" in name]
    assert len(kept) > 8
    assert all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_scales_of_activations_are_declared_and_change_nothing_here(
    name: str, activations: Activations, texts: CalibrationTexts, tmp_path: Path
) -> None:
    given = texts if activations == "static" else None
    base = tiny(tmp_path / "base", "qwen3_moe")
    make_checkpoint(str(base), tmp_path / "plain", Recipe(name))
    make_checkpoint(str(base), tmp_path / "out", Recipe(name, activations=activations, texts=given))
    (group,) = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ].values()
    declared = group["input_activations"]
    assert declared["num_bits"] == 8 and declared["dynamic"] is (activations == "dynamic")
    written = load_file(tmp_path / "out" / "model.safetensors")
    scales = [tensor for key, tensor in written.items() if key.endswith("input_scale")]
    num_quantized = sum(key.endswith("weight_scale") for key in written)
    assert len(scales) == (0 if activations == "dynamic" else num_quantized)
    assert all(scale.shape == (1,) and 0 < float(scale) < 100 for scale in scales)
    assert torch.equal(logits(tmp_path / "plain"), logits(tmp_path / "out"))


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(texts: CalibrationTexts, tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", "qwen3_moe")
    recipe = Recipe("int4", GROUPS, "gptq", texts=texts)
    small = {"shard_bytes": 1}  # a file for each layer
    whole = make_checkpoint(str(base), tmp_path / "whole", recipe, **small)

    tensors = load_file(base / "model.safetensors")
    layer_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.0." in name)
    middle = tensors["model.embed_tokens.weight"].nbytes + 1.5 * layer_bytes

    class Killed(BaseException):
        pass

    def stop_late(what: str, done: int, total: int) -> None:
        if done > middle:
            raise Killed

    with pytest.raises(Killed):
        make_checkpoint(str(base), tmp_path / "out", recipe, stop_late, **small)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    assert len(list(partial.glob("model-*.safetensors"))) == 2
    with raises(ConflictError, partial, "method"):
        make_checkpoint(str(base), tmp_path / "out", Recipe("int4", GROUPS), **small)
    report = make_checkpoint(str(base), tmp_path / "out", recipe, **small)
    assert report.num_resumed == 2 and not partial.exists()
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert (report.roles, report.expert_tokens) == (whole.roles, whole.expert_tokens)


def test_what_is_left_of_a_run_that_has_finished_no_file_is_removed(tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(str(DEMO), tmp_path / "out", Recipe("int8"), stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    make_checkpoint(str(DEMO), tmp_path / "out", Recipe("int8"))
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1000


def test_a_full_disk_names_the_folder_and_keeps_what_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amalgam.composition.quantizing import shards

    write, count = shards.write_shard, 0

    def full(*arguments: object) -> int:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "write_shard", full)
    with raises(CheckpointError, tmp_path / "out", "No space left on device"):
        make_checkpoint(str(DEMO), tmp_path / "out", Recipe("int8"), shard_bytes=2**22)
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial"}
    assert make_checkpoint(str(DEMO), tmp_path / "out", Recipe("int8"), shard_bytes=2**22).num_resumed == 2


def test_an_expert_that_no_token_reached_is_rounded_and_named(texts: CalibrationTexts, tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", "qwen3_moe")
    tensors = load_file(base / "model.safetensors")
    bare = CalibrationTexts(texts.files, 1024, 128, min_expert_tokens=0)
    key = next(name for name in tensors if name.endswith("layers.0.mlp.gate.weight"))
    norm = next(name for name in tensors if name.endswith("layers.0.post_attention_layernorm.weight"))
    tensors[norm] = tensors[norm].abs()
    tensors[key][2] = 0
    tensors[key][3:] = torch.randn_like(tensors[key][3:]) * 50  # some of the others always beat a score of 0
    save_file(tensors, base / "model.safetensors")
    recipe = Recipe("int4", GROUPS, "gptq", texts=bare)
    report = make_checkpoint(str(base), tmp_path / "out", recipe)
    sent = report.expert_tokens["layers.0.mlp.experts.2"]
    assert sent[0] == sent[1]
    if sent == (0, 0):
        assert "model.layers.0.mlp.experts.2.down_proj.weight" in report.rounded
    covered = make_checkpoint(str(base), tmp_path / "covered", Recipe("int4", GROUPS, "gptq", texts=texts))
    assert covered.rounded == []


def test_bad_input_is_named(texts: CalibrationTexts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for recipe, value in (
        (Recipe("int4", method="gptq"), "gptq"),
        (Recipe("int4", method="magic"), "magic"),  # type: ignore[arg-type]
        (Recipe("int4", texts=texts), "Rounding"),
        (Recipe("int4", activations="dynamic"), "int4"),
        (Recipe("fp8", activations="static"), "static"),
        (Recipe("fp8", QuantizeOptions(scale="block"), activations="static", texts=texts), "block"),
    ):
        with raises(ConfigError, value):
            make_checkpoint(str(DEMO), out, recipe)
    short = tmp_path / "short.txt"
    short.write_text(HELD_OUT)
    with raises(ConfigError, short):
        make_checkpoint(str(DEMO), out, Recipe("int4", method="gptq", texts=CalibrationTexts((short,))))
    base = tmp_path / "base"
    save_tiny(FAMILIES["llama"], base)
    with raises(CheckpointError, base):
        make_checkpoint(str(base), out, Recipe("int4", method="gptq", texts=texts))
    (base / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    with raises(CheckpointError, 256):
        make_checkpoint(str(base), out, Recipe("int4", method="gptq", texts=texts))
    assert not out.exists() and not (tmp_path / ".out.partial").exists()


def test_activations_that_overflow_are_named(texts: CalibrationTexts, tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    for part in ("gate", "up"):
        key = next(name for name in tensors if name.endswith(f"layers.0.mlp.{part}_proj.weight"))
        tensors[key] *= 1e30
    save_file(tensors, base / "model.safetensors")
    with raises(CheckpointError, "layers.0.mlp.down"):
        make_checkpoint(str(base), tmp_path / "out", Recipe("fp8", method="gptq", texts=texts))


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with raises(CheckpointError, tmp_path / "file" / "out"):
        make_checkpoint(str(DEMO), tmp_path / "file" / "out", Recipe("int8"))


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_a_weight_that_is_not_finite_is_named(method: Method, texts: CalibrationTexts, tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = torch.nan
    save_file(tensors, base / "model.safetensors")
    given = texts if method == "gptq" else None
    with raises(CheckpointError, "model.layers.1.self_attn.o_proj.weight"):
        make_checkpoint(str(base), tmp_path / "out", Recipe("int4", GROUPS, method, texts=given))
