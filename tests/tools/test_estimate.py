"""What is estimated is what a process then takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from amalgam.cli import main
from amalgam.config.settings import load_settings
from amalgam.tools.estimate import estimate
from tests.conftest import ROOT

FILL_THE_CACHE = """
import json, sys
from amalgam import LLM, SamplingParams
from amalgam.config.settings import load_settings
from amalgam.tools.estimate import estimate
overrides = {"inference.max_batch_size": 16, "inference.max_seq_length": 1024, "engine.num_threads": 1}
found = estimate(load_settings(sys.argv[1], overrides))
with LLM(config=sys.argv[1], settings=overrides) as llm:
    prompts = [f"{index} " + "word " * 930 for index in range(16)]  # the first decodes until the last has come
    params = SamplingParams(max_new_tokens=1000, ignore_eos=True, do_sample=False, repetition_penalty=1.0)
    answers = llm.generate(prompts, params)
    assert all(a.usage.num_prompt_tokens + a.usage.num_new_tokens == 1024 for a in answers)
    peak = llm.model_info()["memory"]["process_peak_bytes"]
print(json.dumps({**found.as_json(), "peak_bytes": peak}))
"""


def test_the_demo_takes_what_was_estimated(demo_config: Path) -> None:
    """What a process takes beyond one without a model, its whole KV cache filled, within 15%."""
    environment = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FILL_THE_CACHE, str(demo_config)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    parts = found["weights_bytes"], found["kv_bytes"], found["workspace_bytes"]
    assert found["total_bytes"] == sum(parts) + found["process_bytes"]
    taken = found["peak_bytes"] - found["process_bytes"]
    assert 0.85 * taken <= sum(parts) <= 1.15 * taken


def test_weights_are_exact_and_kv_grows_with_length_and_batch(demo_config: Path) -> None:
    settings = load_settings(demo_config, environ={})
    small, large = estimate(settings, 128, 1), estimate(settings, 256, 4)
    assert set(small.weights) == {"bf16", "fp8", "int4"}
    assert large.kv_bytes == 8 * small.kv_bytes == 8 * 128 * small.kv_bytes_per_token
    assert small.kv_bytes_per_token == 6 * 2 * 2 * 64 * 2
    coded = load_settings(demo_config, {"engine.kv_dtype": "int8"}, environ={})
    assert estimate(coded, 128, 1).kv_bytes_per_token == 6 * 2 * 2 * (64 + 4)
    sizes = {row.format: row.weights_bytes for row in small.uniform}
    assert sizes["fp32"] > sizes["bf16"] > sizes["int8"] > sizes["int4"]
    assert small.fits
    assert small.max_tokens_that_fit > 1000


def test_the_command_says_whether_it_fits(demo_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--config", str(demo_config)]) == 0
    assert "It fits." in capsys.readouterr().out
    assert main(["estimate", "--config", str(demo_config), "--batch", "100000000"]) == 0
    assert "does NOT fit" in capsys.readouterr().out
