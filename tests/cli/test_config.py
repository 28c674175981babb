"""`amalgam config`: every setting with its type, default, value and origin; and what a configuration has wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import DEMO

from amalgam.cli import VERBS, main, serve
from amalgam.cli.options import OTHERS
from amalgam.config.keys import all_settings, environment_name
from amalgam.config.reading import load_settings
from amalgam.config.settings import Settings


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["config", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_setting_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and lines[0] == ["setting", "value", "from", "type", "default", "environment", "meaning"]
    assert [line[0] for line in lines[1:]] == [info.key for info in all_settings()]
    rows = {line[0]: line for line in lines}
    assert rows["server.port"][1:5] == ["8080", "default", "integer from 0 to 65535", "8080"]
    assert rows["engine.num_threads"][3].endswith("or none") and rows["model.base_path"][4] == "required"
    assert all(line[5] == environment_name(line[0]) and line[6] for line in lines[1:])


def test_values_are_those_in_force_and_where_they_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMALGAM_SERVER_HOST", "::")
    monkeypatch.setenv("AMALGAM_SERVER_PORT", "tcp://10.0.0.1:80")
    path = tmp_path / "c.yaml"
    path.write_text("model: {base_path: /m, mixed_precision: {fp8_path: /f, int4_path: /i}}")
    flags = ("--config", str(path), "--server.drain_seconds", "010", "--model.name", "2024")
    code, out, _ = run(capsys, *flags, "--json")
    rows = {row["setting"]: row for row in json.loads(out)}
    assert code == 0
    assert (rows["server.host"]["value"], rows["server.host"]["from"]) == ("::", "AMALGAM_SERVER_HOST")
    assert (rows["server.port"]["value"], rows["server.port"]["from"]) == (8080, "default")
    assert (rows["server.drain_seconds"]["value"], rows["server.drain_seconds"]["from"]) == (10, "flag")
    assert rows["model.name"]["value"] == "2024"
    assert rows["model.base_path"]["from"] == rows["model.mixed_precision.sources"]["from"] == "file"
    assert set(rows["model.mixed_precision.sources"]["value"]) == {"fp8", "int4"}


def test_some_settings_are_chosen_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "server.p", "threads")
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()[1:]] == [
        "server.port",
        "engine.num_threads",
        "engine.pin_threads",
        "engine.load_threads",
        "filters.hook_threads",
    ]
    code, _, err = run(capsys, "nothing.like.it")
    assert code == 2 and "nothing.like.it" in err


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: {base_path: /m}\nserver: {prot: 1}", "server.prot"),
        ("model: {base_path: /m}\nserver: {port: 1:30}", "'1:30'"),
        ("server: {port: 1}", "model"),
    ],
)
def test_a_configuration_is_checked(text: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    code, out, err = run(capsys, "--config", str(path))
    assert (code, out) == (2, "") and part in err


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_the_verb_s_own_and_short(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-h", "--help"):
        assert main([verb, flag]) == 0
    out = capsys.readouterr().out
    assert f"amalgam {verb}" in out and "--statistics" not in out
    assert ("amalgam config" in out) == ("--config" in out and verb != "analyze")


def test_hidden_settings_are_flags_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for info in all_settings():
        if not info.is_structured:
            code = main(["config", info.key, f"--{info.key}", ""])
            err = capsys.readouterr().err
            assert "No such option" not in err
            assert code == 0 or info.key in err


# A value of each setting that other servers have a name for, and not its default.
OF_OTHERS = {
    "engine.block_size": "32", "engine.kv_cache_bytes": "1000000", "engine.kv_dtype": "fp8", "engine.load_threads": "3",
    "engine.max_step_tokens": "128", "engine.num_threads": "2", "inference.dtype": "float16",
    "inference.max_batch_size": "5", "inference.max_seq_length": "300", "server.allowed_origins": '["https://a.org"]',
    "server.api_keys_file": "keys", "server.chat_template": "a.jinja", "server.drain_seconds": "9",
    "server.embedding_pooling": "last", "server.max_header_bytes": "9999", "server.max_workers": "2",
    "server.otlp_endpoint": "http://a:4318", "server.reasoning_parser": "think", "server.root_path": "/llm",
    "server.served_model_names": "a,b", "server.stream_comment_seconds": "7", "server.tls_cert": "a.pem",
    "server.tls_key": "b.pem", "server.tool_parser": "hermes", "server.unix_socket": "a.sock",
    "speculation.draft": "/m", "speculation.num_tokens": "2",
}  # fmt: skip


@pytest.mark.parametrize("place", [0, -1])
def test_serve_takes_the_names_that_other_servers_give_its_flags(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("amalgam.server.app.run", lambda settings, *_: seen.append(settings) or 0)
    monkeypatch.setattr(serve, "begin_to_load_torch", lambda: None)
    flags = [part for key, names in OTHERS.items() for part in (names[place], OF_OTHERS[key])]
    assert main(["serve", "--model", "/m", *flags]) == 0
    values = {key: json.loads(value) if value[0] == "[" else value for key, value in OF_OTHERS.items()}
    assert seen == [load_settings(None, {"model.base_path": "/m"} | values, {})]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[0] == "amalgam"


def test_a_flag_undoes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{base_path: {DEMO}}}\nengine: {{num_threads: 1}}\nstatistics: {{file: kept.npz}}\n")
    flags = ("--statistics.file", "", "--engine.num_threads", "null", "--config", str(path), "--json")
    code, out, _ = run(capsys, *flags, "statistics.file", "num_threads")
    assert code == 0 and [row["value"] for row in json.loads(out)] == [None, ""]


def test_secrets_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {base_path: /m}\n"
        "server: {admin_key: s3cret, api_keys: [s3cret], otlp_endpoint: 'https://me:s3cret@collector'}\n"
        "filters: {rules: [{name: a, hook: b, options: {token: s3cret}}]}\n"
    )
    for flags in ((), ("--json",)):
        code, out, err = run(capsys, "--config", str(path), *flags)
        assert code == 0 and "https://collector" in out and "s3cret" not in out + err
    path.write_text("server: {api_keys: {a: s3cret}}")
    code, out, err = run(capsys, "--config", str(path))
    assert code == 2 and "server.api_keys" in err and "s3cret" not in out + err
