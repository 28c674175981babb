"""The walk through `docs/extending.md`: both files as they stand, found and used."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import pytest
import torch

from amalgam.checkpoint.writer import write_checkpoint
from amalgam.models import spec
from amalgam.models.families import llama
from amalgam.precision import format as formats
from amalgam.precision import source
from tests.conftest import ROOT
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny


@pytest.fixture
def extension() -> dict[str, types.ModuleType]:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    modules = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        name = re.match(r"# (\w+)\.py", block)[1]  # type: ignore[index]
        modules[name] = types.ModuleType(name)
        exec(compile(block, name, "exec"), modules[name].__dict__)  # noqa: S102 - our own documentation
    return modules


class EntryPoint:
    def __init__(self, value: object) -> None:
        self.load = lambda: value


@pytest.fixture
def installed(extension: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "amalgam.formats": [EntryPoint(extension["halves"].FORMAT)],
        "amalgam.families": [EntryPoint(extension["tiny_llama"].FAMILY)],
    }
    caches = (formats.all_formats, spec.all_families, source._companions, source.fitting)
    for module in (formats, spec):
        monkeypatch.setattr(module, "entry_points", lambda group: found[group])
    for cached in caches:
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("installed")
def test_a_model_of_the_new_family_with_a_weight_of_the_new_format(tmp_path: Path) -> None:
    save_tiny(llama.FAMILY, tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    config = {**json.loads(path.read_text()), "architectures": ["TinyLlamaForCausalLM"]}
    path.write_text(json.dumps(config))
    decoder, version = load_model(tmp_path / "llama")
    assert decoder.spec.family == "tiny_llama"
    assert Runner(decoder, version).step({0: [3, 4, 5]})[0].shape == (3, 256)

    high = torch.randint(-8, 8, (6, 4), dtype=torch.int8)
    low = torch.randint(-8, 8, (6, 4), dtype=torch.int8)
    write_checkpoint(tmp_path / "halves", [("x.weight_high", high), ("x.weight_low", low)])
    opened = source.Source.open("halves", str(tmp_path / "halves"))
    packed = opened.load(opened.weights["x.weight"])
    assert torch.equal(packed.dequantize(), high.float() + low.float() / 16)
