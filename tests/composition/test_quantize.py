"""What `quantize` takes along and what it names as left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from amalgam.cli import app
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.settings import build_settings
from amalgam.errors import CheckpointError, UnsupportedError
from amalgam.models.registry import all_families
from amalgam.runtime.derive import ensure_derived
from amalgam.tools.analyze import analyze_checkpoint
from tests.errors import raises
from tests.models.gguf_writer import write_gguf
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny

FAMILIES = {family.name: family for family in all_families()}
PROMPT = list(range(3, 40))
DRAFTS = {
    "enorm.weight": (64,),
    "hnorm.weight": (64,),
    "shared_head.norm.weight": (64,),
    "eh_proj.weight": (64, 128),
    "shared_head.head.weight": (256, 64),
    "embed_tokens.weight": (256, 64),
}


def save(folder: Path, family: str, **changes: Any) -> Path:
    save_tiny(FAMILIES[family], folder, **changes)
    return folder


def rewrite(folder: Path, add: dict[str, torch.Tensor], **config: Any) -> None:
    """Further tensors, and keys of config.json."""
    tensors = load_file(folder / "model.safetensors") | add
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def draft_layer(folder: Path) -> dict[str, torch.Tensor]:
    """A layer for multi-token prediction behind the last one: a layer like that, and what draft models have besides."""
    last = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".layers.1." in name}
    assert last
    return {name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in last.items()} | {
        f"model.layers.2.{name}": torch.randn(shape) for name, shape in DRAFTS.items()
    }


def logits(folder: Path) -> torch.Tensor:
    return Runner(*load_model(folder)).step({0: PROMPT})[0]


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("target", ["int8", "fp8"])
def test_draft_layers_are_copied(family: str, target: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", family)
    quantize_checkpoint(str(base), tmp_path / "plain", target)
    drafts = draft_layer(base)
    rewrite(base, drafts, num_nextn_predict_layers=1)
    report = quantize_checkpoint(str(base), tmp_path / "out", target)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(report.carried) == set(drafts)
    assert all(torch.equal(written[name], tensor) for name, tensor in drafts.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert (report.left_out_tensors, report.left_out_files, report.config_changes) == ([], [], {})
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "plain"))


def test_draft_layers_that_are_quantized_already_are_left_out_and_the_config_says_so(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "glm4_moe")
    drafts = draft_layer(base)
    drafts["model.layers.2.eh_proj.weight"] = drafts["model.layers.2.eh_proj.weight"].to(torch.float8_e4m3fn)
    drafts["model.layers.2.eh_proj.weight_scale"] = torch.ones(64, 1)
    rewrite(base, drafts, num_nextn_predict_layers=1)
    report = quantize_checkpoint(str(base), tmp_path / "out", "int8")
    assert set(report.left_out_tensors) == set(drafts)
    assert report.config_changes == {"num_nextn_predict_layers": 0}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    logits(tmp_path / "out")


def test_a_derived_source_has_none(tmp_path: Path) -> None:
    """It is only asked for the model's weights; a draft layer of DeepSeek-V3 would take 23 GB."""
    base = save(tmp_path / "base", "deepseek_v3")
    drafts = draft_layer(base)
    rewrite(base, drafts, num_nextn_predict_layers=1)
    mixed = {"int8_path": str(tmp_path / "int8"), "derived": {"int8": {"format": "int8"}}}
    (report,) = ensure_derived(build_settings({"model": {"base_path": str(base), "mixed_precision": mixed}}))
    assert (report.carried, set(report.left_out_tensors)) == ([], set(drafts))
    assert report.config_changes == {"num_nextn_predict_layers": 0}
    logits(tmp_path / "int8")


def test_a_key_without_its_layers_stays(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "glm4_moe")
    rewrite(base, {"model.layers.0.self_attn.k_scale": torch.ones(1)}, num_nextn_predict_layers=1)
    assert quantize_checkpoint(str(base), tmp_path / "out", "int8").config_changes == {}


def test_tables_and_a_tied_head_are_copied(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama", tie_word_embeddings=True)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    extra = {
        "lm_head.weight": embedding.clone(),
        **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8) for i in range(2)},
    }
    rewrite(base, extra)
    report = quantize_checkpoint(str(base), tmp_path / "out", "int8")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(report.carried) == set(extra)
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    logits(tmp_path / "out")


def test_scales_of_a_cache_are_named(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama")
    rewrite(base, {"model.layers.0.self_attn.k_scale": torch.ones(1)})
    report = quantize_checkpoint(str(base), tmp_path / "out", "int8")
    assert report.left_out_tensors == ["model.layers.0.self_attn.k_scale"]


@pytest.mark.parametrize("name", ["vision_tower.patch_embed.weight", "model.layers.0.self_attn.g_proj.weight"])
def test_weights_without_a_place_are_refused_rather_than_lost(name: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama")
    rewrite(base, {name: torch.ones(4, 4)})
    with raises(CheckpointError, name):
        quantize_checkpoint(str(base), tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_undeclared_draft_layers_name_the_key_that_declares_them(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "glm4_moe")
    rewrite(base, draft_layer(base), num_nextn_predict_layers=0)
    for call in (lambda: quantize_checkpoint(str(base), tmp_path / "out", "int8"), lambda: load_model(base)):
        with raises(CheckpointError, "num_nextn_predict_layers 1"):
            call()
    rewrite(base, {}, num_nextn_predict_layers=1)
    load_model(base)


def test_files(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama")
    copied = ["chat_template.jinja", "tokenizer.model", "merges.txt", "generation_config.json", "LICENSE"]
    for name in (*copied, "README.md", "modeling_new.py", "consolidated.00.pth", ".gitattributes"):
        (base / name).write_text("{}")
    for name in ("additional_chat_templates/tools.jinja", "additional_chat_templates/notes.md", "original/params.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    report = quantize_checkpoint(str(base), tmp_path / "out", "int8")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {*copied, "additional_chat_templates/tools.jinja", "config.json", "model.safetensors"}
    assert set(report.left_out_files) == {
        *("README.md", "modeling_new.py", "consolidated.00.pth"),
        *("additional_chat_templates/notes.md", "original/"),
    }


def test_a_file_outside_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama")
    (tmp_path / "secret.json").write_text("{}")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with raises(CheckpointError, base / "tokenizer.json", tmp_path / "secret.json"):
        quantize_checkpoint(str(base), tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_from_pickles(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama")
    quantize_checkpoint(str(base), tmp_path / "plain", "int8")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    report = quantize_checkpoint(str(base), tmp_path / "out", "int8")
    assert report.left_out_files == []
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "plain"))


def test_draft_layers_of_a_gguf_file_are_left_out_and_the_config_says_so(tmp_path: Path) -> None:
    def add_draft(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["glm4moe.block_count"].value = 3
        writer.add_nextn_predict_layers(1)
        for name in ("blk.2.attn_norm.weight", "blk.2.nextn.eh_proj.weight"):
            writer.add_tensor(name, np.ones(64, np.float32))

    base = save(tmp_path / "base", "glm4_moe")
    file = write_gguf(base, tmp_path / "model.gguf", edit=add_draft)
    report = quantize_checkpoint(str(file), tmp_path / "out", "int8")
    quantize_checkpoint(str(base), tmp_path / "plain", "int8")
    assert report.left_out_tensors == ["blk.2.attn_norm.weight", "blk.2.nextn.eh_proj.weight"]
    assert report.config_changes == {"num_nextn_predict_layers": 0}
    assert [line for line in report.left_out_files if "tokenizer" in line]
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "plain"))


class TestCommand:
    def test_it_says_what_it_did_not_take(self, tmp_path: Path) -> None:
        base = save(tmp_path / "base", "glm4_moe")
        rewrite(base, draft_layer(base) | {"model.layers.0.self_attn.k_scale": torch.ones(1)})
        rewrite(base, {}, num_nextn_predict_layers=1)
        (base / "README.md").write_text("")
        for options in ([], ["--json"]):
            out = str(tmp_path / f"out{len(options)}")
            result = CliRunner().invoke(app, ["quantize", str(base), out, "--format", "int8", *options])
            assert result.exit_code == 0, result.output
            assert "k_scale" in result.stdout
            assert "README.md" in result.stdout
            assert "model.layers.2.eh_proj.weight" in result.stdout
        report = json.loads(result.stdout)
        assert report["left_out"] == {"tensors": ["model.layers.0.self_attn.k_scale"], "files": ["README.md"]}
        assert "model.layers.2.eh_proj.weight" in report["carried_over"]
        assert report["config_changes"] == {}

    @pytest.mark.parametrize("name", ["foo", "gguf_q4_0", "bf16", ""])
    def test_only_formats_that_can_be_made_are_named(self, name: str, tmp_path: Path) -> None:
        made = "fp8, fp8-e5m2, int2, int3, int4, int8, int8-packed, mxfp4"
        with raises(UnsupportedError, repr(name), made):
            quantize_checkpoint(str(save(tmp_path / "base", "llama")), tmp_path / "out", name)


def test_analyze_says_what_it_does_not_count(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "glm4_moe")
    before = analyze_checkpoint(str(base))
    drafts = draft_layer(base)
    rewrite(base, drafts, num_nextn_predict_layers=1)
    after = analyze_checkpoint(str(base))
    assert after.total.num_weights == before.total.num_weights
    assert any(f"{len(drafts)} tensors of layers that predict" in note for note in after.notes)
    assert not before.notes
