"""The walk through `docs/extending.md`: both files as they stand, found and used."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from amalgam import LLM, SamplingParams
from amalgam.base import plugins
from amalgam.composition import recognition
from amalgam.config.reading import load_settings
from amalgam.formats import registry as formats
from amalgam.models import registry as families
from amalgam.models.families import llama
from amalgam.tools.analyze import analyze_checkpoint
from amalgam.tools.estimate import estimate
from tests.conftest import DEMO, ROOT
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny, write_checkpoint


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType]:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    modules = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        name = re.match(r"# (\w+)\.py", block)[1]  # type: ignore[index]
        modules[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])  # where a dataclass looks its module up
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
    caches = (formats.all_formats, families.all_families, recognition.companion_suffixes, recognition.fitting)
    monkeypatch.setattr(plugins, "entry_points", lambda group: found[group])
    for cached in caches:
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def in_halves(tensor: Tensor) -> dict[str, Tensor]:
    """A weight as the walk's format stores it: suffix → tensor."""
    high = (tensor.float() * 64).round().clamp(-128, 127)
    low = ((tensor.float() - high / 64) * 8192).round().clamp(-128, 127)
    return {"weight_high": high.to(torch.int8), "weight_low": low.to(torch.int8)}


def store_in_halves(folder: Path, new: Path, values: Path, of: str) -> None:
    """Copies of a checkpoint: `new` with its matrices that match in the new format, `values` with what these mean."""
    tensors, halves = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if tensors[name].dim() == 2 and re.search(of, name)]:
        parts = in_halves(tensors[name])
        halves |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
        tensors[name] = parts["weight_high"].float() / 64 + parts["weight_low"].float() / 8192
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(values, config, tensors)
    kept = {name: tensor for name, tensor in tensors.items() if f"{name}_high" not in halves}
    write_checkpoint(new, config, {**kept, **halves})


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("is_tied", [False, True], ids=["head", "tied"])
def test_a_model_of_the_new_family_all_in_the_new_format(is_tied: bool, tmp_path: Path) -> None:
    """Projections, embedding and head, tied or not."""
    reference = save_tiny(llama.FAMILY, tmp_path / "llama", tie_word_embeddings=is_tied)
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["TinyLlamaForCausalLM"]}))
    store_in_halves(tmp_path / "llama", tmp_path / "new", tmp_path / "values", of="")
    decoder, version = load_model(tmp_path / "new")
    assert decoder.spec.family == "tiny_llama"
    assert {origin.stored_format for slot, origin in version.origins.items() if "norm" not in slot} == {"halves"}
    prompt = list(range(3, 40))
    unquantized = Runner(*load_model(tmp_path / "llama")).step({0: prompt})[0]
    torch.testing.assert_close(unquantized, reference.logits(prompt), atol=1e-4, rtol=0)
    expected = Runner(*load_model(tmp_path / "values")).step({0: prompt})[0]
    torch.testing.assert_close(Runner(decoder, version).step({0: prompt})[0], expected, atol=1e-4, rtol=0)
    in_bf16 = Runner(*load_model(tmp_path / "new", dtype=torch.bfloat16)).step({0: prompt})[0]
    assert float((in_bf16 - expected).norm() / expected.norm()) < 0.05
    assert analyze_checkpoint(str(tmp_path / "new")).notes == ()


@pytest.mark.usefixtures("installed")
def test_the_new_format_generates_among_others(tmp_path: Path) -> None:
    """As a user would: a source among others, counted, estimated, re-mapped, beside a packed cache."""
    store_in_halves(DEMO, tmp_path / "new", tmp_path / "values", of=r"mlp\.experts\.[0-7]\.|self_attn")
    rules = {"model.layers.*.mlp.experts.{0-7}.*": "new", "model.layers.{0-2}.self_attn.*_proj.weight": "new"}
    answers = []
    for kind in ("new", "values", "new"):  # the third starts from the cache
        settings = {
            "inference.max_seq_length": 64,
            "inference.dtype": "float32",
            "inference.packed_cache": str(tmp_path / "cache"),
            "model.mixed_precision.sources": {"new": str(tmp_path / kind)},
            "model.mixed_precision.weight_mapping": rules,
        }
        with LLM(model=DEMO, settings=settings) as llm:
            greedy = SamplingParams(max_new_tokens=8, do_sample=False)
            answers.append([answer.text for answer in llm.generate(["The old man", "def main("], greedy)])
            if kind != "new":
                continue
            assert llm.model_info()["precisions"]["halves"]["weights"] == 6 * 8 * 3 + 3 * 4
            assert llm.expert_stats(top_k=1)["summary"]["total_activations"] > 0
            llm.update_weight_mapping({"model.layers.*": "new"})
            assert llm.generate("The old man", greedy)[0].usage.version == 2
        assert estimate(load_settings(None, {"model.base_path": str(DEMO), **settings})).weights["halves"] > 0
    assert answers[0] == answers[1] == answers[2]
