"""The promised configuration file loads as it stands; everything else is an error that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from amalgam.config import environment_name, load_settings, setting_keys
from amalgam.errors import ConfigError

PROMISED = """
model:
  name: "Qwen3-235B-A22B"
  base_path: "/models/qwen3"            # config.json, tokenizer, and the default weights
  mixed_precision:
    fp16_path: "/models/qwen3-fp16"      # every <name>_path key declares a source called <name>
    fp8_path:  "/models/qwen3-fp8"
    int4_path: "/models/qwen3-int4"
    weight_mapping:                      # exact logical names; patterns are allowed too; most specific wins
      "model.layers.0.self_attn.q_proj.weight": "fp16"
      "model.layers.0.mlp.experts.0.down_proj.weight": "int4"
inference:
  max_seq_length: 4096
  max_batch_size: 32                     # sequences in one step
  dtype: "bfloat16"
  device_map: "auto"                     # auto | cpu | cuda | cuda:N
  load_in_8bit: false                    # weights that no rule names: quantize them while loading
  load_in_4bit: false
server:
  host: "127.0.0.1"
  port: 8080
  max_workers: 4                         # threads for tokenizing and file reading
"""
MINIMAL = "model: {base_path: /m}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_promised_file_loads(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, PROMISED), environ={})
    mixed = settings.model.mixed_precision
    assert dict(mixed.sources) == {
        "fp16": "/models/qwen3-fp16",
        "fp8": "/models/qwen3-fp8",
        "int4": "/models/qwen3-int4",
    }
    assert [(rule.pattern, rule.source) for rule in mixed.all_rules][1] == (
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "int4",
    )
    assert (settings.inference.max_batch_size, settings.server.port) == (32, 8080)


def test_flags_beat_the_environment_and_that_beats_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, PROMISED)
    environ = {"AMALGAM_SERVER_PORT": "9000", "AMALGAM_SERVER_HOST": "0.0.0.0", "HOME": "/root"}
    settings = load_settings(path, {"server.port": 9001}, environ)
    assert (settings.server.host, settings.server.port) == ("0.0.0.0", 9001)


def test_relative_paths_start_at_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "org" / "local").mkdir(parents=True)
    text = "model: {base_path: ../up, mixed_precision: {a_path: Qwen/Qwen3-30B-A3B, b_path: org/local}}"
    settings = load_settings(write(tmp_path, text), environ={})
    assert settings.model.base_path == str(tmp_path.parent / "up")
    assert settings.model.mixed_precision.sources == {
        "a": "Qwen/Qwen3-30B-A3B",
        "b": str(tmp_path / "org" / "local"),
    }


def test_settings_are_frozen(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, MINIMAL), environ={})
    with pytest.raises(ValidationError):
        settings.server.port = 1
    assert settings.replace(server={"port": 1}).server.port == 1
    assert settings.server.port == 8080


def test_every_setting_has_a_description_and_an_environment_name() -> None:
    keys = setting_keys()
    assert all(keys.values())
    assert len({environment_name(key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expected a mapping"),
        ("[1, 2]", "Expected a mapping"),
        ("model: {base_path: [}", "not valid YAML"),
        ("model: {base_path: /m}\nmodel: {base_path: /n}", "'model' stands twice"),
        ("inference: {}", "model: is required"),
        (MINIMAL + "servr: {port: 1}", "servr: unknown setting"),
        (MINIMAL + "server: {prot: 1}", "server.prot: unknown setting"),
        (MINIMAL + "server: {port: 70000}", "70000"),
        (MINIMAL + "server: {port: abc}", "'abc'"),
        (MINIMAL + "inference: {dtype: int4}", "'int4'"),
        (MINIMAL + "inference: {device_map: tpu}", "'tpu'"),
        (MINIMAL + "inference: {load_in_8bit: true, load_in_4bit: true}", "choose one"),
        (MINIMAL + "server: {drain_seconds: .nan}", "nan"),
        ("model: {base_path: /m, mixed_precision: {weight_mapping: {a: int4}}}", "'int4', which nobody declared"),
        ("model: {base_path: /m, mixed_precision: {base_path: /x}}", "taken by model.base_path"),
        ("model: {base_path: /m, mixed_precision: {a_path: /x, sources: {a: /y}}}", "declared twice"),
        ("model: {base_path: /m, mixed_precision: {derived: {fp8: {format: fp8}}}}", "'fp8', which nobody declared"),
        ("model: {base_path: !!python/object/apply:os.system [true]}", "not valid YAML"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings(write(tmp_path, text), environ={})
    assert message in str(error.value)


def test_an_unknown_environment_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AMALGAM_SERVER_PROT"):
        load_settings(write(tmp_path, MINIMAL), environ={"AMALGAM_SERVER_PROT": "1"})
