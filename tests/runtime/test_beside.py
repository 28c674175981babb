"""Named plans and pins: declared, made at the start, and there again after a restart."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from amalgam.config.reading import load_settings
from amalgam.errors import AmalgamError, ConfigError, OutOfMemoryError, PlanError
from amalgam.runtime import beside
from amalgam.runtime.changes import ChangeRequest
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.history import HistoryFile
from amalgam.runtime.opening import open_deployment
from tests.conftest import DEMO
from tests.errors import raises
from tests.server.conftest import serving, wait_until_ready

UP = "model.layers.1.mlp.experts.{}.up_proj.weight"
Opened = Callable[..., Deployment]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo once more, as another source."""
    return Path(shutil.copytree(DEMO, tmp_path_factory.mktemp("sources") / "other"))


@pytest.fixture
def history(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


@pytest.fixture
def config(tmp_path: Path, other: Path, history: Path) -> Path:
    path = tmp_path / "config.yaml"
    content = {
        "model": {"base_path": str(DEMO), "mixed_precision": {"other_path": str(other)}},
        "inference": {"max_seq_length": 64},
        "weights": {"history": str(history), "resume": True, "named": {"small": {UP.format(2): "other"}}},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture
def opened(config: Path) -> Iterator[Opened]:
    """Opens the model, `opened(**{"weights.resume": False})`; the one before is closed."""
    last: list[Deployment] = []

    def opened(**overrides: Any) -> Deployment:
        while last:
            last.pop().close()
        last.append(open_deployment(load_settings(config, overrides, {})))
        return last[-1]

    yield opened
    for deployment in last:
        deployment.close()


def names_of(deployment: Deployment) -> dict[str, int]:
    return {name: live.version.version_id for live in deployment.versions.live() for name in live.names}


def test_a_declared_plan_is_there_from_the_start(opened: Opened) -> None:
    deployment = opened()
    [current, small] = deployment.versions.live()
    assert (current.names, small.names, small.version.version_id) == ((), ("small",), 2)
    [origin] = [origin for origin in small.version.origins.values() if origin.source == "other"]
    assert origin.name == UP.format(2)
    shared = [small.version[slot] is current.version[slot] for slot in small.version.keys]
    assert shared.count(False) == 1
    assert deployment.update_weight_mapping({UP.format(3): "other"}).version == 3
    assert names_of(deployment) == {"small": 2}
    assert deployment.rules_of(2) == small.served.rules


def test_names_and_pins_are_there_again(opened: Opened) -> None:
    deployment = opened()
    deployment.change(ChangeRequest({UP.format(1): "other"}, name="wide"))
    deployment.change(ChangeRequest(version="wide", name="broad"))
    deployment.change(ChangeRequest({UP.format(0): "other"}, name="gone"))
    deployment.versions.remove_name("gone")
    deployment.change(ChangeRequest({UP.format(4): "other"}))
    deployment.versions.pin(1)
    fingerprint = deployment.versions.find("wide").version.fingerprint

    deployment = opened()
    wide = deployment.versions.find("wide")
    assert wide.version.fingerprint == fingerprint
    assert names_of(deployment) == {"wide": 3, "broad": 3, "small": 7}
    assert deployment.versions.find(1).rules == ()
    assert [live.states for live in deployment.versions.live() if live.version.version_id == 1] == [("pinned",)]
    deployment.versions.unpin(1)
    deployment.versions.remove_name("broad")

    deployment = opened()
    assert names_of(deployment) == {"wide": 3, "small": 9}
    assert [live.version.version_id for live in deployment.versions.live()] == [8, 9, 3]
    assert names_of(opened(**{"weights.resume": False})) == {"small": 11}
    assert names_of(opened()) == {"small": 13}  # the process before had no others


def test_a_request_asks_for_a_plan_by_its_name_before_and_after_a_restart(opened: Opened, config: Path) -> None:
    opened().change(ChangeRequest({UP.format(1): "other"}, name="wide"))
    settings = load_settings(config, {"server.port": 0, "server.export_dir": str(config.parent)}, {})
    for _ in range(2):
        deployment = opened()
        expected = names_of(deployment)
        with serving(settings, lambda d=deployment: d) as url:  # type: ignore[misc]
            wait_until_ready(url)
            for name in ("wide", "small"):
                body = {"prompt": "It was", "max_new_tokens": 1, "weights": name}
                answer = httpx.post(url + "/generate", json=body, timeout=60)
                assert (answer.status_code, answer.json()["weight_version"]) == (200, expected[name])


def test_what_is_declared_holds_against_what_was_there(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    deployment = opened()
    deployment.change(ChangeRequest({UP.format(5): "other"}, name="small"))
    assert names_of(deployment) == {"small": 3}
    small = opened().versions.find("small")
    assert [rule.pattern for rule in small.rules] == [UP.format(2)]
    assert [record.levelname for record in caplog.records if "weights.named.small" in record.message] == ["WARNING"]
    caplog.clear()
    opened()
    assert "weights.named.small" not in caplog.text  # they agree


def test_a_plan_that_cannot_be_fulfilled_any_more_is_left(
    opened: Opened, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deployment = opened()
    deployment.change(ChangeRequest({UP.format(1): "other"}, name="wide"))
    deployment.change(ChangeRequest({UP.format(0): "base"}, name="plain"))
    deployment.versions.pin(3)
    away = other.with_name("away")
    other.rename(away)
    try:
        deployment = opened(**{"weights.named": {}})
    finally:
        away.rename(other)
    assert list(names_of(deployment)) == ["plain"]
    assert "wide" in caplog.text and "version 3" in caplog.text


def test_a_pin_stands_for_bytes_and_a_name_for_rules(
    opened: Opened, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deployment = opened(**{"weights.named": {}})
    deployment.change(ChangeRequest({UP.format(1): "other"}, name="wide"))
    deployment.versions.pin(2)
    for file in other.glob("*.safetensors"):
        copy = file.with_suffix(".copy")
        shutil.copyfile(file, copy)
        os.replace(copy, file)
    deployment = opened(**{"weights.named": {}})
    assert names_of(deployment) == {"wide": 4}
    assert [live.states for live in deployment.versions.live()] == [("current",), ("named",)]
    assert "version 2" in caplog.text


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"12": {}}, "'12'"),
        ({"current": {}}, "current"),
        ({"a b": {}}, "'a b'"),
        ({"small": {"x": "nobody"}}, "nobody"),
        ({"small": {"": "base"}}, "weights.named"),
        ({"small": None}, "weights.named.small"),
        ({f"n{number}": {} for number in range(65)}, "64"),
    ],
)
def test_a_declaration_that_is_wrong_is_refused(config: Path, named: Any, told: str) -> None:
    with raises(ConfigError, told):
        load_settings(config, {"weights.named": named}, {})


@pytest.mark.parametrize(("mapping", "error"), [({"model.nothing": "base"}, PlanError), ({}, OutOfMemoryError)])
def test_a_declared_plan_that_cannot_be_made_ends_the_start_before_a_weight_is_read(
    config: Path, history: Path, monkeypatch: pytest.MonkeyPatch, mapping: dict[str, str], error: type[AmalgamError]
) -> None:
    if error is OutOfMemoryError:
        mapping = {UP.format(1): "other"}
        monkeypatch.setattr(beside, "available_bytes", lambda device: 0)
    told: list[str] = []
    settings = load_settings(config, {"weights.named": {"small": mapping}}, {})
    with raises(error, "weights.named.small"):
        open_deployment(settings, lambda what, done, total: told.append(what))
    assert told == []
    HistoryFile(history).close()  # nobody holds it


def test_what_was_kept_and_does_not_fit_any_more_is_left(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened().change(ChangeRequest({UP.format(1): "other"}, name="wide"))
    monkeypatch.setattr(beside, "available_bytes", lambda device: 0)
    assert names_of(opened(**{"weights.named": {"plain": {}}})) == {"plain": 5}  # takes nothing
    assert "wide" in caplog.text
