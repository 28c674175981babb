"""`amalgam analyze`: what it tells of a checkpoint, and the configurations that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.checkpoint import TensorStore, write_checkpoint
from amalgam.cli import main
from amalgam.composition.loader import ModelLoader
from amalgam.composition.patterns import compile_pattern
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.reading import load_settings
from amalgam.errors import CheckpointError, ConfigError
from amalgam.models.families import mixtral, qwen3_moe
from amalgam.models.registry import all_families, read_spec
from amalgam.models.spec import Family
from amalgam.runtime.derive import ensure_derived
from amalgam.tools.analyze import Analysis, analyze_checkpoint
from amalgam.tools.export_config import Export, export_config
from amalgam.tools.roles import role_by_name
from tests.errors import raises
from tests.models.tiny import BASE_CONFIG, save_tiny

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 4096,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "num_hidden_layers": 94,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
    "torch_dtype": "bfloat16",
}


def config_of(family: Family, **changes: Any) -> dict[str, Any]:
    return {"architectures": list(family.architectures[:1]), **BASE_CONFIG, **family.tiny_config, **changes}


def write_index(folder: Path, tensors: Mapping[str, str] | list[str], **metadata: Any) -> Path:
    """An index without its shards."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = tensors if isinstance(tensors, Mapping) else dict.fromkeys(tensors, "model-1-of-1.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return folder


def names_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Logical name → role of every weight of a config."""
    family, spec = read_spec(config, "config.json")
    return {family.logical_name(slot): slot.role for slot in spec.slots}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of qwen3_moe in bf16: one dense, two with 8 experts."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(qwen3_moe.FAMILY, folder, torch.bfloat16, num_hidden_layers=3, mlp_only_layers=[0])
    return folder


@pytest.fixture(scope="module")
def sharded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "model"
    store = TensorStore.open(tiny)
    write_checkpoint(folder, ((name, store.read(name)) for name in store), max_shard_bytes=100_000)
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def index_only(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "model"
    folder.mkdir()
    for file in sharded.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def export(model: Path | Analysis, out: Path, **precisions: str) -> Export:
    analysis = model if isinstance(model, Analysis) else analyze_checkpoint(str(model))
    return export_config(analysis, out, precisions)


def loader_of(file: Path) -> ModelLoader:
    settings = load_settings(file, environ={})
    return ModelLoader(settings.model, settings.inference, torch.device("cpu"), threads=1)


# --- what it tells


def test_the_demo_model() -> None:
    found = analyze_checkpoint(str(DEMO))
    assert (found.architecture, found.family and found.family.name) == ("Qwen3MoeForCausalLM", "qwen3_moe")
    assert (found.num_layers, found.experts_per_layer, found.num_shards) == (6, {16: 6}, 1)
    assert found.has_headers and not found.notes
    assert {role: tally.num_weights for role, tally in found.roles.items()} == {
        "embedding": 1,
        "attention": 6 * 4,
        "expert": 6 * 16 * 3,
        "router": 6,
        "norm": 6 * 4 + 1,
    }
    assert found.spec is not None and found.total.parameters == found.spec.num_parameters
    assert found.total.nbytes == 2 * found.spec.num_parameters
    assert list(found.formats) == ["bf16"]


def test_mixtral_names(tmp_path: Path) -> None:
    save_tiny(mixtral.FAMILY, tmp_path, torch.float16)
    found = analyze_checkpoint(str(tmp_path))
    assert (found.num_layers, found.experts_per_layer, list(found.formats)) == (2, {4: 2}, ["fp16"])
    assert found.roles["expert"].parameters == 2 * 4 * 3 * 64 * 128
    assert export(found, tmp_path / "out.yaml", expert="int4").rules[0].pattern == (
        "model.layers.*.block_sparse_moe.experts.*"
    )


def test_shards_and_index_alone_tell_the_same(tiny: Path, sharded: Path, index_only: Path) -> None:
    whole, parts, index = (analyze_checkpoint(str(folder)) for folder in (tiny, sharded, index_only))
    assert parts.num_shards > 2 and parts.num_missing_shards == 0
    assert parts.weights == whole.weights
    assert index.num_missing_shards == index.num_shards == parts.num_shards
    assert not index.has_headers and "computed from config.json" in index.notes[0]
    for found in (parts, index):
        assert (found.num_layers, found.experts_per_layer) == (3, {8: 2})
    assert {role: tally.parameters for role, tally in index.roles.items()} == {
        role: tally.parameters for role, tally in whole.roles.items()
    }
    assert index.total.nbytes == whole.total.nbytes
    assert all(tally.nbytes is None for tally in index.roles.values())
    assert list(index.formats) == ["bf16"]


def test_one_missing_shard_leaves_the_index(sharded: Path, tmp_path: Path) -> None:
    for file in sharded.iterdir():
        os.link(file, tmp_path / file.name)
    next(tmp_path.glob("*-00001-of-*.safetensors")).unlink()
    found = analyze_checkpoint(str(tmp_path))
    assert found.num_missing_shards == 1 and not found.has_headers


@pytest.mark.parametrize("format_name", ["fp8", "int8", "int4"])
def test_parts_of_a_quantized_weight_count_as_one(tiny: Path, tmp_path: Path, format_name: str) -> None:
    quantize_checkpoint(str(tiny), tmp_path / "q", format_name)
    whole, found = analyze_checkpoint(str(tiny)), analyze_checkpoint(str(tmp_path / "q"))
    assert found.weights.keys() == whole.weights.keys()
    assert found.total.parameters == whole.total.parameters
    assert found.total.nbytes is not None and whole.total.nbytes is not None
    assert found.total.nbytes < whole.total.nbytes
    assert set(found.formats_of("expert")) == set(found.formats_of("attention")) == {format_name}
    assert set(found.formats_of("router")) == {"bf16"}

    tensors = list(TensorStore.open(tmp_path / "q"))
    index = write_index(tmp_path / "index", tensors)
    (index / "config.json").write_bytes((tmp_path / "q" / "config.json").read_bytes())
    # Names alone do not tell formats of other widths apart.
    assert format_name in " or ".join(analyze_checkpoint(str(index)).formats_of("expert")).split(" or ")


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_names_tell_the_roles_that_families_know(family: Family) -> None:
    changes = {"mlp_only_layers": [0]} if family is qwen3_moe.FAMILY else {}
    has_mlp_bias = family.name == "llama"
    roles = names_of(config_of(family, attention_bias=True, mlp_bias=has_mlp_bias, **changes))
    assert {name: role_by_name(name) for name in roles} == roles


def test_an_unknown_architecture_is_told_by_its_names(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "model", unknown_names(), total_size=1000)
    (folder / "config.json").write_text('{"architectures": ["NovelForCausalLM"]}')
    found = analyze_checkpoint(str(folder))
    assert found.architecture == "NovelForCausalLM" and found.family is None
    assert "NovelForCausalLM" in found.notes[0]
    assert (found.num_layers, found.experts_per_layer, found.num_shared_expert_layers) == (3, {4: 2}, 2)
    assert found.total.nbytes == 1000
    assert all(tally.parameters is None for tally in found.roles.values())
    assert {role: tally.num_weights for role, tally in found.roles.items()} == {
        "embedding": 1,
        "attention": 3 * 2,
        "mlp": 3,
        "expert": 2 * 4 * 3,
        "shared_expert": 2 * 3,
        "router": 2,
        "norm": 3 * 2 + 1,
        "bias": 3,
        "head": 1,
        "other": 1,
    }


def unknown_names() -> list[str]:
    """A layer with a dense MLP and two with experts and shared experts, by DeepSeek's customs."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "visual.blocks.0.attn.qkv.weight"]
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        names += [f"{prefix}.self_attn.{part}.weight" for part in ("q_a_proj", "o_proj", "kv_a_layernorm")]
        names += [f"{prefix}.self_attn.o_proj.bias", f"{prefix}.input_layernorm.weight"]
        paths = ["mlp"] if layer == 0 else ["mlp.shared_experts", *(f"mlp.experts.{expert}" for expert in range(4))]
        names += [f"{prefix}.{path}.{part}_proj.weight" for path in paths for part in ("gate", "up", "down")]
        names += [f"{prefix}.mlp.gate.weight"] if layer else []
    return names


def test_weights_that_no_format_recognises_are_counted_and_named(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8, dtype=torch.bfloat16),
        "model.layers.0.self_attn.o_proj.qweight": torch.zeros(1, 8, dtype=torch.int32),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(8, 8, dtype=torch.int8),  # without a scale
    }
    write_checkpoint(tmp_path, tensors.items())
    found = analyze_checkpoint(str(tmp_path))
    assert found.formats["unrecognised"].num_weights == 2
    assert found.roles["attention"].parameters is None
    assert found.roles["attention"].nbytes == 8 * 8 * 2 + 8 * 4
    assert any("o_proj.qweight" in note for note in found.notes)


def test_an_index_of_235_billion_parameters_is_read_in_seconds(tmp_path: Path) -> None:
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    tensors = []
    for name, role in names_of(QWEN3_235B).items():
        suffixes = parts if role in {"attention", "expert"} else ("weight",)
        tensors += [f"{name.removesuffix('weight')}{suffix}" for suffix in suffixes]
    assert len(tensors) > 145_000
    write_index(tmp_path, tensors, total_size=10)
    arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    groups = {"group_0": {"targets": ["Linear"], "weights": arguments, "format": "pack-quantized"}}
    declared = {"quant_method": "compressed-tensors", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3_235B, "quantization_config": declared}))
    started = time.process_time()
    found = analyze_checkpoint(str(tmp_path))
    written = export(found, tmp_path / "out.yaml", attention="bf16", expert="int4")
    assert time.process_time() - started < 5
    assert found.total.parameters == 235_093_634_560
    assert (found.num_layers, found.experts_per_layer, " or ".join(found.formats_of("expert")).split(" or ")[0]) == (
        94,
        {128: 94},
        "int4",
    )
    assert [(rule.role, rule.num_weights) for rule in written.rules] == [("attention", 94 * 4)]


def test_of_a_hub_repository_only_json_is_downloaded(index_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options["allow_patterns"]))
        return str(index_only)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = analyze_checkpoint("org/name")
    assert asked == [("org/name", ["*.json"])]
    assert found.folder == index_only


# --- the configurations that it writes


def matched(written: Export, names: Mapping[str, str]) -> dict[str, set[str]]:
    """Rule's role → roles of the names that it matches."""
    found: dict[str, set[str]] = {}
    for rule in written.rules:
        regex = compile_pattern(rule.pattern)
        found.setdefault(rule.role, set()).update(role for name, role in names.items() if regex.fullmatch(name))
    return found


def test_an_exported_configuration_is_planned_and_checked_as_it_stands(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.yaml"
    written = export(tiny, out, attention="bf16", mlp="fp8", expert="int4")
    assert any(note.startswith("attention: bf16 is what the base checkpoint holds") for note in written.notes)
    ensure_derived(load_settings(out, environ={}))
    loader = loader_of(out)
    planned = loader.plan()
    formats: dict[str, set[str]] = {}
    for weight in planned:
        formats.setdefault(weight.slot.role, set()).add(weight.stored.format.name)
    assert (formats["attention"], formats["mlp"], formats["expert"]) == ({"bf16"}, {"fp8"}, {"int4"})
    assert formats["router"] == formats["embedding"] == {"bf16"}


def test_bytes_of_the_new_precision_are_foretold(tiny: Path, tmp_path: Path) -> None:
    (rule,) = export(tiny, tmp_path / "out.yaml", expert="int8").rules
    quantize_checkpoint(str(tiny), tmp_path / "q", "int8")
    assert rule.new_nbytes == analyze_checkpoint(str(tmp_path / "q")).roles["expert"].nbytes


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_each_rule_matches_all_of_its_role_and_no_other_role(family: Family, tmp_path: Path) -> None:
    config = config_of(family, attention_bias=True, mlp_only_layers=[0])
    names = names_of(config)
    folder = write_index(tmp_path / "model", list(names))
    (folder / "config.json").write_text(json.dumps(config))
    roles = ("embedding", "attention", "mlp", "expert", "shared_expert", "head")
    written = export(folder, tmp_path / "out.yaml", **dict.fromkeys(roles, "int4"))
    for role, found in matched(written, names).items():
        assert role in found <= {role, "norm", "bias"}
    for role in roles:
        assert sum(r.num_weights for r in written.rules if r.role == role) == list(names.values()).count(role)


def test_rules_without_a_family(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "model", unknown_names())
    written = export(folder, tmp_path / "out.yaml", attention="a", mlp="b", expert="c", shared_expert="d", head="e")
    assert {rule.pattern: rule.source for rule in written.rules} == {
        "model.layers.*.self_attn.*": "a",
        "model.layers.*.mlp.{gate_proj,up_proj,down_proj}.*": "b",
        "model.layers.*.mlp.experts.*": "c",
        "model.layers.*.mlp.shared_experts.*": "d",
        "lm_head.weight": "e",
    }
    assert set(load_settings(written.file, environ={}).model.mixed_precision.sources) == set("abcde")


def test_what_would_match_nothing_is_left_out_and_said(tmp_path: Path) -> None:
    written = export(DEMO, tmp_path / "out.yaml", mlp="fp8", head="int4", shared_expert="int4", expert="base")
    assert written.rules == ()
    assert "no dense MLP layers" in written.notes[0]
    assert "tied" in next(note for note in written.notes if note.startswith("head"))
    mixed = load_settings(written.file, environ={}).model.mixed_precision
    assert (mixed.sources, mixed.weight_mapping) == ({}, {})
    loader_of(written.file).choose()
    assert "# mlp: the model has no dense MLP layers" in written.file.read_text()


def test_relative_paths_start_at_the_file(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    (tmp_path / "deep").mkdir()
    written = export_config(analyze_checkpoint("model"), tmp_path / "deep" / "out.yaml", {"expert": "fp16"})
    assert not any(str(tmp_path) in line for line in written.file.read_text().splitlines())
    model = load_settings(written.file, environ={}).model
    assert Path(model.base_path) == tiny
    assert Path(model.mixed_precision.sources["fp16"]) == tiny.with_name("model-fp16")
    assert any("does not exist" in note for note in written.notes)

    absolute = load_settings(export(tiny, tmp_path / "absolute.yaml").file, environ={}).model
    assert absolute.base_path == str(tiny)


def test_hostile_names_of_folders_stay_values(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'a\n"b: {c} # d\x85'
    folder.symlink_to(tiny)
    written = export(folder, tmp_path / "out.yaml", expert="fp16")
    assert load_settings(written.file, environ={}).model.base_path == str(folder)


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out.yaml"
    out.write_text("precious")
    with raises(ConfigError, out, "--force"):
        export(DEMO, out)
    assert out.read_text() == "precious"
    export_config(analyze_checkpoint(str(DEMO)), out, {}, force=True)
    assert load_settings(out, environ={}).model.name == "demo"


def test_a_file_that_cannot_be_replaced_whole_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.yaml"
    out.write_text("precious")
    analysis = analyze_checkpoint(str(DEMO))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with raises(CheckpointError, out):
        export_config(analysis, out, {}, force=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("precision", ["", "-fp8", "fp8: x", "a/b", "a\nb", "x" * 65])
def test_an_impossible_precision_is_refused(precision: str, tmp_path: Path) -> None:
    with raises(ConfigError, "mlp"):
        export(DEMO, tmp_path / "out.yaml", mlp=precision)
    assert not (tmp_path / "out.yaml").exists()


def test_names_without_a_pattern_give_no_rules(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "model", [f"x{number}.attn.weight" for number in range(3000)])
    with raises(CheckpointError, folder, 2000):
        export(folder, tmp_path / "out.yaml", attention="fp8")


def test_names_that_a_pattern_cannot_spell_are_in_no_rule(tmp_path: Path) -> None:
    names = ["a.attn.q.weight", "a.attn.[x.weight", "a.attn.{.weight", "a." * 2000 + "attn.weight"]
    written = export(write_index(tmp_path / "model", names), tmp_path / "out.yaml", attention="fp8")
    assert [rule.pattern for rule in written.rules] == ["a.attn.q.weight"]


# --- bad input


INDEX = "model.safetensors.index.json"


def corrupt(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        content = {"metadata": {}, "weight_map": {"a.weight": "a.safetensors"}, **changes}
        (folder / INDEX).write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / INDEX).write_text("{"), (INDEX,)),
        (lambda folder: (folder / INDEX).write_text("[]"), (INDEX, "[]")),
        (corrupt(weight_map=[]), (INDEX, "weight_map []")),
        (corrupt(weight_map={}), (INDEX, "weight_map {}")),
        (corrupt(weight_map={"a.weight": 1}), (INDEX, "a.weight", "1")),
        (corrupt(weight_map={"a.weight": "../../a.safetensors"}), (INDEX, "a.weight", "../../a.safetensors")),
        (corrupt(weight_map={"a.weight": "/etc/passwd"}), (INDEX, "a.weight", "/etc/passwd")),
        (corrupt(weight_map={"a\x1b.weight": "a.safetensors"}), (INDEX, repr("a\x1b.weight"))),
        (corrupt(metadata=[1]), (INDEX, "metadata [1]")),
        (corrupt(metadata={"total_size": "big"}), (INDEX, "metadata.total_size", "big")),
        (corrupt(metadata={"total_size": -1}), (INDEX, "metadata.total_size", "-1")),
        (lambda folder: (folder / "config.json").write_text("{} {}"), ("config.json",)),
        (lambda folder: None, ()),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], named: tuple[str, ...], tmp_path: Path) -> None:
    damage(tmp_path)
    with raises(CheckpointError, *named):
        analyze_checkpoint(str(tmp_path))


# --- the command


def test_the_older_name_of_the_command_works_as_written(tmp_path: Path) -> None:
    arguments = ["--model_path", str(DEMO), "--export_config", "OUT.yaml"]
    precisions = ["--attention_precision", "fp16", "--mlp_precision", "fp8", "--expert_precision", "int4"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = ROOT / "src" / "safetensors_index_analyzer.py"
    done = subprocess.run(
        [sys.executable, str(script), *arguments, *precisions],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Qwen3MoeForCausalLM" in done.stdout
    assert "no dense MLP layers" in done.stdout
    mixed = load_settings(tmp_path / "OUT.yaml", environ={}).model.mixed_precision
    mapping = {"model.layers.*.self_attn.*": "fp16", "model.layers.*.mlp.experts.*": "int4"}
    assert mixed.model_dump()["weight_mapping"] == mapping
    loader_of(tmp_path / "OUT.yaml").choose()


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.yaml"
    assert main(["analyze", str(DEMO), "--json", "--export-config", str(out), "--expert-precision", "int4"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["architecture"] == "Qwen3MoeForCausalLM"
    assert document["roles"]["expert"] == {
        "weights": 288,
        "parameters": 9437184,
        "bytes": 2 * 9437184,
        "formats": {"bf16": 288},
    }
    assert document["num_experts_per_layer"] == [16]
    assert document["export"]["file"] == str(out)
    assert document["export"]["rules"][0]["pattern"] == "model.layers.*.mlp.experts.*"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No model"),
        ([str(DEMO), "--model-path", str(DEMO)], "Two models"),
        ([str(DEMO), "--mlp_precision", "fp8"], "--export_config"),
        ([str(DEMO), "--export_config", "/nowhere/out.yaml"], "cannot be written"),
        (["/nowhere"], "no folder '/nowhere'"),
    ],
)
def test_wrong_use_is_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", *arguments]) != 0
    assert message in capsys.readouterr().err
