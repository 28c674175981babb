"""`amalgam prune`, and what becomes of its folders: served, mixed, changed live, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.errors import is_named, raises
from tests.planning.conftest import small, texts

from amalgam import LLM, SamplingParams
from amalgam.cli import main
from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.composition.wide import WideModel
from amalgam.config.inference import InferenceSettings
from amalgam.config.settings import build_settings
from amalgam.errors import CheckpointError, ConfigError, UnsupportedError
from amalgam.evaluation.running import open_contestant
from amalgam.evaluation.texts import Window
from amalgam.experts.history import Tally
from amalgam.experts.saved.files import save
from amalgam.experts.saved.sets import SavedSet
from amalgam.pruning.cut import Cut
from amalgam.pruning.pruned import Pruned
from amalgam.pruning.trial import on_trial
from amalgam.tools.analyze import analyze_checkpoint
from amalgam.tools.export.exporting import export_model
from amalgam.tools.pruning.copies import rounded

__all__ = ["small"]

DEMO = Path(__file__).parents[2] / "models" / "demo"
TEXT = DEMO.parents[1] / "docs" / "text.md"
SMALL = ("--text", str(TEXT), "--tokens", "1024", "--window", "64")


def run(capsys: pytest.CaptureFixture[str], *arguments: object, model: Path = DEMO) -> tuple[int, str, str]:
    code = main(["prune", "--model", str(model), *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def saved_set(counts: list[int]) -> SavedSet:
    """Statistics in which every layer has used its experts so."""
    grid = np.zeros((2, 6, 16), np.int64)
    grid[0] = counts
    tokens = np.array([sum(counts) // 4, 0])
    tally = Tally(grid, grid * 0.25, tokens, np.array(1))
    return SavedSet("demo", tuple(range(6)), 16, 4, 0.0, 1.0, tally, np.zeros((6, 16)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with 11 to 16 experts in a layer, and a copy of that in int4."""
    path = tmp_path_factory.mktemp("pruned")
    asked = ("--experts", "25%", "--by", "gate-mass", "--per-layer", "--no-compare", *SMALL)
    assert main(["prune", "--model", str(DEMO), *asked, "--out", str(path / "own")]) == 0
    quantize_checkpoint(str(path / "own"), path / "int4", "int4")
    return path


def settings_of(folder: Path, **mixed: Any) -> Any:
    return build_settings({"model": {"base_path": str(folder), "mixed_precision": mixed}})


def test_a_pruned_model_is_served_mixed_and_changed_live(folder: Path) -> None:
    counts = analyze_checkpoint(str(folder / "own")).experts_per_layer
    assert len(counts) > 1 and sum(count * layers for count, layers in counts.items()) == 72
    config = {
        "model": {"base_path": str(folder / "own"), "mixed_precision": {"int4_path": str(folder / "int4")}},
        "inference": {"max_seq_length": 64},
    }
    (folder / "own.yaml").write_text(json.dumps(config))
    with LLM(folder / "own.yaml") as llm:
        params = SamplingParams(max_new_tokens=6, do_sample=False)
        assert llm.generate("def main(", params)[0].token_ids
        change = llm.update_weight_mapping({"model.layers.*.mlp.experts.{0,1,2}.*": "int4"})
        assert len(change.changed) == 54
        assert llm.generate("def main(", params)[0].token_ids
        stats = llm.expert_stats(top_k=3)
    rows = stats["layer_stats"]
    assert sorted(row["num_experts"] for row in rows) == sorted(counts.elements())
    assert stats["summary"]["total_experts"] == len(stats["expert_stats"]) == 72
    assert all(row["num_used_experts"] + row["num_dead_experts"] == row["num_experts"] for row in rows)


def test_engines_that_take_one_number_of_experts_are_told(folder: Path, tmp_path: Path) -> None:
    for target in ("vllm", "gguf", "hf"):
        with raises(UnsupportedError, target, "per_layer_config", "--per-layer"):
            export_model(settings_of(folder / "own"), target, tmp_path / target)


def test_statistics_choose(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    counts = [100, 0, 30, 40] * 4
    save(saved_set(counts), tmp_path / "set.npz")
    given = ("--experts", "4", "--no-compare", "--use", tmp_path / "set.npz")
    code, printed, err = run(capsys, *given, "--by", "use", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    cut = json.loads(printed)["cuts"][0]
    remaining = [n for n in range(16) if counts[n]]
    assert cut["record"]["experts"]["3"] == [[n] for n in remaining] and cut["is_uniform"]
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["experts"] == cut["record"]["experts"] and record["statistics"] == str(tmp_path / "set.npz")
    code, _, err = run(capsys, *given, "--by", "reap", "--out", tmp_path / "other")
    assert code == ConfigError.exit_code and is_named("--use", err)
    assert not export_model(settings_of(tmp_path / "out"), "vllm", tmp_path / "vllm", is_dry=True).is_written


def test_cuts_are_compared_with_plans_of_the_same_bytes(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path
) -> None:
    text = tmp_path / "mixed.json"
    text.write_text(json.dumps(texts(32)))
    places = ("--copies", tmp_path / "copies", "--cache", tmp_path / "cache", "--curve", tmp_path / "curve.html")
    asked = ("--experts", "25%", "--by", "random", "--precisions", "int8", "--bits", "9", "--text", text)
    code, printed, err = run(capsys, *asked, *places, "--out", tmp_path / "out", "--json", model=small / "base")
    assert code == 0, err
    report = json.loads(printed)
    wide, narrow = report["points"]
    assert wide["target"] is None and narrow["target"] == 9.0 and narrow["nbytes"] < wide["nbytes"]
    for point in report["points"]:
        assert point["plan_bytes"] <= point["nbytes"] * 1.001
        assert point["divergence"]["all"]["value"] > point["plan_divergence"]["all"]["value"]
        assert point["winners"]["all"] == "plan" and not point["is_worth_it"]
    (advice,) = report["advice"]
    assert is_named("not recommended", advice)
    assert report["cuts"][0]["nbytes"][1] == wide["nbytes"]
    assert "plotly" in (tmp_path / "curve.html").read_text()


def test_what_is_tried_in_memory_is_what_is_written(folder: Path) -> None:
    model = WideModel.open(str(DEMO))
    record = json.loads((folder / "own" / "pruning.json").read_text())
    groups = {int(layer): tuple(tuple(group) for group in found) for layer, found in record["experts"].items()}
    pruned = Pruned.of(model.source.config, "", model.spec, Cut(tuple(range(6)), groups))
    windows = [Window("text", 0, tuple(range(100, 164)), 64.0)]
    loader = ModelLoader(settings_of(DEMO).model, InferenceSettings(), torch.device("cpu"), 1)
    base = open_contestant("base", loader, loader.plan(()), torch.float32, 64)
    tried = on_trial("cut", base, loader.plan(()), pruned, lambda slot: model.load(slot).dense, rounded)
    own = ModelLoader(settings_of(folder / "own").model, InferenceSettings(), torch.device("cpu"), 1)
    written = open_contestant("own", own, own.plan(()), torch.float32, 64)
    found = [next(iter(each.hidden(windows)))[1] for each in (tried, written)]
    assert torch.equal(*found)


OUT = "OUT"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--experts"),
        (("--experts", "1", "--layers", "1"), "--layers"),
        (("--experts", "1", "--by", "wanda", *SMALL), "wanda"),
        (("--experts", "1", "--out", OUT), "--text"),
        (("--experts", "13", *SMALL, "--no-compare", "--out", OUT), "3"),
        (("--experts", "120%", *SMALL), "120%"),
        (("--layers", "6", *SMALL, "--no-compare", "--out", OUT), "6"),
        (("--layers", "1", "--merge", *SMALL, "--out", OUT), "--merge"),
        (("--weights", "2:5", *SMALL, "--no-compare", "--out", OUT), "2:5"),
        (("--experts", "1", *SMALL, "--no-compare"), "--out"),
        (("--experts", "1", "--experts", "2", *SMALL, "--out", OUT), "2"),
        (("--experts", "1", "--text", "/nowhere.txt", "--out", OUT), "/nowhere.txt"),
        (("--experts", "1", *SMALL, "--precisions", "int5"), "int5"),
        (("--experts", "1", *SMALL, "--bits", "x"), "--bits"),
        (("--experts", "1", *SMALL, "--heldout", "/nowhere.txt", "--out", OUT), "/nowhere.txt"),
        (("--experts", "1%", *SMALL, "--no-compare", "--out", OUT), "1%"),
        (("--experts", "1", *SMALL, "--seed", "3"), "--seed"),
        (("--channels", "25%", "--by", "magnitude", *SMALL, "--no-compare", "--out", OUT), "--text"),
        (("--experts", "1", *SMALL, "--source", "other=/nowhere"), "Sources"),
    ],
)
def test_what_cannot_be_asked(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    placed = [str(tmp_path / "out") if each == OUT else each for each in arguments]
    code, _, err = run(capsys, *placed)
    assert code not in (0, 1) and is_named(named, err), err
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_of_another_model_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"another": 8192}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = ("--experts", "4", *SMALL, "--no-compare", "--out", tmp_path / "out")
    code, _, err = run(capsys, *arguments, model=tmp_path / "model")
    assert code == CheckpointError.exit_code and not (tmp_path / "out").exists(), err
