"""One folder of a plan: what is in it, in what form, and what the engines that it is for make of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.checkpoint.writer import write_checkpoint
from amalgam.cli import main
from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.composition.source import Source
from amalgam.config.settings import Settings
from amalgam.errors import CheckpointError, ConfigError, ConflictError, UnsupportedError
from amalgam.formats.grid import QuantizeOptions
from amalgam.models.registry import all_families
from amalgam.tools.export import checkpoint
from amalgam.tools.export.contract import ExportOptions
from amalgam.tools.export.encoding import compressed_tensors, converted
from amalgam.tools.export.exporting import export_model, open_plan
from amalgam.tools.export.forms import exact_forms, scheme_of, stored_form
from amalgam.tools.export.targets.compressed import targets_of
from tests.conftest import ROOT
from tests.errors import raises
from tests.formats.layouts import LAYOUTS, Layout
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny

FAMILIES = {family.name: family for family in all_families()}
PROMPT = list(range(3, 40))
EXPERTS = "model.layers.*.mlp.experts.*"
RULES = {
    EXPERTS: "int4",
    "model.layers.0.mlp.experts.{1,3}.*": "fp8",
    "model.layers.1.mlp.experts.2.*": "int8",
    "model.layers.0.mlp.experts.3.down_proj.weight": "base",
    "model.layers.*.self_attn.{q,o}_proj.weight": "int8",
    "model.layers.*.self_attn.k_proj.weight": "int4",
}
OPTIONS = {"fp8": QuantizeOptions(), "int8": QuantizeOptions(), "int4": QuantizeOptions(group_size=32)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture and a dense model, each wide and in three formats."""
    folder = tmp_path_factory.mktemp("sources")
    for kind, family in (("moe", "qwen3_moe"), ("dense", "llama")):
        save_tiny(FAMILIES[family], folder / kind / "base", torch.bfloat16)
        for name, options in OPTIONS.items():
            quantize_checkpoint(str(folder / kind / "base"), folder / kind / name, name, options)
    return folder


def plan_of(folder: Path, rules: Mapping[str, str], **inference: Any) -> Settings:
    mixed: dict[str, Any] = {f"{name}_path": str(folder / name) for name in OPTIONS}
    return Settings.model_validate(
        {
            "model": {"base_path": str(folder / "base"), "mixed_precision": {**mixed, "weight_mapping": rules}},
            "inference": {"dtype": "float32", **inference},
        }
    )


def values_of(settings: Settings) -> dict[str, torch.Tensor]:
    model = open_plan(settings)
    return {weight.choice.name: weight.unprepared().dequantize(torch.float32) for weight in model.planned}


def opened(folder: Path) -> ModelLoader:
    return open_plan(Settings.model_validate({"model": {"base_path": str(folder)}})).loader


def formats_of(folder: Path) -> dict[str, str]:
    return {weight.choice.name: weight.stored.format.name for weight in opened(folder).plan()}


def logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and transformers', float32."""
    from transformers import AutoModelForCausalLM

    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kinds).eval()
    for parameter in model.parameters():  # experts without scales keep the type that they are stored in
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.float()
    with torch.inference_mode():
        theirs = model(torch.tensor([PROMPT])).logits[0].float()
    return Runner(*load_model(folder)).step({0: PROMPT})[0], theirs


def test_every_expert_keeps_its_bytes(sources: Path, tmp_path: Path) -> None:
    settings = plan_of(sources / "moe", RULES)
    report = export_model(settings, "hf", tmp_path / "out", ExportOptions(share="none"), is_strict=True)
    assert report.is_written and not report.changes and report.notes
    found = {weight.choice.name: weight for weight in opened(tmp_path / "out").plan()}
    for weight in open_plan(settings).planned:
        other = found[weight.choice.name]
        assert other.stored.format.name == weight.stored.format.name
        for role, part in weight.stored.parts.items():
            was, now = weight.source.read(part), other.source.read(other.stored.parts[role])
            assert was.dtype == now.dtype and torch.equal(was.float(), now.float()), (weight.choice.name, role)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert (tmp_path / "out/generation_config.json").is_file()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_transformers_gives_the_same_logits(kind: str, sources: Path, tmp_path: Path) -> None:
    rules = (
        RULES
        if kind == "moe"
        else {
            "model.layers.*.self_attn.{q,k}_proj.weight": "int8",
            "model.layers.*.self_attn.v_proj.weight": "int4",
            "model.layers.0.mlp.*": "fp8",
            "model.layers.1.mlp.*": "int4",
        }
    )
    report = export_model(plan_of(sources / kind, rules), "hf", tmp_path / "out")
    assert bool(report.changes) == (kind == "moe")
    ours, theirs = logits(tmp_path / "out")
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({EXPERTS: "int8", "model.layers.0.mlp.experts.1.*": "int4"}, {"int8-packed"}),
        ({EXPERTS: "fp8", "model.layers.1.mlp.experts.*": "base"}, {"fp8", "bf16"}),
    ],
)
def test_transformers_takes_quantized_experts(
    rules: dict[str, str], expected: set[str], sources: Path, tmp_path: Path
) -> None:
    first = {**rules, "model.layers.*.self_attn.*_proj.weight": "fp8"}
    export_model(plan_of(sources / "moe", first), "hf", tmp_path / "out")
    assert {kind for name, kind in formats_of(tmp_path / "out").items() if ".experts." in name} == expected
    ours, theirs = logits(tmp_path / "out")
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize(("share", "expected"), [("widest", ["bf16", "int8-packed"]), ("narrowest", ["int4", "int4"])])
def test_vllm_gets_one_format_for_what_it_fuses(share: Any, expected: list[str], sources: Path, tmp_path: Path) -> None:
    settings = plan_of(sources / "moe", RULES)
    report = export_model(settings, "vllm", tmp_path / "out", ExportOptions(share))
    formats = formats_of(tmp_path / "out")
    for layer, name in enumerate(expected):
        experts = {kind for weight, kind in formats.items() if f"layers.{layer}.mlp.experts" in weight}
        assert experts == {name}
        assert len({formats[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv"}) == 1
    moved = [change for change in report.changes if "experts" in change.name and not change.is_exact]
    assert moved and all(change.bytes_after != change.bytes_before for change in moved)
    written = values_of(Settings.model_validate({"model": {"base_path": str(tmp_path / "out")}}))
    source = "base" if share == "widest" else "int4"
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert torch.equal(written[name], values_of(plan_of(sources / "moe", {EXPERTS: source}))[name])


def test_vllm_is_told_of_activations_where_it_needs_them(sources: Path, tmp_path: Path) -> None:
    settings = plan_of(sources / "moe", {EXPERTS: "fp8", "model.layers.*.self_attn.*_proj.weight": "int8"})
    for folder, options in (("needed", ExportOptions()), ("all", ExportOptions(activations="dynamic"))):
        report = export_model(settings, "vllm", tmp_path / folder, options)
        groups = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]["config_groups"]
        inputs = {group["format"]: group["input_activations"] for group in groups.values()}
        assert inputs["float-quantized"] == {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True,
        }  # fmt: skip
        assert report.notes
        if folder == "all":
            assert inputs["int-quantized"]["type"] == "int"
        else:
            assert inputs["pack-quantized"] is None


def test_modelopt_names_an_algorithm_for_each_layer(sources: Path, tmp_path: Path) -> None:
    settings = plan_of(sources / "moe", RULES)
    export_model(settings, "modelopt", tmp_path / "out", ExportOptions("narrowest"))
    said = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["quant_algo"] == config["quant_algo"] == "MIXED_PRECISION" and config["quant_method"] == "modelopt"
    assert said["quantized_layers"] == config["quantized_layers"]
    formats = formats_of(tmp_path / "out")
    algorithms = {"modelopt-int4": "W4A16_AWQ", "int8": "W8A16"}
    for name, kind in formats.items():
        layer = said["quantized_layers"].get(name.removesuffix(".weight"))
        assert (layer and layer["quant_algo"]) == algorithms.get(kind), name
    assert set(algorithms) <= set(formats.values())


@pytest.mark.parametrize("source", list(OPTIONS))
def test_modelopt_keeps_values(source: str, sources: Path, tmp_path: Path) -> None:
    settings = plan_of(sources / "moe", {EXPERTS: source})
    report = export_model(settings, "modelopt", tmp_path / "out", is_strict=True)
    assert all(change.is_exact for change in report.changes)
    written = values_of(Settings.model_validate({"model": {"base_path": str(tmp_path / "out")}}))
    assert all(torch.equal(value, written[name]) for name, value in values_of(settings).items())
    assert "exclude_modules" in json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]


def test_what_an_engine_has_no_form_for_is_taken_from_where_it_is_wide(sources: Path, tmp_path: Path) -> None:
    base, blocks = sources / "moe/base", tmp_path / "blocks"
    quantize_checkpoint(str(base), blocks, "fp8", QuantizeOptions(scale="block"))
    mixed = {"fp8_path": str(blocks), "weight_mapping": {EXPERTS: "fp8"}}
    settings = Settings.model_validate({"model": {"base_path": str(base), "mixed_precision": mixed}})
    report = export_model(settings, "hf", tmp_path / "out")
    assert all(".experts." in change.name and not change.is_exact for change in report.changes)
    assert set(formats_of(tmp_path / "out").values()) == {"bf16"}
    written = values_of(Settings.model_validate({"model": {"base_path": str(tmp_path / "out")}}))
    wide = values_of(Settings.model_validate({"model": {"base_path": str(base)}}))
    assert report.changes and all(torch.equal(value, written[name]) for name, value in wide.items())


def test_what_is_quantized_while_loading_is_written_so(sources: Path, tmp_path: Path) -> None:
    settings = plan_of(sources / "dense", {}, load_in_4bit=True)
    export_model(settings, "hf", tmp_path / "out")
    written = values_of(Settings.model_validate({"model": {"base_path": str(tmp_path / "out")}}))
    assert all(torch.equal(value, written[name]) for name, value in values_of(settings).items())
    assert formats_of(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"] == "int4"


_WITH_FORMS = {
    name: layout
    for name, layout in LAYOUTS.items()
    if layout.quantization.get("quant_method") in ("gptq", "awq", "compressed-tensors", "modelopt")
}


@pytest.mark.parametrize("name", list(_WITH_FORMS))
def test_a_form_holds_the_same_values_as_the_layout_that_it_is_read_of(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    layout = _WITH_FORMS[name]
    stored, source = stored_of(layout, tmp_path / "in")
    form = stored_form(stored)
    if form is None:
        pytest.skip("it has none")
    packed = source.load(stored)
    num_compared = 0
    for index, same in enumerate(exact_forms(form, stored.shape)):
        try:
            tensors = compressed_tensors("w", converted("w", packed, same, is_same=True), same)
        except UnsupportedError:  # a zero point beyond the bits, which only some weights have
            continue
        scheme = scheme_of(same)
        group = {"targets": ["Linear"], "weights": dict(scheme.arguments), "format": scheme.layout}
        declared = {"quant_method": "compressed-tensors", "format": scheme.layout, "config_groups": {"g": group}}
        other, reader = stored_in(
            {f"m.{role}": tensor for role, tensor in tensors.items()}, declared, tmp_path / str(index)
        )
        assert stored_form(other) == same
        is_alike = torch.equal if name != "modelopt-nvfp4" else torch.allclose  # its factor turns into a divisor
        assert is_alike(reader.load(other).dequantize(torch.float32), packed.dequantize(torch.float32)), same
        num_compared += 1
    assert num_compared


def stored_of(layout: Layout, folder: Path) -> tuple[Any, Source]:
    return stored_in(
        {f"m.{role}": tensor for role, tensor in layout.make(32, 128).items()}, layout.quantization, folder
    )


def stored_in(tensors: dict[str, torch.Tensor], declared: dict[str, Any], folder: Path) -> tuple[Any, Source]:
    write_checkpoint(folder, tensors.items())
    (folder / "config.json").write_text(json.dumps({"quantization_config": declared} if declared else {}))
    source = Source.open("s", str(folder))
    return source.weights["m.weight"], source


@pytest.mark.parametrize("count", [1, 3, 7, 24])
def test_targets_match_their_modules_and_no_others(count: int) -> None:
    known = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
        for layer in range(4)
        for expert in range(12)
        for part in ("up", "down")
    }
    known |= {"lm_head", *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(12))}
    generator = torch.Generator().manual_seed(count)
    names = sorted(known)
    wanted = {names[index] for index in torch.randperm(len(names), generator=generator)[:count].tolist()}
    wanted |= {name for name in names if ".layers.1." in name}
    found = set()
    for target in targets_of(wanted, known):
        regex = target.removeprefix("re:") if target.startswith("re:") else re.escape(target) + "$"
        matches = {name for name in known if re.match(regex, name)}
        assert matches
        found |= matches
    assert found == wanted
    assert len(targets_of(known, known)) == 4


def test_what_cannot_be_is_refused_before_anything_is_written(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = plan_of(sources / "moe", RULES)
    out = tmp_path / "out"
    with raises(UnsupportedError, "bf16"):
        export_model(settings, "hf", out, is_strict=True)
    with raises(UnsupportedError, "gguf2"):
        export_model(settings, "gguf2", out)
    with raises(ConfigError, "none"):
        export_model(settings, "vllm", out, ExportOptions(share="none"))
    with raises(ConfigError, "--activations"):
        export_model(settings, "hf", out, ExportOptions(activations="dynamic"))
    report = export_model(settings, "hf", out, is_dry=True)
    assert not report.is_written and report.changes and not out.exists()
    written = export_model(settings, "hf", out)
    assert written.changes == report.changes and abs(written.nbytes - report.nbytes) < 64 * 1024
    with raises(CheckpointError, out):
        export_model(settings, "hf", out)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with raises(CheckpointError, "1000"):
        export_model(settings, "hf", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_experts_that_are_published_in_one_tensor_stay_there(family: str, tmp_path: Path) -> None:
    save_tiny(FAMILIES[family], tmp_path / "base", torch.bfloat16)
    settings = Settings.model_validate({"model": {"base_path": str(tmp_path / "base")}})
    export_model(settings, "vllm", tmp_path / "out")
    names = [set(Source.open("s", str(tmp_path / folder)).store) for folder in ("base", "out")]
    assert names[0] == names[1]
    with raises(UnsupportedError, family):
        export_model(settings.replace(inference={"load_in_4bit": True}), "vllm", tmp_path / "other")


def test_an_interrupted_export_goes_on(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 150_000)
    settings = plan_of(sources / "moe", RULES)

    def stop(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(settings, "hf", tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    with raises(ConflictError):
        export_model(settings, "vllm", tmp_path / "out")
    begun: list[int] = []
    export_model(settings, "hf", tmp_path / "out", progress=lambda what, done, total: begun.append(done))
    whole = export_model(settings, "hf", tmp_path / "whole")
    assert begun[0] > whole.nbytes // 4
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_commands_of_the_page(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(r"^    amalgam (export .*)$", (ROOT / "docs/scaling.md").read_text(), re.MULTILINE)
    assert len(lines) == 5
    model = f"--model {sources / 'dense/base'} --source int8={sources / 'dense/int8'} --map model.layers.0.mlp.*=int8"
    for line in lines:
        words = line.replace("/tmp/", f"{tmp_path}/").replace("--config config/model_config.yaml", model).split()
        assert main(words) == 0
        assert words[1] in capsys.readouterr().out


def test_the_verb(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(tmp_path / "out"), "--to", "vllm", "--model", str(sources / "moe/base")]
    for name in OPTIONS:
        words += ["--source", f"{name}={sources / 'moe' / name}"]
    words += ["--map", f"{EXPERTS}=int4", "--map", "model.layers.0.mlp.experts.1.*=int8"]
    assert main([*words, "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["is_written"] and report["changes"][0]["after"]
    assert main([*words, "--text", str(tmp_path / "nowhere.txt")]) == ConfigError.exit_code
    assert not (tmp_path / "out").exists()
    assert main([*words, "--share", "best"]) == ConfigError.exit_code
    assert main([*words, "--window", "64"]) == ConfigError.exit_code
    assert main(words) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
