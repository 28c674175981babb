"""`amalgam remap` and `amalgam trial` against a server of the demo model, and one whose changes wait."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.conftest import write_demo_config
from tests.server.conftest import serving, wait_until, wait_until_ready
from tests.server.fakes import fake_settings
from tests.server.test_changes import HeldDeployment, held

from amalgam.cli import INTERRUPTED, main, trial
from amalgam.cli.remap_view import NO_CHANGE
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
        wait_until_ready(address)
        yield address


class Verb:
    """A verb against one server."""

    def __init__(self, name: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.name, self.url = name, url
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = main([self.name, *arguments, "--url", self.url])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def json(self, *arguments: str) -> Any:
        code, out, err = self(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def remap(url: str, capsys: pytest.CaptureFixture[str]) -> Verb:
    return Verb("remap", url, capsys)


@pytest.fixture
def tried(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Verb:
    monkeypatch.setattr(trial, "POLL_SECONDS", 0.05)
    return Verb("trial", url, capsys)


def rules_of(remap: Verb) -> dict[str, str]:
    current = remap.json("--versions")["versions"][0]
    return {rule["pattern"]: rule["source"] for rule in current["rules"]}


def test_a_rule_that_decides_nothing_is_told(remap: Verb) -> None:
    """More specific rules hold for every expert of the layer, and the rest of it comes from base already."""
    rule = "model.layers.0.*=base"
    assert remap.json(rule, "--dry-run")["num_changed"] == 0
    code, out, _ = remap(rule, "--dry-run")
    assert code == 0 and NO_CHANGE in out


def test_rules_are_tried_given_removed_and_taken_back(remap: Verb, config: Path) -> None:
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

    # In what it differs, and how it was made; then it is kept, and loses its name.
    differing = remap.json("--diff", "current", "other")
    assert (differing["before"], differing["after"]) == (current, named["version"])
    assert differing["num_changed"] == 1
    assert remap("--diff", "current", "other")[1].splitlines()[-1].endswith("differ in 1 weight.")
    assert remap.json("--status", named["id"]) == remap.json("--follow", named["id"])
    assert f"Version {named['version']} is called other" in remap("--status", named["id"])[1]
    assert remap.json("--pin", "other") == {"weight_version": named["version"], "pinned": True}
    assert remap.json("--unname", "other") == {"name": "other", "weight_version": named["version"]}
    found = {version["version"]: version for version in remap.json("--versions")["versions"]}
    assert found[named["version"]]["states"] == ["pinned"]
    assert remap.json("--unpin", str(named["version"])) == {"weight_version": named["version"], "pinned": False}
    assert remap("--unpin", str(named["version"]))[0] == 2

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
        (["--pin", "nobody"], 2),
        (["--pin", ""], 2),
        (["--unpin", "current"], 2),
        (["--unname", "no/body"], 2),
        (["--unname", "nobody", "--name", "other"], 2),
        (["--status", "nobody"], 2),
        (["--follow", "no body", "--detach"], 2),
        (["--diff", "current", "nobody"], 2),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(remap: Verb, arguments: list[str], code: int) -> None:
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
        wait_until_ready(address)
        remap = Verb("remap", address, capsys)
        with held(deployment, after=1):
            begun = remap.json("a=b", "--detach")
            assert begun["state"] == "running"
            code, _, err = remap("c=d")
            assert code == 5 and begun["id"] in err
            assert "1 of 4 weights" in remap("--status", begun["id"])[1]
            assert remap.json("--cancel")["id"] == begun["id"]
            wait_until(lambda: deployment.jobs.running is None)
            assert remap("--follow", begun["id"])[0] == 5
            monkeypatch.setattr(Server, "events", interrupted)
            code, out, err = remap("a=b")
            assert (code, out) == (INTERRUPTED, "")
            wait_until(lambda: deployment.jobs.running is None)
            code, out, _ = remap("a=b", "--detach")
            [last] = [status.id for status in deployment.jobs.read() if status.state == "running"]
            assert code == 0 and last in out
            assert remap("--follow", last)[0] == INTERRUPTED  # and leaves the change alone
        wait_until(lambda: deployment.jobs.running is None)
        assert [status.state for status in deployment.jobs.read()] == ["cancelled", "cancelled", "done"]
    assert remap("--list")[0] == 6


def test_a_shadow_and_a_canary_are_begun_waited_for_and_promoted(remap: Verb, tried: Verb) -> None:
    made = remap.json(f"{EXPERT}.*=int4", "--name", "small")["version"]
    assert {report["state"] for report in tried.json().values()} == {"none"}
    limits = ("--min-requests", "2", "--max-divergence", "100", "--min-agreement", "0")
    begun = tried.json("shadow", "small", "--share", "1", *limits)
    assert (begun["candidate"], begun["share"], begun["automatic"]) == (made, 1.0, False)
    assert begun["limits"] == {"min_requests": 2, "max_divergence": 100, "min_agreement": 0, "max_slowdown": None}
    with httpx.Client(base_url=tried.url, timeout=60) as client:
        for seed in range(10):  # of fewer, an interval says nothing
            client.post("/generate", json={"prompt": "The sea", "max_new_tokens": 3, "seed": seed}).raise_for_status()
    code, out, err = tried("shadow", "--wait")
    assert code == 0, err
    assert f"Shadow of version {made} (small)" in out and "divergence\t" in out and "Verdict: promote." in out
    assert tried("shadow", "small")[0] == 5
    assert tried.json("shadow", "--end")["state"] == "aborted"
    assert tried("shadow", "--wait")[0] == 4
    assert tried("shadow", "--end")[0] == 5

    tried.json("canary", "small", "--share", "0", "--max-error-increase", "0.5", "--automatic")
    changed = tried.json("canary", str(made), "--share", "0.25", "--max-slowdown", "9")
    assert (changed["share"], changed["limits"]["max_slowdown"], changed["automatic"]) == (0.25, 9, False)
    code, out, _ = tried()
    assert code == 0 and "Verdict: undecided." in out and "candidate\t0\t0\t–\t–" in out
    code, out, _ = tried("canary", "--promote")
    assert code == 0 and f"Version {made} is live" in out
    assert remap.json("--versions")["current"] == made
    assert tried("canary", "--wait")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["canary", "nobody"],
        ["canary", "current", "--share", "2"],
        ["canary", "--share", "0.5"],
        ["canary", "current", "--max-divergence", "1"],
        ["shadow", "current", "--max-error-increase", "1"],
        ["shadow", "--promote", "--end"],
        ["shadow", "current", "--end"],
        ["--promote"],
        ["nothing"],
    ],
)
def test_what_cannot_be_tried_is_said(tried: Verb, arguments: list[str]) -> None:
    before = tried.json()
    code, out, err = tried(*arguments)
    assert (code, out) == (2, "") and err
    assert tried.json() == before
