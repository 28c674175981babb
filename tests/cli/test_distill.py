"""`amalgam distill` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from tests.conftest import DEMO
from tests.errors import raises
from tests.models.tiny import save_tiny

from amalgam.cli import main
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.settings import Settings, build_settings
from amalgam.errors import ConflictError
from amalgam.formats.grid import QuantizeOptions
from amalgam.models.registry import all_families
from amalgam.tools.distill import DistillOptions, distill
from amalgam.tools.distill_texts import TextsToLearn
from amalgam.training.trainer import Look, TrainingOptions

SHORT = (
    *("--window", "32", "--steps", "2", "--batch-tokens", "64", "--part-tokens", "64", "--eval-every", "1"),
    *("--lr", "1e-4", "--inference.dtype", "float32"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "sea.jsonl"
    lines = [{"text": f"{number} ships went out to sea, and the wind was cold."} for number in range(20)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


@pytest.fixture(scope="module")
def pupil(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A student of one narrow layer that has learned for two steps."""
    folder = tmp_path_factory.mktemp("students") / "pupil"
    arguments = ("--teacher", str(DEMO), "--width", "0.25", "--layers", "1", "--alpha", "0.9", "--temperature", "2")
    assert main(["distill", str(folder), *arguments, "--text", str(text), *SHORT]) == 0
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["distill", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}


def test_a_plan_is_healed_in_the_layouts_it_came_in(
    capsys: pytest.CaptureFixture[str], pupil: Path, text: Path, tmp_path: Path
) -> None:
    out, curve, narrow = tmp_path / "healed", tmp_path / "curve.html", tmp_path / "int3"
    quantize_checkpoint(str(pupil), narrow, "int3", QuantizeOptions(32))
    plan = ("--model", str(pupil), "--source", f"int3={narrow}", "--map", "model.layers.*.mlp.*=int3")
    arguments = (str(out), *plan, "--text", str(text), *SHORT, "--curve", str(curve), "--patience", "0")
    code, printed, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    report = json.loads(printed)
    assert report["before_bytes"] == report["after_bytes"]
    assert report["trained"] == ["biases", "norms", "routers", "scales"]
    looks = report["outcome"]["looks"]
    assert [look["step"] for look in looks] == [0, 1, 2] and len(err.splitlines()) == 3
    assert report["before"]["divergence"]["value"] == pytest.approx(looks[0]["divergence"], rel=0.02)
    best = min(look["divergence"] for look in looks)
    assert report["after"]["divergence"]["value"] == pytest.approx(best, rel=0.02)
    assert report["after"]["divergence"]["value"] < report["before"]["divergence"]["value"]
    assert json.loads((out / "distillation.json").read_text())["outcome"]["curve"] == report["outcome"]["curve"]
    assert "plotly" in curve.read_text()
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json", "distillation.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    expected = {**tensors(pupil), **{name: kind for name, kind in tensors(narrow).items() if ".mlp.experts." in name}}
    assert tensors(out) == {name: kind for name, kind in expected.items() if name in tensors(out)}
    assert {name for name in tensors(out) if ".experts." in name} == {n for n in tensors(narrow) if ".experts." in n}

    code, _, err = run(capsys, *arguments)
    assert code == 3 and str(out) in err
    mixed = ("--model", str(out), "--source", f"wide={pupil}", "--map", "model.layers.0.mlp.experts.{0-7}.*=wide")
    assert main(["evaluate", *mixed, "--text", str(text), "--json"]) == 0


def test_a_student_is_a_model_like_any_other(capsys: pytest.CaptureFixture[str], pupil: Path, text: Path) -> None:
    config = json.loads((pupil / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (64, 1, 2)
    assert main(["evaluate", "--model", str(pupil), "--reference", str(pupil), "--text", str(text)]) != 0
    capsys.readouterr()
    assert main(["evaluate", "--model", str(pupil), "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["domains"]["all"]["divergence"]["value"] == 0
    assert main(["generate", "--model", str(pupil), "--max-new-tokens", "4", "The sea"]) == 0


def test_a_student_goes_on_learning_from_answers(
    capsys: pytest.CaptureFixture[str], pupil: Path, tmp_path: Path
) -> None:
    """The teacher writes them; a student that has weights goes on from those."""
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [{"prompt": f"The {number} ships", "max_new_tokens": 12} for number in range(6)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--teacher", str(DEMO), "--student", str(pupil), "--prompts", str(prompts), "--answers", str(answers))
    code, _, err = run(capsys, str(tmp_path / "out"), *arguments, *SHORT, "--alpha", "0.5")
    assert code == 0, err
    written = [json.loads(line)["prompt"] for line in answers.read_text().splitlines()]
    assert written == [line["prompt"] for line in lines]
    report = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert report["before"]["num_units"] == 1 and report["outcome"]["num_tokens"] > 0
    assert report["before"]["num_tokens"] <= 12 + 1 and report["before"]["bits_per_byte"] is None  # of the answer alone
    assert report["options"]["texts"]["answers"] == str(answers) and report["options"]["loss"]["alpha"] == 0.5
    untouched = ("--prompts", str(prompts), "--answers", str(tmp_path / "others.jsonl"))
    for refused, named, wrong in (("out", str(tmp_path / "out"), 3), ("new", "charm", 2)):
        code, _, err = run(capsys, str(tmp_path / refused), *arguments[:4], *untouched, "--train", "charm")
        assert code == wrong and named in err and not (tmp_path / "others.jsonl").exists()


def test_a_bare_folder_says_what_the_student_is(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path) -> None:
    bare, config = tmp_path / "bare", json.loads((DEMO / "config.json").read_text())
    bare.mkdir()
    config |= {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    (bare / "config.json").write_text(json.dumps(config))
    arguments = (str(tmp_path / "out"), "--teacher", str(DEMO), "--student", str(bare), "--text", str(text), *SHORT)
    code, _, err = run(capsys, *arguments, "--init", "random", "--train", "wide", "--rank", "2")
    assert code == 0, err
    assert tensors(tmp_path / "out")["model.embed_tokens.weight"] == ("BF16", (8192, 32))
    config["vocab_size"] = 4096
    (bare / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, str(tmp_path / "other"), *arguments[1:])
    assert code == 2 and "4096" in err and "8192" in err
    assert not (tmp_path / "other").exists() and not (tmp_path / ".other.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([], 2, "--teacher"),
        (["--teacher", str(DEMO)], 2, "--student"),
        (["--teacher", str(DEMO), "--width", "0.5"], 2, "--text"),
        (["--teacher", str(DEMO), "--student", str(DEMO), "--layers", "2"], 2, "--layers"),
        (["--teacher", str(DEMO), "--layers", "7", "--text", "TEXT"], 2, "7"),
        (["--model", str(DEMO), "--student", str(DEMO)], 2, "--student"),
        (["--student", str(DEMO), "--source", "other=here", "--map", "*=other"], 2, "--source"),
        (["--model", str(DEMO), "--text", "none.txt"], 2, "none.txt"),
        (["--model", str(DEMO), "--text", "TEXT", "--train", "scales"], 2, "scales"),
        (["--model", str(DEMO), "--text", "TEXT", "--train", "charm"], 2, "charm"),
        (["--model", str(DEMO), "--text", "TEXT", "--kl", "sideways"], 2, "sideways"),
        (["--model", str(DEMO), "--text", "TEXT", "--init", "zeros"], 2, "zeros"),
        (["--model", str(DEMO), "--text", "TEXT", "--init", "random"], 2, "--init"),
        (["--model", str(DEMO), "--text", "TEXT", "--alpha", "0", "--kl", "reverse"], 2, "--kl"),
        (["--model", str(DEMO), "--text", "TEXT", "--window", "10000"], 2, "10000"),
        (["--model", str(DEMO), "--answers", "EMPTY"], 2, "EMPTY"),
        (["--teacher", "plan.yaml", "--width", "0.5", "--inference.load_in_4bit", "true"], 2, "load_in_8bit"),
    ],
)
def test_what_cannot_be_learned_is_named(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, arguments: list[str], code: int, named: str
) -> None:
    files = {"TEXT": text, "EMPTY": tmp_path / "empty.jsonl", "plan.yaml": tmp_path / "plan.yaml"}
    files["plan.yaml"].write_text(f"model: {{base_path: {DEMO}}}\ninference: {{load_in_8bit: true}}\n")
    files["EMPTY"].write_text("")
    found, out, err = run(capsys, str(tmp_path / "out"), *(str(files.get(item, item)) for item in arguments))
    assert found == code and out == "" and str(files.get(named, named)) in err
    assert list(tmp_path.glob("*out*")) == []


def test_a_run_goes_on_with_what_it_was_begun_with(pupil: Path, text: Path, tmp_path: Path) -> None:
    """What the teacher computes with is a part of that; and where nothing diverges there is no share of it."""
    options = DistillOptions(
        TextsToLearn([str(text)], window=32),
        training=TrainingOptions(steps=2, batch_tokens=64, part_tokens=64, eval_every=1, save_every=1),
        kinds=frozenset({"norms"}),
    )

    class Killed(BaseException):
        pass

    def kill(look: Look) -> None:
        if look.step == 2:
            raise Killed

    def settings(**changes: str) -> Settings:
        return build_settings({"model": {"base_path": str(pupil)}, "inference": {"dtype": "float32", **changes}})

    with pytest.raises(Killed):
        distill(settings(), settings(), tmp_path / "out", options, on_look=kill)
    with raises(ConflictError, "activation", "auto", "bf16"):
        distill(settings(activation="bf16"), settings(), tmp_path / "out", options)
    report = distill(settings(), settings(), tmp_path / "out", options)
    assert report.outcome.num_resumed == 1 and report.difference is None


def test_a_weight_that_cannot_be_written_is_refused_before_anything_is_learned(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    save_tiny(next(each for each in all_families() if each.name == "granitemoe"), tmp_path / "base", vocab_size=8192)
    for file in DEMO.glob("tokenizer*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    plan = ("--model", str(tmp_path / "base"), "--text", str(text), *SHORT)
    code, out, err = run(capsys, str(tmp_path / "out"), *plan)
    assert code == 3 and out == "" and "granitemoe" in err and "step 0" not in err


def test_no_room_is_told_before_anything_is_learned(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    code, out, err = run(capsys, str(tmp_path / "out"), "--model", str(DEMO), "--text", str(text), *SHORT)
    assert code == 3 and out == "" and "1000" in err and not (tmp_path / "out").exists()
