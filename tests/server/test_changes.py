"""Changes of the weights in the background: begun, followed, cancelled, one at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from amalgam.composition.progress import LOADING
from amalgam.errors import PlanError
from amalgam.runtime.jobs import Job
from tests.server.conftest import serving, wait_until, wait_until_ready
from tests.server.fakes import FakeDeployment, fake_settings

MAPPING = {"weight_mapping": {"a.weight": "int4", "b.weight": "fp8"}}


class HeldDeployment(FakeDeployment):
    """A fake whose changes read four weights, and stop after `held_after` of them until `go_on` is set."""

    held_after = 4
    refusal: Exception | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.go_on = threading.Event()

    def update_weight_mapping(self, mapping: dict[str, str]) -> Any:
        job = self.jobs.running
        assert job is not None
        job.begin_stage(LOADING, 4)
        for done in range(1, 5):
            job.report(LOADING, done * 10, 40)
            while done == self.held_after and not self.go_on.wait(0.01):
                job.check()
        if self.refusal is not None:
            raise self.refusal
        return super().update_weight_mapping(mapping)


@pytest.fixture(scope="module")
def deployment() -> HeldDeployment:
    return HeldDeployment()


@pytest.fixture(scope="module")
def client(deployment: HeldDeployment) -> Iterator[httpx.Client]:
    with serving(fake_settings(port=0), lambda: deployment) as base_url:
        wait_until_ready(base_url)
        with httpx.Client(base_url=base_url, timeout=60) as client:
            yield client


@contextmanager
def held(deployment: HeldDeployment, after: int) -> Iterator[None]:
    deployment.held_after, deployment.refusal = after, None
    deployment.go_on.clear()
    yield
    deployment.go_on.set()
    job: Job | None = deployment.jobs.running
    if job is not None:
        job.wait()


def events_of(client: httpx.Client, change_id: str) -> list[tuple[str, dict[str, Any]]]:
    answer = client.get(f"/weights/changes/{change_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in answer.text.split("\n\n") if block]
    assert blocks.pop() == {"data": "[DONE]"}
    return [(block["event"], json.loads(block["data"])) for block in blocks]


def test_a_change_is_begun_followed_and_remembered(client: httpx.Client, deployment: HeldDeployment) -> None:
    with held(deployment, after=3):
        started = client.post("/weights/changes", json=MAPPING)
        assert started.status_code == 202
        change = started.json()
        assert (change["kind"], change["what"], change["state"]) == ("mapping", "2 rules", "running")
        path = f"/weights/changes/{change['id']}"
        assert f"/{started.headers['location']}" == path
        wait_until(lambda: client.get(path).json()["num_done"] == 3)
        now = client.get(path).json()
        assert (now["stage"], now["done_bytes"], now["total_bytes"], now["num_weights"]) == (LOADING, 30, 40, 4)
        assert client.get("/weights/changes").json()["running"] == change["id"]
        assert client.get("/weights").json()["change"]["id"] == change["id"]

        refused = client.post("/weights/changes", json={"reload": True})
        assert refused.status_code == 409
        assert refused.json()["error"]["change"]["id"] == change["id"]
        assert refused.json()["error"]["change"]["num_done"] == 3

        deployment.go_on.set()
        events = events_of(client, change["id"])
    names = [name for name, _ in events]
    assert names[-1] == "done" and set(names[:-1]) <= {"progress"}
    assert events[-1][1]["version"] == client.get("/").json()["weight_version"]
    listed = client.get("/weights/changes").json()
    assert listed["running"] is None
    assert listed["changes"][-1] == events[-1][1]


def test_a_change_is_cancelled(client: httpx.Client, deployment: HeldDeployment) -> None:
    version = client.get("/").json()["weight_version"]
    with held(deployment, after=1):
        path = f"/weights/changes/{client.post('/weights/changes', json=MAPPING).json()['id']}"
        assert client.delete(path).status_code == 200
        wait_until(lambda: client.get(path).json()["state"] != "running")
    ended = client.get(path).json()
    assert (ended["state"], ended["version"]) == ("cancelled", version)
    assert events_of(client, ended["id"]) == [("cancelled", ended)]
    assert client.delete(path).status_code == 409
    assert client.get("/").json()["weight_version"] == version


def test_a_change_that_fails_says_why(client: httpx.Client, deployment: HeldDeployment) -> None:
    deployment.refusal = PlanError("Pattern 'x' matches nothing.")
    path = f"/weights/changes/{client.post('/weights/changes', json=MAPPING).json()['id']}"
    wait_until(lambda: client.get(path).json()["state"] != "running")
    ended = client.get(path).json()
    deployment.refusal = None
    assert (ended["state"], ended["error_type"]) == ("failed", "invalid_plan")
    assert ended["error"] == "Pattern 'x' matches nothing."


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({**MAPPING, "reload": True}, 422),
        ({"weight_mapping": {}}, 422),
        ({"weight_mapping": {"a": 1}}, 422),
        ({"rollback": True, "name": "b"}, 422),
        ({"rollback": True, **MAPPING}, 422),
        ({"mapping": {"a": "b"}}, 422),
    ],
)
def test_a_body_asks_for_one_change(client: httpx.Client, body: dict[str, Any], status: int) -> None:
    assert client.post("/weights/changes", json=body).status_code == status


@pytest.mark.parametrize("path", ["/weights/changes/nobody", "/weights/changes/nobody/events"])
def test_a_change_that_nobody_knows(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")
