"""The demo model as one GGUF file: weights, configuration and tokenizer come from it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from typer.testing import CliRunner

from amalgam import LLM, SamplingParams
from amalgam.checkpoint import TensorStore
from amalgam.cli import app
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.formats.grid import QuantizeOptions
from amalgam.text.tokenizer import Tokenizer
from tests.models.gguf_writer import KIND, write_gguf
from tests.text.test_gguf import TEXTS
from tests.text.tokenizer_metadata import metadata_of

DEMO = Path(__file__).parents[1] / "models" / "demo"
PROMPTS = ["It was a dark night, and", "床前明月光，", "def fibonacci(n):\n"]
SETTINGS = {"inference.device_map": "cpu", "inference.dtype": "float32", "inference.max_seq_length": 64}


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    for key, value in metadata_of(DEMO).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add: Any = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(key, value)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {
        kind.name.lower(): write_gguf(DEMO, folder / f"demo-{kind.name}.gguf", kind, edit=add_tokenizer)
        for kind in (KIND.BF16, KIND.Q8_0, KIND.Q4_0)
    }


def test_it_answers_as_the_published_checkpoint_does(files: dict[str, Path]) -> None:
    # The folder's generation_config.json has a penalty of its own, which a GGUF file cannot say.
    params = SamplingParams(temperature=0, max_new_tokens=12, repetition_penalty=1.0)
    answers = []
    for path in (DEMO, files["bf16"]):
        llm = LLM(model=path, settings=SETTINGS)
        answers.append([(answer.token_ids, answer.text) for answer in llm.generate(PROMPTS, params)])
        llm.close()
    assert answers[0] == answers[1]
    assert all(text for _, text in answers[0])


def test_quantized_it_still_speaks(files: dict[str, Path]) -> None:
    llm = LLM(model=files["q4_0"], settings=SETTINGS)
    answer = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_new_tokens=8))[0]
    llm.close()
    assert answer.text.strip()


def test_analyze_tells_what_is_in_it(files: dict[str, Path]) -> None:
    result = CliRunner().invoke(app, ["analyze", str(files["q8_0"]), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["family"], found["num_layers"], found["num_experts_per_layer"]) == ("qwen3_moe", 6, [16])
    assert found["roles"]["expert"]["weights"] == 6 * 16 * 3
    assert set(found["formats"]) == {"fp32", "gguf_q8_0"}
    assert found["notes"] == []


def test_plan_of_safetensors_and_gguf(files: dict[str, Path], tmp_path: Path) -> None:
    quantize_checkpoint(str(DEMO), tmp_path / "fp8", "fp8", QuantizeOptions())
    (tmp_path / "model.gguf").symlink_to(files["q4_0"])
    mapping = {"*.experts.{0-7}.*": "fp8", "*.experts.{8-15}.down_proj.weight": "q4"}
    mixed = {"fp8_path": "fp8", "q4_path": "model.gguf", "weight_mapping": mapping}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"base_path": str(DEMO), "mixed_precision": mixed}}))
    result = CliRunner().invoke(app, ["plan", "--config", str(config), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    found = {(row["source"], row["format"]) for row in rows if ".experts." in row["name"]}
    assert found == {("fp8", "fp8"), ("q4", "gguf_q4_0"), ("base", "bf16")}


@pytest.mark.parametrize("templates", [{}, {"tokenizer.chat_template.tools": "{{ messages }}"}])
def test_quantized_into_a_folder_that_works_alone(templates: dict[str, str], tmp_path: Path) -> None:
    """Tokenizer, template and ends of an answer come out of the file too."""
    from transformers import AutoConfig

    def edit(writer: gguf.GGUFWriter) -> None:
        add_tokenizer(writer)
        for key, text in templates.items():
            writer.add_string(key, text)

    file = write_gguf(DEMO, tmp_path / "demo.gguf", KIND.BF16, edit=edit)
    report = quantize_checkpoint(str(file), tmp_path / "out", "int8")
    assert (report.left_out_tensors, report.left_out_files) == ([], [])
    store = TensorStore.open(file)
    ours, theirs = Tokenizer.load(tmp_path / "out"), Tokenizer.load(file, store.metadata)
    assert ours.eos_token_ids == theirs.eos_token_ids
    for text in (*TEXTS, *PROMPTS):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
        messages = [{"role": "user", "content": text}]
        assert ours.encode_chat(messages) == theirs.encode_chat(messages)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.dtype) == ("qwen3_moe", torch.bfloat16)
    llm = LLM(model=tmp_path / "out", settings=SETTINGS)
    answer = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_new_tokens=8))[0]
    llm.close()
    assert answer.text.strip()
