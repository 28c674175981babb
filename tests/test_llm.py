"""The Python interface: the same engine without a server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amalgam import LLM, SamplingParams
from amalgam.errors import ConfigError, PromptTooLongError
from tests.conftest import DEMO, ROOT

GREEDY = SamplingParams(max_new_tokens=12, do_sample=False)


@pytest.fixture
def llm(demo_config: Path) -> Iterator[LLM]:
    with LLM(config=demo_config, settings={"inference.max_seq_length": 256}) as llm:
        yield llm


def test_generate_and_stream_agree(llm: LLM) -> None:
    answers = llm.generate(["The old man", "def main("], GREEDY)
    streamed = "".join(output.text for output in llm.stream("The old man", GREEDY))
    assert streamed == answers[0].text
    assert answers[0].text != answers[1].text
    assert llm.generate("The old man", GREEDY)[0].text == streamed


def test_leaving_a_stream_cancels_it(llm: LLM) -> None:
    stream = llm.stream("The old man", SamplingParams(max_new_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    engine = llm._deployment.engine
    while engine.status().num_running:
        pass
    assert engine.status().num_free_blocks == engine.status().num_blocks


def test_remap_and_statistics(llm: LLM) -> None:
    llm.generate("The old man", GREEDY)
    summary = llm.expert_stats(top_k=3)["summary"]
    assert summary["total_activations"] == summary["total_tokens"] * 4 * 6
    assert len(llm.expert_stats(top_k=3)["top_experts"]) == 3
    result = llm.update_weight_mapping({"model.layers.*.mlp.experts.*": "fp8"})
    assert result.version == 2
    assert llm.generate("The old man", GREEDY)[0].usage.version == 2
    assert llm.model_info()["precisions"]["fp8"]["weights"] == 287


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="config or model"):
        LLM()
    with LLM(model=DEMO, settings={"inference.max_seq_length": 64}) as llm:
        with pytest.raises(PromptTooLongError, match="64"):
            llm.generate("word " * 100)
        assert llm.generate("word", GREEDY)[0].text


def test_peak_memory_is_the_weights_and_little_more(tmp_path: Path) -> None:
    """At most the final weights, ten per cent and the largest tensor, above what a process needs without weights."""
    program = f"""
import sys, torch
from pathlib import Path
from amalgam.checkpoint.writer import write_checkpoint
from amalgam.config import InferenceSettings, ModelSettings
from amalgam.engine.memory import peak_memory_bytes
from amalgam.models.loader import ModelLoader
import json, resource
config = json.loads(Path({str(DEMO / "config.json")!r}).read_text()) | dict(
    num_hidden_layers=8, hidden_size=1024, moe_intermediate_size=512, num_experts=16)
config.pop("num_local_experts")
folder = Path({str(tmp_path)!r})
(folder / "config.json").write_text(json.dumps(config))
if sys.argv[1] == "write":
    from amalgam.models.spec import read_spec
    family, spec = read_spec(config, "config.json")
    names = ((family.logical_name(slot), torch.zeros(slot.shape, dtype=torch.bfloat16)) for slot in spec.slots)
    write_checkpoint(folder, names)
else:
    model = ModelSettings(base_path=str(folder))
    loader = ModelLoader(model, InferenceSettings(), torch.device("cpu"), threads=2)
    plan = loader.make_plan()
    loader.check(plan)
    before = peak_memory_bytes()
    version = loader.build(plan, 1).version
    largest = max(version[slot].nbytes for slot in version.origins)
    print(peak_memory_bytes() - before, version.nbytes, largest)
"""
    for step in ("write", "load"):
        result = subprocess.run(
            [sys.executable, "-c", program, step],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert result.returncode == 0, result.stderr
    grown, weights, largest = map(int, result.stdout.split())
    assert weights > 300 * 2**20
    assert grown <= 1.1 * weights + largest
