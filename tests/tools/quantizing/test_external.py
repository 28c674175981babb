"""What another tool has made is checked before it counts; a stand-in for the tool gives what a test wants."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from amalgam.composition.quantizing.recipe import CalibrationTexts
from amalgam.errors import CheckpointError, ConfigError, UnavailableError
from amalgam.formats.grid import QuantizeOptions
from amalgam.tools.quantizing import external
from amalgam.tools.quantizing.environment import Environment
from amalgam.tools.quantizing.external import TOOLS, ExternalRecipe, quantize_with
from tests.errors import is_named, raises
from tests.planning.conftest import small

__all__ = ["small"]

COMPRESSOR = TOOLS["llm-compressor"]
ROUNDED = ExternalRecipe("int4", QuantizeOptions(32), "round")
UP, NORM = "model.layers.0.mlp.experts.3.up_proj", "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
STAND_IN = """
import json, pathlib, shutil, sys
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
print(json.dumps({"what": "layers", "done": 1, "total": 2}), flush=True)
print("not for us", file=sys.stderr)
shutil.copytree(GIVEN, job["out"])
"""

Tensors = dict[str, torch.Tensor]


def here() -> Environment:
    return Environment(Path(sys.executable), "0.1")


def nowhere() -> Environment:
    raise AssertionError("nothing is installed for what cannot be done")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets a script be what runs in the tool's environment."""

    def use(script: str) -> None:
        file = tmp_path / "stand_in.py"
        file.write_text(script)
        monkeypatch.setattr(external, "worker", SimpleNamespace(__file__=str(file)))

    return use


def changed(folder: Path, made: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(folder, made)
    (file,) = made.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return made


def test_a_result_that_fits_becomes_a_checkpoint(small: Path, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    def change(tensors: Tensors) -> None:
        tensors[NORM].mul_(2)
        tensors[EMBEDDING] = tensors[EMBEDDING].float()  # saved wider than it was

    given = changed(small / "int4", tmp_path / "given", change)
    (given / "config.json").write_text(
        json.dumps({"quantization_config": json.loads((given / "config.json").read_text())["quantization_config"]})
    )
    (given / "tokenizer.json").write_text("another one")
    stand_in(STAND_IN.replace("GIVEN", repr(str(given))))
    told: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    report = quantize_with(COMPRESSOR, here, str(small / "base"), out, ROUNDED, lambda *step: told.append(step))
    assert ("llm-compressor: layers", 1, 2) in told and told[-1][0] == "Checking" and told[-1][1] == told[-1][2]
    assert report.tool == "llm-compressor 0.1" and report.moved == [NORM]
    embedding = load_file(out / "model.safetensors")[EMBEDDING]
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding, load_file(small / "base" / "model.safetensors")[EMBEDDING])
    expert = report.roles["expert"]
    assert expert.num_weights == 96 and 0 < expert.error < 0.2
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == json.loads((given / "config.json").read_text())["quantization_config"]
    assert config == json.loads((small / "base" / "config.json").read_text())
    assert (out / "tokenizer.json").read_bytes() == (small / "base" / "tokenizer.json").read_bytes()
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in (small / "int4").iterdir())


def left_wide(tensors: Tensors) -> None:
    for suffix in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{UP}.{suffix}"]
    tensors[f"{UP}.weight"] = torch.zeros(128, 256, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "recipe", "named"),
    [
        (left_wide, ROUNDED, (f"{UP}.weight",)),
        (lambda tensors: tensors.pop(NORM), ROUNDED, (NORM,)),
        (lambda tensors: tensors[f"{UP}.weight_scale"].fill_(torch.nan), ROUNDED, (f"{UP}.weight",)),
        (lambda tensors: tensors[NORM].fill_(torch.nan), ROUNDED, (NORM, "NaN")),
        (lambda tensors: None, ExternalRecipe("int4", QuantizeOptions(64), "round"), ("64",)),
        (lambda tensors: None, ExternalRecipe("int3", QuantizeOptions(32), "round"), (4, 3)),
    ],
)
def test_a_result_that_does_not_fit_is_refused(
    change: Callable[[Tensors], object],
    recipe: ExternalRecipe,
    named: tuple[object, ...],
    small: Path,
    tmp_path: Path,
    stand_in: Callable[[str], None],
) -> None:
    given = changed(small / "int4", tmp_path / "given", change)
    stand_in(STAND_IN.replace("GIVEN", repr(str(given))))
    with raises(CheckpointError, *named):
        quantize_with(COMPRESSOR, here, str(small / "base"), tmp_path / "out", recipe)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out.partial"))


def test_a_tool_that_saves_nothing_or_declares_nothing_is_refused(
    small: Path, tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    for script in ("", STAND_IN.replace("GIVEN", repr(str(small / "base")))):
        stand_in(script)
        with raises(CheckpointError, "llm-compressor"):
            quantize_with(COMPRESSOR, here, str(small / "base"), tmp_path / "out", ROUNDED)


def test_a_tool_that_fails_says_why(small: Path, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    stand_in("raise RuntimeError('model type demo is unknown')")
    with raises(UnavailableError, "llm-compressor", "RuntimeError: model type demo is unknown"):
        quantize_with(COMPRESSOR, here, str(small / "base"), tmp_path / "out", ROUNDED)
    stand_in("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with raises(UnavailableError, "signal 9"):
        quantize_with(COMPRESSOR, here, str(small / "base"), tmp_path / "out", ROUNDED)
    assert not list(tmp_path.glob(".out.partial"))


def test_what_a_tool_has_forked_is_not_waited_for(small: Path, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    stand_in("import os, sys, time\nif os.fork() == 0:\n    time.sleep(3600)\nsys.exit('out of memory')")
    with raises(UnavailableError, "out of memory"):
        quantize_with(COMPRESSOR, here, str(small / "base"), tmp_path / "out", ROUNDED)


def test_a_tool_that_does_not_end_hides_no_error(
    small: Path,
    tmp_path: Path,
    stand_in: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As while the kernel waits for a device: it is killed, and is still there."""
    begun: list[subprocess.Popen[bytes]] = []

    class Lasting(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            begun.append(self)
            if timeout is not None:
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    stand_in(STAND_IN.replace("GIVEN", repr(str(small / "int4"))))
    monkeypatch.setattr(subprocess, "Popen", Lasting)
    with pytest.raises(KeyboardInterrupt):
        quantize_with(COMPRESSOR, here, str(small / "base"), tmp_path / "out", ROUNDED, interrupt)
    process = begun[0]
    assert process.stdin is not None and process.stdin.closed
    assert process.stdout is not None and process.stdout.closed
    assert is_named(str(process.pid), caplog.text)


def test_of_what_a_tool_says_the_end_is_read(small: Path, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    """However much it is: the file has a hole here."""
    stand_in("import os, sys; os.ftruncate(2, 2**40); os.lseek(2, 0, 2); sys.exit('no room left')")
    with raises(UnavailableError, "no room left"):
        quantize_with(COMPRESSOR, here, str(small / "base"), tmp_path / "out", ROUNDED)


def test_a_tool_is_given_no_code(small: Path, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    """Not each of its parts passes on that none may be run. All else is there, in one file or several."""
    base = shutil.copytree(small / "base", tmp_path / "base")
    (base / "evil.py").write_text("class Evil: pass")
    for name in ("config.json", "tokenizer_config.json"):
        found = json.loads((base / name).read_text()) if (base / name).exists() else {}
        (base / name).write_text(json.dumps(found | {"auto_map": {"AutoConfig": "evil.Evil"}}))
    tensors = load_file(base / "model.safetensors")
    check = f"""
import json, pathlib, sys
from safetensors.torch import load_file
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
model, base = pathlib.Path(job["model"]), pathlib.Path({str(base)!r})
assert not list(model.rglob("*.py"))
for file in model.glob("*.json"):
    assert "auto_map" not in file.read_text(), file
assert json.loads((model / "config.json").read_text())["hidden_size"]
assert (model / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
index = model / "model.safetensors.index.json"
parts = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {{"model.safetensors"}}
sys.exit(f"{{len(parts)}} files, {{sum(len(load_file(model / part)) for part in parts)}} tensors")
"""
    stand_in(check)
    with raises(UnavailableError, f"1 files, {len(tensors)} tensors"):
        quantize_with(COMPRESSOR, here, str(base), tmp_path / "out", ROUNDED)
    names = list(tensors)
    (base / "model.safetensors").unlink()
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for part in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == part}, base / part, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with raises(UnavailableError, f"2 files, {len(tensors)} tensors"):
        quantize_with(COMPRESSOR, here, str(base), tmp_path / "out", ROUNDED)


def test_what_is_left_of_a_killed_run_is_no_hindrance(
    small: Path, tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    left = tmp_path / ".out.partial" / ".made"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    stand_in(STAND_IN.replace("GIVEN", repr(str(small / "int4"))))
    quantize_with(COMPRESSOR, here, str(small / "base"), tmp_path / "out", ROUNDED)
    assert (tmp_path / "out" / "config.json").is_file() and not left.exists()


TEXTS = CalibrationTexts((Path("nowhere.json"),))


@pytest.mark.parametrize(
    ("tool", "recipe", "named"),
    [
        ("auto-round", ExternalRecipe("int4", method="gptq", texts=TEXTS), ("'gptq'", "signround")),
        ("auto-round", ExternalRecipe("fp8", method="round"), ("'fp8'", "int4")),
        ("auto-round", ExternalRecipe("int4"), ("'signround'", "--calibrate")),
        ("llm-compressor", ExternalRecipe("int4", method="round", texts=TEXTS), ("'round'",)),
        ("llm-compressor", ExternalRecipe("int4", method="round", activations="dynamic"), ("'dynamic'", "int4")),
        ("llm-compressor", ExternalRecipe("int8", method="round", activations="none"), ("'none'", "dynamic")),
        ("llm-compressor", ExternalRecipe("int8", method="round", activations="static"), ("'static'", "--calibrate")),
        ("llm-compressor", ExternalRecipe("int4", method="awq", texts=TEXTS), ("nowhere.json",)),
        ("gptqmodel", ExternalRecipe("int4"), ("'gptq'", "--calibrate")),
    ],
)
def test_what_a_tool_cannot_do_is_said(
    tool: str, recipe: ExternalRecipe, named: tuple[str, ...], small: Path, tmp_path: Path
) -> None:
    with raises(ConfigError, *named):
        quantize_with(TOOLS[tool], nowhere, str(small / "base"), tmp_path / "out", recipe)


def test_one_group_size_has_to_fit_all_weights(small: Path, tmp_path: Path) -> None:
    base = shutil.copytree(small / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 96}))
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = (tensor[:, :96] if "down" in name else tensor[:96]).contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with raises(ConfigError, 128, "--group-size 32"):
        quantize_with(COMPRESSOR, nowhere, str(base), tmp_path / "out", ExternalRecipe("int4", method="round"))


def test_nothing_is_installed_for_a_folder_that_is_there(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises(CheckpointError, tmp_path):
        quantize_with(COMPRESSOR, nowhere, str(small / "base"), tmp_path, ROUNDED)
