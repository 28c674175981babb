"""Settings of a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from amalgam.cluster.settings import check_settings, prepared, settings_of_replicas
from amalgam.config.settings import build_settings
from amalgam.errors import ConfigError
from tests.errors import raises
from tests.server.fakes import fake_settings


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("weights", "watch_seconds", 1.0), ("weights", "resume", True), ("statistics", "file", "s.npz")],
)
def test_what_is_of_one_server_is_refused(section: str, name: str, value: object) -> None:
    with raises(ConfigError, f"{section}.{name}"):
        check_settings(fake_settings(port=0).replace(**{section: {name: value}}))


def test_paths_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    settings = build_settings({
        "model": {
            "base_path": "models/base",
            "mixed_precision": {
                "fp8_path": "models/fp8", "int4_path": "org/int4", "derived": {"fp8": {"format": "fp8"}},
            },
        },
        "server": {"tls_cert": "cert.pem", "api_keys_file": "keys", "export_dir": "stats/out", "api_keys": ["k"]},
        "inference": {"packed_cache": "cache"},
        "weights": {"history": "h.jsonl"},
        "statistics": {"reference": "before.npz"},
        "speculation": {"draft": "org/small"},
        "filters": {"rules": [{"name": "words", "words_file": "lists/words.txt"}]},
    })  # fmt: skip
    found = prepared(settings, is_local=True)
    sources = found.model.mixed_precision.sources
    assert found.model.base_path == str(tmp_path / "models/base")
    assert sources == {"fp8": str(tmp_path / "models/fp8"), "int4": "org/int4"}  # made yet; of the hub
    assert (found.speculation.draft, found.server.tls_key) == ("org/small", "")
    for path, name in (
        (found.server.tls_cert, "cert.pem"),
        (found.server.api_keys_file, "keys"),
        (found.server.export_dir, "stats/out"),
        (found.inference.packed_cache, "cache"),
        (found.weights.history, "h.jsonl"),
        (found.statistics.reference, "before.npz"),
        (found.filters.rules[0].words_file, "lists/words.txt"),
    ):
        assert path == str(tmp_path / name)
    (tmp_path / "org/small").mkdir(parents=True)
    assert prepared(settings, is_local=True).speculation.draft == str(tmp_path / "org/small")
    assert found.server.api_keys == settings.server.api_keys


def test_replicas_get_no_keys_and_no_history() -> None:
    settings = fake_settings(port=0, api_keys=("k1",), admin_key="k2").replace(weights={"history": "h"})
    found = settings_of_replicas(settings)
    assert (found.server.api_keys, found.server.admin_key, found.weights.history) == ((), None, "")
