"""Texts from outside: what an orchestrator or another program puts into the environment, and YAML without guesses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from amalgam.config.keys import all_settings
from amalgam.config.reading import load_settings
from amalgam.config.text import our_variables, parse_yaml, read_yaml
from amalgam.errors import ConfigError
from tests.errors import raises

NAMES = [info.environment for info in all_settings()]

# As kubelet sets them for services of these names, and Docker for links.
SERVICES = {
    "amalgam": {
        "AMALGAM_SERVICE_HOST": "10.96.0.7",
        "AMALGAM_SERVICE_PORT": "8080",
        "AMALGAM_SERVICE_PORT_HTTP": "8080",
        "AMALGAM_SERVICE_PORT_METRICS_V1": "9090",
        "AMALGAM_PORT": "tcp://10.96.0.7:8080",
        "AMALGAM_PORT_8080_TCP": "tcp://10.96.0.7:8080",
        "AMALGAM_PORT_8080_TCP_PROTO": "tcp",
        "AMALGAM_PORT_8080_TCP_PORT": "8080",
        "AMALGAM_PORT_8080_TCP_ADDR": "10.96.0.7",
    },
    "amalgam-server": {
        "AMALGAM_SERVER_SERVICE_HOST": "10.96.0.8",
        "AMALGAM_SERVER_SERVICE_PORT": "80",
        "AMALGAM_SERVER_PORT": "tcp://10.96.0.8:80",
        "AMALGAM_SERVER_PORT_80_TCP": "tcp://10.96.0.8:80",
        "AMALGAM_SERVER_PORT_80_TCP_ADDR": "10.96.0.8",
    },
    "amalgam-engine-num-threads": {
        "AMALGAM_ENGINE_NUM_THREADS_PORT": "udp://[fd00::8]:53",
        "AMALGAM_ENGINE_NUM_THREADS_PORT_53_UDP": "udp://[fd00::8]:53",
        "AMALGAM_ENGINE_NUM_THREADS_PORT_53_UDP_PROTO": "udp",
        "AMALGAM_ENGINE_NUM_THREADS_SERVICE_HOST": "fd00::8",
    },
}


@pytest.mark.parametrize("service", SERVICES)
def test_what_an_orchestrator_sets_is_ignored_and_said(service: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "amalgam.config"):
        assert our_variables({**SERVICES[service], "PATH": "/bin"}, NAMES) == {}
    [record] = caplog.records
    assert all(name in record.getMessage() for name in SERVICES[service])


def test_a_setting_beside_them_holds() -> None:
    environ = {**SERVICES["amalgam"], **SERVICES["amalgam-server"], "AMALGAM_SERVER_HOST": "::"}
    settings = load_settings(None, {"model.base_path": "m"}, environ)
    assert (settings.server.host, settings.server.port) == ("::", 8080)
    settings = load_settings(None, {"model.base_path": "m"}, {**environ, "AMALGAM_SERVER_PORT": "9000"})
    assert settings.server.port == 9000


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("AMALGAM_SERVER_PROT", "AMALGAM_SERVER_PORT"),
        ("AMALGAM_STATISTICS_FIEL", "AMALGAM_STATISTICS_FILE"),
        ("AMALGAM_INFERENCE_MAX_SEQ_LENGHT", "AMALGAM_INFERENCE_MAX_SEQ_LENGTH"),
        ("AMALGAM_NUM_THREADS", "AMALGAM_ENGINE_NUM_THREADS"),
        ("AMALGAM_BASE_PATH", "AMALGAM_MODEL_BASE_PATH"),
    ],
)
def test_a_misspelt_setting_is_refused(name: str, meant: str) -> None:
    with raises(ConfigError, name, meant):
        our_variables({name: "1"}, NAMES)


@pytest.mark.parametrize("name", ["AMALGAM_HOME", "AMALGAM_IMAGE_TAG", "AMALGAM_ENV_LANG", "AMALGAM_VERSION"])
def test_another_program_s_variable_stops_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "amalgam.config"):
        assert our_variables({name: "x"}, NAMES) == {}
    assert name in caplog.text


def test_yaml_is_not_guessed_at() -> None:
    text = "{a: no, b: 010, c: 22:22, d: 2024-01-01, e: 1_0, f: null, g: ~, h: '~', i: 'null', yes: =, 1: 0x1F}"
    assert parse_yaml(text) == {
        "a": "no",
        "b": "010",
        "c": "22:22",
        "d": "2024-01-01",
        "e": "1_0",
        "f": None,
        "g": None,
        "h": "~",
        "i": "null",
        "yes": "=",
        "1": "0x1F",
    }
    assert parse_yaml("base: &b {x: 1}\nmore: {<<: *b, y: 2}") == {"base": {"x": "1"}, "more": {"x": "1", "y": "2"}}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"a: [", b"a: 1\na: 2", b"[]", b"[" * 1000):
        path = tmp_path / "c.yaml"
        path.write_bytes(content)
        with raises(ConfigError, path):
            read_yaml(path)


def test_a_folder_and_an_empty_file_are_called_so(tmp_path: Path) -> None:
    with raises(ConfigError, str(tmp_path), "folder"):
        read_yaml(tmp_path)
    (tmp_path / "empty.yaml").touch()
    with raises(ConfigError, "empty.yaml", "is empty"):
        read_yaml(tmp_path / "empty.yaml")
