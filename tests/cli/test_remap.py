"""`amalgam remap` against a server of the demo model, and one whose changes wait."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.conftest import write_demo_config
from tests.server.conftest import serving, wait_until
from tests.server.fakes import fake_settings
from tests.server.test_changes import HeldDeployment, held

from amalgam.cli import INTERRUPTED, main
from amalgam.cli.server import Server
from amalgam.config.reading import load_settings
from amalgam.runtime.opening import open_deployment

EXPERT = "model.layers.0.mlp.experts.3"


@pytest.fixture(scope="module")
def config(derived: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_config(tmp_path_factory.mktemp("remap"), derived)


@pytest.fixture(scope="module")
def url(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    exports = str(tmp_path_factory.mktemp("exports"))
    overrides = {"server.port": 0, "server.export_dir": exports, "inference.max_seq_length": 128}
    settings = load_settings(config, overrides, {})
    with serving(settings, lambda: open_deployment(settings)) as address:
        wait_until(lambda: httpx.get(address + "/ready", timeout=60).status_code == 200)
        yield address


class Remap:
    """The verb against one server."""

    def __init__(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = url
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = main(["remap", *arguments, "--url", self.url])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def json(self, *arguments: str) -> Any:
        code, out, err = self(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def remap(url: str, capsys: pytest.CaptureFixture[str]) -> Remap:
    return Remap(url, capsys)


def rules_of(remap: Remap) -> dict[str, str]:
    current = remap.json("--versions")["versions"][0]
    return {rule["pattern"]: rule["source"] for rule in current["rules"]}


def test_rules_are_tried_given_removed_and_taken_back(remap: Remap, config: Path) -> None:
    first = rules_of(remap)
    rule = f"{EXPERT}.*=base"
    plan = remap.json(rule, "--dry-run")
    assert plan["num_changed"] > 0
    assert rules_of(remap) == first

    done = remap.json(rule)
    assert (done["state"], done["num_changed"]) == ("done", plan["num_changed"])
    assert rules_of(remap) == first | {f"{EXPERT}.*": "base"}
    code, out, _ = remap("--remove", f"{EXPERT}.*", f"{EXPERT}.up_proj.weight=fp8")
    assert code == 0
    assert f"{EXPERT}." in out.splitlines()[1] and "live" in out.splitlines()[-1]
    assert rules_of(remap) == first | {f"{EXPERT}.up_proj.weight": "fp8"}
    assert remap("--rollback")[0] == 0
    assert rules_of(remap) == first | {f"{EXPERT}.*": "base"}
    assert remap.json("--like", str(config))["kind"] == "rules"
    assert rules_of(remap) == first
    assert remap.json("--to", str(done["version"]))["state"] == "done"
    assert rules_of(remap) == first | {f"{EXPERT}.*": "base"}

    current = remap.json("--versions")["current"]
    named = remap.json(f"{EXPERT}.down_proj.weight=fp8", "--name", "other")
    assert named["name"] == "other"
    found = {version["version"]: version for version in remap.json("--versions")["versions"]}
    assert remap.json("--versions")["current"] == current
    assert found[named["version"]]["names"] == ["other"]
    code, out, _ = remap("--versions")
    assert code == 0 and "other" in out

    listed = remap.json("--list")["changes"]
    assert [change["state"] for change in listed] == ["done"] * 6
    code, out, _ = remap("--list")
    assert [line.split("\t")[0] for line in out.splitlines()[1:]] == [change["id"] for change in listed]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["model.layers.99.*=fp8"], 4),
        (["model.*=nobody"], 4),
        (["--remove", "model.nothing"], 4),
        (["--to", "nobody"], 4),
        (["--reload", "--name", "no such name"], 2),
        (["--cancel"], 2),
        ([], 2),
        (["no-rule"], 2),
        (["a=b", "--remove", "a"], 2),
        ([f"{EXPERT}.*=fp8", f"{EXPERT}.*=int4"], 2),
        (["--remove", "a", "--remove", "a"], 2),
        (["--reload", "--name", ""], 2),  # the variable that was to hold it is empty: nothing goes live
        (["--reload", "--name", "current", "--dry-run"], 2),
        (["a=b", "--rollback"], 2),
        (["--list", "--dry-run"], 2),
        (["--rollback", "--dry-run"], 2),
        (["a=b", "--dry-run", "--detach"], 2),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(remap: Remap, arguments: list[str], code: int) -> None:
    before = remap.json("--versions")["current"]
    found, out, err = remap(*arguments)
    assert (found, out) == (code, "") and err
    assert remap.json("--versions")["current"] == before


def test_an_interrupt_cancels_the_change(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = HeldDeployment()
    events = Server.events

    def interrupted(server: Server, path: str) -> Iterator[tuple[str, Any]]:
        yield next(events(server, path))
        raise KeyboardInterrupt

    with serving(fake_settings(port=0), lambda: deployment) as address:
        wait_until(lambda: httpx.get(address + "/ready", timeout=60).status_code == 200)
        remap = Remap(address, capsys)
        with held(deployment, after=1):
            begun = remap.json("a=b", "--detach")
            assert begun["state"] == "running"
            code, _, err = remap("c=d")
            assert code == 5 and begun["id"] in err
            assert remap.json("--cancel")["id"] == begun["id"]
            wait_until(lambda: deployment.jobs.running is None)
            monkeypatch.setattr(Server, "events", interrupted)
            code, out, err = remap("a=b")
            assert (code, out) == (INTERRUPTED, "")
            wait_until(lambda: deployment.jobs.running is None)
        assert [status.state for status in deployment.jobs.read()] == ["cancelled", "cancelled"]
    assert remap("--list")[0] == 6
