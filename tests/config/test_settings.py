"""The promised configuration file loads as it stands; everything else is an error that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from amalgam.config.environment import state_folder
from amalgam.config.keys import all_settings, environment_name, setting_keys
from amalgam.config.reading import load_settings, read_settings
from amalgam.config.settings import build_settings
from amalgam.errors import ConfigError
from tests.cases import each_case
from tests.errors import raises

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
    ("text", "named"),
    [
        ("", ["config.yaml", "is empty"]),
        ("[1, 2]", ["config.yaml", "a list"]),
        ("model: {base_path: [}", ["config.yaml", "line 1", "'}'"]),
        ("model: {base_path: /m}\nmodel: {base_path: /n}", ["config.yaml", "line 2", "model"]),
        ("inference: {}", ["model"]),
        (MINIMAL + "servr: {port: 1}", ["servr"]),
        (MINIMAL + "server: {prot: 1}", ["server.prot"]),
        (MINIMAL + "server: {port: 70000}", ["server.port", "'70000'", 65535]),
        (MINIMAL + "server: {port: abc}", ["server.port", "'abc'"]),
        (MINIMAL + "inference: {dtype: int4}", ["inference.dtype", "'int4'"]),
        (MINIMAL + "inference: {device_map: tpu}", ["inference.device_map", "'tpu'"]),
        (MINIMAL + "inference: {load_in_8bit: true, load_in_4bit: true}", ["load_in_8bit", "load_in_4bit"]),
        (MINIMAL + "server: {drain_seconds: .nan}", ["server.drain_seconds", "'.nan'"]),
        ("model: {base_path: /m, mixed_precision: {weight_mapping: {a: int4}}}", ["weight_mapping['a']", "'int4'"]),
        (
            "model: {base_path: /m, mixed_precision: {weight_mapping: {a: [int4]}}}",
            ["weight_mapping.a", "a source's name, or {source, device}"],
        ),
        ("model: {base_path: /m, mixed_precision: {weight_mapping: {a: }}}", ["weight_mapping.a", "a source's name"]),
        ("model: {base_path: /m, mixed_precision: {base_path: /x}}", ["'base'", "model.base_path"]),
        ("model: {base_path: /m, mixed_precision: {a_path: /x, sources: {a: /y}}}", ["'a'", "a_path", "sources"]),
        ("model: {base_path: /m, mixed_precision: {derived: {fp8: {format: fp8}}}}", ["derived['fp8']", "'fp8'"]),
        (MINIMAL + "weights: {named: {small: {a: int4}}}", ["weights.named['small']['a']", "'int4'", "int4_path"]),
        ("model: {base_path: !!python/object/apply:os.system [true]}", ["config.yaml", "line 1"]),
        ("model: {base_path: !!bool maybe}", ["config.yaml"]),
    ],
)
def test_mistakes_are_named(text: str, named: list[object], tmp_path: Path) -> None:
    with raises(ConfigError, *named):
        load_settings(write(tmp_path, text), environ={})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("server: {api_keys: {a: s3cret}}", ["server.api_keys", "a list"]),
        ("server: {api_keys: [[s3cret]]}", ["server.api_keys.0", "a string"]),
        ("server: {admin_key: [s3cret]}", ["server.admin_key", "a string"]),
        ("server: {otlp_endpoint: 'ftp://me:s3cret@collector'}", ["server.otlp_endpoint"]),
        ("filters: {rules: [{name: a, hook: b, options: [s3cret]}]}", ["filters.rules.0.options", "a mapping"]),
        ("server: [{admin_key: s3cret}]", ["server", "a mapping"]),
        ("- server: {admin_key: s3cret}", ["config.yaml", "a mapping"]),
        ("s3cret", ["config.yaml", "a mapping"]),
        ("server:\n  admin_key: @s3cret", ["config.yaml", "line 2"]),
        ("server:\n  admin_key: *s3cret", ["config.yaml", "line 2"]),
        ("server:\n  admin_key: !s3cret", ["config.yaml", "line 2"]),
        ("server:\n  admin_key: !it's-s3cret", ["config.yaml", "line 2"]),
        ("server:\n  admin_key: 's3cret", ["config.yaml", "line 2"]),
        ("server:\n  admin_key: s3cret: s3cret", ["config.yaml", "line 2"]),
        ("server:\n  admin_key: !!int s3cret", ["config.yaml"]),
        ("server:\n  admin_key: !!bool s3cret", ["config.yaml"]),
    ],
)
@pytest.mark.parametrize("environ", [{}, {"AMALGAM_SERVER_PORT": "8081", "AMALGAM_FILTERS_HOOK_THREADS": "2"}])
def test_a_secret_in_the_file_is_in_no_message(
    text: str, named: list[object], environ: dict[str, str], tmp_path: Path
) -> None:
    with raises(ConfigError, *named) as caught:
        load_settings(write(tmp_path, text), {"model.base_path": "/m"}, environ)
    assert "s3cret" not in str(caught.value)


def test_a_secret_in_a_variable_is_in_no_message(tmp_path: Path) -> None:
    """Names and texts of variables become keys and values as they are, but for mappings."""
    for name, text in {
        "AMALGAM_SERVER_OTLP_ENDPOINT": "ftp://me:s3cret@collector",
        "AMALGAM_FILTERS_RULES": "[{name: a, hook: b, options: *s3cret}]",
        "AMALGAM_SERVER_ADMIN_KYE": "s3cret",
    }.items():
        with raises(ConfigError) as caught:
            load_settings(None, {"model.base_path": "/m"}, {name: text})
        assert "s3cret" not in str(caught.value)
    with raises(ConfigError, "filters.rules.0.options") as caught:
        load_settings(
            None, {"model.base_path": "/m"}, {"AMALGAM_FILTERS_RULES": "[{name: a, hook: b, options: s3cret}]"}
        )
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("server.admin_key", 123456789),
        ("server.admin_key", {"123456789": 1}),
        ("server.admin_key", b"\xff123456789"),
        ("server.api_keys", {"a": "123456789"}),
        ("server.api_keys", ["a", 123456789]),
        ("server.otlp_endpoint", "me:123456789@collector"),
        ("filters.rules", "123456789"),
    ],
)
def test_a_secret_that_a_flag_or_a_program_gives_is_in_no_message(key: str, value: Any) -> None:
    with raises(ConfigError, key) as caught:
        load_settings(None, {"model.base_path": "/m", key: value}, {})
    assert "123456789" not in str(caught.value)
    section, name = key.split(".")
    with raises(ConfigError, key) as caught:
        build_settings({"model": {"base_path": "/m"}, section: {name: value}})
    assert "123456789" not in str(caught.value)


def test_what_is_no_secret_is_in_messages() -> None:
    with raises(ConfigError, "server.port", "'a port'"):
        build_settings({"model": {"base_path": "/m"}, "server": {"port": "a port", "admin_key": "s3cret"}})
    with raises(ConfigError, "filters.rules.0.max_chars", 7.5):
        build_settings({"model": {"base_path": "/m"}, "filters": {"rules": [{"name": "a", "max_chars": 7.5}]}})


def test_no_secret_is_shown_with_settings() -> None:
    server = {"admin_key": "s3cret", "api_keys": ["s3cret"], "otlp_endpoint": "https://me:s3cret@collector/v1"}
    filters = {"rules": [{"name": "a", "hook": "b", "options": {"token": "s3cret"}}]}
    settings = build_settings({"model": {"base_path": "/m"}, "server": server, "filters": filters})
    shown = settings.model_dump(mode="json")
    assert "s3cret" not in str(shown) and shown["server"]["otlp_endpoint"] == "https://collector/v1"
    assert settings.server.otlp_endpoint == server["otlp_endpoint"]
    assert settings.filters.rules[0].options.get_secret_value() == {"token": "s3cret"}
    assert settings.replace() == settings


def test_an_unknown_environment_variable_is_named(tmp_path: Path) -> None:
    with raises(ConfigError, "AMALGAM_SERVER_PROT", "AMALGAM_SERVER_PORT"):
        load_settings(write(tmp_path, MINIMAL), environ={"AMALGAM_SERVER_PROT": "1"})


def value_of(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


# What a text means for a setting is the same in a file, a variable and a flag.
TEXTS: list[tuple[str, str, Any]] = [
    ("server.host", "::", "::"),
    ("server.host", "no", "no"),
    ("server.host", "010", "010"),
    ("model.name", "2024", "2024"),
    ("model.name", "2024-01-01", "2024-01-01"),
    ("model.name", "yes", "yes"),
    ("model.name", "1e3", "1e3"),
    ("model.name", "1:30", "1:30"),
    ("model.name", "none", "none"),
    ("model.base_path", "12", "12"),
    ("server.port", "010", 10),
    ("server.port", "0", 0),
    ("server.max_body_bytes", "8.388608e+06", 8388608),
    ("server.max_body_bytes", "8_388_608", 8388608),
    ("server.drain_seconds", "1e1", 10.0),
    ("server.drain_seconds", "010", 10.0),
    ("engine.num_threads", "none", None),
    ("engine.num_threads", "null", None),
    ("engine.num_threads", "02", 2),
    ("inference.load_in_8bit", "yes", True),
    ("inference.load_in_8bit", "FALSE", False),
    ("statistics.enabled", "off", False),
    ("statistics.enabled", "1", True),
    ("inference.dtype", "float32", "float32"),
]


def read_by(way: str, key: str, text: str, folder: Path) -> Any:
    """A setting's value when `text` is given for it in one of three ways."""
    model = {} if key == "model.base_path" else {"model.base_path": "m"}
    if way == "variable":
        return value_of(load_settings(None, model, {environment_name(key): text}), key)
    if way == "flag":
        [info] = [info for info in all_settings() if info.key == key]
        return value_of(load_settings(None, {**model, key: info.read(text)}, {}), key)
    (folder / "m").mkdir(exist_ok=True)
    text = f"'{text}'" if text.endswith(":") else text  # which YAML wants
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(key.split("."))]
    return value_of(load_settings(write(folder, "\n".join(lines) + f" {text}"), model, {}), key)


@pytest.mark.parametrize("way", ["file", "variable", "flag"])
def test_a_text_means_what_its_setting_takes(way: str, tmp_path: Path) -> None:
    with each_case() as case:
        for key, text, meant in TEXTS:
            with case(key, text):
                value = read_by(way, key, text, tmp_path)
                expected = str(tmp_path / meant) if way == "file" and key == "model.base_path" else meant
                assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("way", ["file", "variable", "flag"])
@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("server.port", "22:22"),
        ("server.port", "0x50"),
        ("server.port", "0o17"),
        ("server.port", "80.5"),
        ("server.port", "true"),
        ("server.port", "1e99"),
        ("engine.num_threads", "1:30"),
        ("server.drain_seconds", "1:30"),
        ("server.drain_seconds", "inf"),
        ("statistics.enabled", "2"),
        ("statistics.enabled", "nope"),
        ("inference.dtype", "no"),
    ],
)
def test_a_text_that_a_setting_does_not_take_is_an_error(key: str, text: str, way: str, tmp_path: Path) -> None:
    with raises(ConfigError, key, *([environment_name(key)] if way == "variable" else [])):
        read_by(way, key, text, tmp_path)


@pytest.mark.parametrize("text", ["a # b", "#", "{x", "a: b", "[", " two  spaces ", "'quoted'", "*", "&a", "null"])
def test_texts_of_variables_and_flags_are_verbatim(text: str, tmp_path: Path) -> None:
    for key in ("model.name", "statistics.file", "inference.packed_cache"):
        assert read_by("variable", key, text, tmp_path) == text
        assert read_by("flag", key, text, tmp_path) == text


FULL = (
    MINIMAL
    + """
engine: {num_threads: 3, kv_cache_bytes: 4096}
statistics: {file: kept.npz, reference: ref.npz}
inference: {packed_cache: /cache}
server: {port: 1234, host: "::1"}
"""
)


def test_what_is_given_undoes_the_file_whatever_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    undo = {
        "engine.num_threads": None,
        "engine.kv_cache_bytes": "null",
        "statistics.file": "",
        "statistics.reference": None,
        "inference.packed_cache": "",
    }
    settings = load_settings(path, undo, {})
    assert settings.engine.num_threads is None and settings.engine.kv_cache_bytes is None
    assert settings.statistics.file == settings.statistics.reference == settings.inference.packed_cache == ""


def test_an_empty_variable_is_none_where_that_is_possible_and_otherwise_as_if_not_set(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, FULL), {}, {environment_name(key): "" for key in setting_keys()})
    assert settings.engine.num_threads is None and settings.statistics.file == settings.inference.packed_cache == ""
    assert (settings.server.port, settings.server.host, settings.model.base_path) == (1234, "::1", "/m")


def test_an_empty_section_is_no_section(tmp_path: Path) -> None:
    text = MINIMAL + "server:\nengine: ~\nstatistics:\n  file:\n  reference: null\n"
    settings = load_settings(write(tmp_path, text), environ={})
    assert settings == load_settings(write(tmp_path, MINIMAL), environ={})
    text = "model:\n  base_path: /m\n  mixed_precision:\n    weight_mapping:\n    sources:\n    rules:\n"
    assert load_settings(write(tmp_path, text), environ={}).model.mixed_precision.all_rules == ()
    with raises(ConfigError, "server.port"):
        load_settings(write(tmp_path, MINIMAL + "server: {port: }"), environ={})


def test_home_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = [info.key for info in all_settings() if info.kind == "path"]
    assert {"model.base_path", "inference.packed_cache", "statistics.file", "server.export_dir"} <= set(keys)
    for key in keys:
        for way in ("file", "variable", "flag"):
            assert read_by(way, key, "~/x", tmp_path) == str(tmp_path / "x"), (key, way)
    text = "model: {base_path: ~/b, mixed_precision: {fp8_path: ~/f, sources: {q: ~/q}}}"
    write(tmp_path, text)
    settings = load_settings("~/config.yaml", environ={})
    assert settings.model.mixed_precision.sources == {"fp8": f"{tmp_path}/f", "q": f"{tmp_path}/q"}
    sources = read_settings(None, {"model.base_path": "~"}, sources={"s": "~/s"}, environ={}).settings
    assert (sources.model.base_path, sources.model.mixed_precision.sources) == (str(tmp_path), {"s": f"{tmp_path}/s"})


def test_sources_and_rules_are_added_to_the_file_s(tmp_path: Path) -> None:
    text = """
model:
  base_path: /m
  mixed_precision:
    fp8_path: /fp8
    sources: {other: /other}
    rules: [{pattern: "a.*", source: fp8}]
"""
    added = read_settings(
        write(tmp_path, text),
        sources={"fp8": "/new", "x": "/x"},
        rules=[{"pattern": "b.*", "source": "x"}],
        environ={},
    )
    mixed = added.settings.model.mixed_precision
    assert mixed.sources == {"fp8": "/new", "other": "/other", "x": "/x"}
    assert [rule.pattern for rule in mixed.rules] == ["a.*", "b.*"]


def test_where_values_come_from_is_known(tmp_path: Path) -> None:
    environ = {"AMALGAM_SERVER_HOST": "::", "AMALGAM_ENGINE_MAX_QUEUE": "5"}
    origins = read_settings(write(tmp_path, FULL), {"engine.max_queue": 4}, environ=environ).origins
    assert origins["server.port"] == "file" and origins["server.host"] == "AMALGAM_SERVER_HOST"
    assert origins["engine.max_queue"] == "flag" and "server.max_workers" not in origins


def test_structured_variables_are_json_or_yaml(tmp_path: Path) -> None:
    environ = {
        "AMALGAM_MODEL_MIXED_PRECISION_SOURCES": '{"int4": "/i", "no": "~"}',
        "AMALGAM_MODEL_MIXED_PRECISION_RULES": "[{pattern: '*', source: no}]",
    }
    mixed = load_settings(write(tmp_path, MINIMAL), environ=environ).model.mixed_precision
    assert mixed.sources["int4"] == "/i" and mixed.rules[0].source == "no"
    with raises(ConfigError, "model.mixed_precision.rules"):
        load_settings(write(tmp_path, MINIMAL), environ={"AMALGAM_MODEL_MIXED_PRECISION_RULES": "[{"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.org", ("a.org",)),
        ("a.org, *.b.org", ("a.org", "*.b.org")),
        ('["a.org", "b"]', ("a.org", "b")),
        ("[::1],a", ("[::1]", "a")),
        ("[::1]", ("[::1]",)),
    ],
)
def test_lists_of_texts(text: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    for way in ("variable", "flag"):
        assert read_by(way, "server.allowed_hosts", text, tmp_path) == expected
    assert (
        load_settings(write(tmp_path, MINIMAL + f"server: {{allowed_hosts: {text!r}}}")).server.allowed_hosts
        == expected
    )


def test_the_user_s_own_files_have_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert state_folder({"XDG_STATE_HOME": "/s"}) == Path("/s/amalgam")
    assert state_folder({}) == state_folder({"XDG_STATE_HOME": "relative"}) == Path("/home/me/.local/state/amalgam")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"servr": {"port": 1}}, "server"),
        ({"inference": {"max_seq_len": 4096}}, "inference.max_seq_length"),
        ({"planning": {"autoplan": {"enable": "true"}}}, "planning.autoplan.enabled"),
    ],
)
def test_a_misspelt_setting_names_the_one_that_was_meant(given: dict[str, Any], meant: str) -> None:
    with raises(ConfigError, meant):
        build_settings({"model": {"base_path": "m"}, **given})
