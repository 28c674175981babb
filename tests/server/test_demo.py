"""The server with the demo model behind it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from amalgam.config.reading import load_settings
from amalgam.config.settings import build_settings
from amalgam.engine.runner import Runner
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from tests.server.conftest import serving, wait_until

DEMO = Path(__file__).parents[2] / "models" / "demo"
MAX_TOKENS = 128
PROMPTS = ["It was a dark night, and", "床前明月光，", "def fibonacci(n):\n"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Deployment]]:
    settings = build_settings(
        {
            "model": {
                "base_path": str(DEMO),
                "mixed_precision": {
                    "int8_path": str(tmp_path_factory.mktemp("int8") / "demo"),
                    "derived": {"int8": {"format": "int8"}},
                },
            },
            "inference": {"device_map": "cpu", "max_seq_length": MAX_TOKENS},
            "engine": {"num_threads": 1, "rollback_answers": 0},
            "server": {"port": 0, "export_dir": str(tmp_path_factory.mktemp("exports"))},
        }
    )
    opened: list[Deployment] = []

    def open_and_keep() -> Deployment:
        opened.append(open_deployment(settings))
        return opened[0]

    with serving(settings, open_and_keep) as base_url, httpx.Client(base_url=base_url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200, 60)
        yield client, opened[0]


def generate(client: httpx.Client, prompt: str = PROMPTS[0], **fields: Any) -> dict[str, Any]:
    response = client.post("/generate", json={"prompt": prompt, "max_new_tokens": 12, "seed": 1, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def is_idle(deployment: Deployment) -> bool:
    status = deployment.engine.status()
    return not status.num_running and not status.num_waiting and status.num_free_blocks == status.num_blocks


def test_streamed_text_is_the_whole_text(demo: tuple[httpx.Client, Deployment]) -> None:
    client, _ = demo
    for prompt in PROMPTS:
        whole = generate(client, prompt)
        with client.stream(
            "POST", "/generate", json={"prompt": prompt, "max_new_tokens": 12, "seed": 1, "stream": True}
        ) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        pieces = [httpx.Response(200, text=line).json() for line in lines[:-1]]
        assert "".join(piece["text"] for piece in pieces) == whole["generated_text"]
        assert pieces[-1]["generated_tokens"] == whole["generated_tokens"] <= 12


def test_a_batch_equals_its_prompts_alone(demo: tuple[httpx.Client, Deployment]) -> None:
    client, _ = demo
    alone = [generate(client, prompt)["generated_text"] for prompt in PROMPTS]
    batch = client.post("/batch_generate", json={"prompts": PROMPTS, "max_new_tokens": 12, "seed": 1}).json()
    assert batch["generated_texts"] == alone


def test_what_does_not_fit(demo: tuple[httpx.Client, Deployment]) -> None:
    client, _ = demo
    clipped = client.post("/generate", json={"prompt": PROMPTS[0], "temperature": 0}).json()
    assert (clipped["total_tokens"], clipped["finish_reason"]) == (MAX_TOKENS, "length")
    response = client.post("/generate", json={"prompt": "night " * 400})
    assert response.status_code == 413
    message = response.json()["error"]["message"]
    assert str(MAX_TOKENS - 1) in message  # one more has to fit
    assert any(part.isdigit() and int(part) > MAX_TOKENS for part in message.split())


@pytest.mark.parametrize("is_stream", [True, False])
def test_leaving_frees_the_engine(
    demo: tuple[httpx.Client, Deployment], monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    client, deployment = demo
    engine, num_steps, is_cancelled = deployment.engine, count(1), threading.Event()
    execute, cancel, is_held = Runner.execute, engine.cancel, threading.Event()

    def held_execute(runner: Runner, plan: Any) -> Any:
        if next(num_steps) == 4:  # the answer cannot end before the client has left
            is_held.set()
            assert is_cancelled.wait(60)
        return execute(runner, plan)

    def noted_cancel(request_id: int) -> None:
        cancel(request_id)
        is_cancelled.set()

    monkeypatch.setattr(Runner, "execute", held_execute)
    monkeypatch.setattr(engine, "cancel", noted_cancel)
    body = {"prompt": PROMPTS[0], "temperature": 0, "stream": is_stream}
    with closing(HTTPConnection(client.base_url.netloc.decode(), timeout=60)) as leaver:
        leaver.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        if is_stream:
            assert leaver.getresponse().readline().startswith(b"data: ")
        assert is_held.wait(60)
    wait_until(lambda: is_idle(deployment))
    assert next(num_steps) == 5  # none after it


def test_statistics_are_exact(demo: tuple[httpx.Client, Deployment]) -> None:
    client, deployment = demo
    client.post("/reset_expert_stats")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: generate(client, prompt), PROMPTS * 2))
    # The last token of each request is sampled and never computed.
    num_tokens = sum(answer["total_tokens"] - 1 for answer in answers)
    wait_until(lambda: is_idle(deployment))
    summary = client.get("/expert_stats").json()["summary"]
    assert summary["total_requests"] == 6
    assert summary["total_tokens"] == num_tokens
    assert summary["total_activations"] == num_tokens * 4 * 6  # active experts × layers


def test_weights_change_under_load_without_an_error(demo: tuple[httpx.Client, Deployment]) -> None:
    client, _ = demo
    info = client.get("/model_info").json()
    assert info["sources"].keys() == {"base", "int8"}
    before = generate(client, temperature=0)
    with ThreadPoolExecutor(5) as pool:
        load = [pool.submit(generate, client, temperature=0) for _ in range(12)]
        remap = client.post("/update_weight_mapping", json={"weight_mapping": {"model.layers.*.mlp.experts.*": "int8"}})
        answers = [item.result() for item in load]
    assert remap.status_code == 200, remap.text
    assert remap.json()["num_changed"] == 6 * 16 * 3
    after = generate(client, temperature=0)
    assert after["weight_version"] == remap.json()["weight_version"] == before["weight_version"] + 1
    texts = {item["weight_version"]: item["generated_text"] for item in (before, after)}
    assert all(item["generated_text"] == texts[item["weight_version"]] for item in answers)

    reload = client.post("/reload_weights").json()
    assert (reload["num_changed"], reload["previous_version"]) == (0, after["weight_version"])


def test_a_mapping_that_cannot_be_fulfilled_changes_nothing(demo: tuple[httpx.Client, Deployment]) -> None:
    client, _ = demo
    version = client.get("/").json()["weight_version"]
    for mapping in ({"model.layers.99.*": "int8"}, {"model.layers.0.*": "fp3"}, {"[": "int8"}, {"*": "../etc"}):
        response = client.post("/update_weight_mapping", json={"weight_mapping": mapping})
        assert 400 <= response.status_code < 500, response.text
        assert response.json()["error"]["message"]
    assert client.get("/").json()["weight_version"] == version
    assert generate(client)["generated_tokens"] == 12


def test_versions_side_by_side(demo: tuple[httpx.Client, Deployment]) -> None:
    """A dry run, a named plan beside the current one, pins, the difference, going back: what is told of each is so."""
    client, _ = demo
    first, experts = generate(client), {"model.layers.{0-2}.mlp.experts.*": "base"}

    dry = client.post("/update_weight_mapping", json={"weight_mapping": experts, "dry_run": True}).json()
    assert dry["dry_run"] and dry["has_room"] and generate(client) | {"timings": 0} == first | {"timings": 0}
    assert dry == client.post("/weights/plan", json={"weight_mapping": experts}).json() | {
        name: dry[name] for name in ("seconds", "available_bytes")
    }
    detailed = client.post("/weights/plan", json={"weight_mapping": experts, "details": True}).json()
    assert detailed["rules"][-1] == {"pattern": "model.layers.{0-2}.mlp.experts.*", "source": "base"}
    named = client.put("/weights/named/wide", json={"weight_mapping": experts, "details": True}).json()
    assert named["name"] == "wide" and named["num_changed"] == dry["num_changed"] == len(named["changed"])
    assert generate(client)["weight_version"] == first["weight_version"]
    idle = httpx.Client(base_url=client.base_url, timeout=60)  # a connection that stays open keeps nothing in memory
    wide = generate(idle, weights="wide")
    assert wide["weight_version"] == named["weight_version"] != first["weight_version"]

    difference = client.get("/weights/difference?before=wide&details=true").json()
    assert (difference["before"], difference["after"]) == (named["weight_version"], first["weight_version"])
    assert difference["num_changed"] == len(difference["changed"]) == dry["num_changed"]

    pinned = client.put(f"/weights/pins/{first['weight_version']}").json()
    assert pinned == {"weight_version": first["weight_version"], "pinned": True}
    assert client.post("/weights/rollback", json={"version": "wide"}).json()["num_loaded"] == 0
    told = client.get("/weights").json()
    assert told["current"] == named["weight_version"]
    assert [one["states"] for one in told["versions"]] == [["current", "named"], ["pinned"]]
    assert client.get("/weights/versions/wide").json()["rules"] == client.get("/model_info").json()["rules"]
    assert generate(client)["generated_text"] == wide["generated_text"]

    assert client.post("/weights/rollback").json()["weight_version"] == first["weight_version"]
    assert client.delete(f"/weights/pins/{first['weight_version']}").json()["pinned"] is False
    assert client.delete("/weights/named/wide").json() == {"name": "wide", "weight_version": named["weight_version"]}
    wait_until(lambda: len(client.get("/weights").json()["versions"]) == 1)
    assert generate(client)["generated_text"] == first["generated_text"]
    idle.close()

    for method, path, body, status in (
        ("PUT", "/weights/pins/9999", None, 404),
        ("DELETE", "/weights/pins/9999", None, 404),
        ("DELETE", "/weights/named/wide", None, 404),
        ("PUT", "/weights/named/7", {"version": "current"}, 422),
        ("PUT", "/weights/named/x", {}, 422),
        ("PUT", "/weights/named/x", {"version": 1, "reload": True}, 422),
        ("POST", "/weights/rollback", {"version": 9999}, 404),
        ("POST", "/weights/plan", {"rules": [{"pattern": "no.such", "source": "base"}]}, 422),
        ("POST", "/update_weight_mapping", {"weight_mapping": {"no.such": None}}, 422),
        ("GET", "/weights/difference?before=9999", None, 404),
        ("GET", "/weights/versions/9999", None, 404),
    ):
        answer = client.request(method, path, json=body)
        assert answer.status_code == status and answer.json()["error"]["message"], (path, answer.text)


def test_the_expert_tracking_example_prints_the_busiest(demo: tuple[httpx.Client, Deployment]) -> None:
    client, _ = demo
    command = [sys.executable, "examples/test_expert_tracking.py", "--base-url", str(client.base_url)]
    result = subprocess.run(
        [*command, "--max-new-tokens", "4"], cwd=DEMO.parents[1], capture_output=True, text=True, timeout=60, check=True
    )
    for domain in ("English prose", "Chinese verse", "Python"):
        assert f"{domain}: " in result.stdout
    assert result.stdout.count("layer  expert  activations  of its layer") == 3


def test_the_manifest_names_every_weight(demo: tuple[httpx.Client, Deployment]) -> None:
    client, deployment = demo
    document = client.get("/manifest").json()
    assert document["fingerprint"] == deployment.version.fingerprint
    assert len(document["weights"]) == len(deployment.version.origins)
    assert all(part["nbytes"] for weight in document["weights"] for part in weight["parts"])
    layouts = {weight["slot"]: weight["layout"] for weight in document["weights"]}
    assert layouts == {slot: deployment.version[slot].layout.name for slot in deployment.version.origins}
    digested = client.get("/manifest?sha256=true").json()
    assert digested["fingerprint"] == document["fingerprint"]
    for weight in digested["weights"]:
        for part in weight["parts"]:
            with open(part["file"], "rb") as file:
                file.seek(part["offset"])
                assert hashlib.sha256(file.read(part["nbytes"])).hexdigest() == part.pop("sha256")
    assert digested == document
    assert client.get("/manifest?sha256=perhaps").status_code == 422


def test_the_walk_of_the_dashboard_can_be_walked(derived: Path, tmp_path: Path) -> None:
    """With the demo's own configuration and traffic an expert is hot and narrow, and in a wider source it is not."""
    text = (DEMO.parents[1] / "config" / "model_config.yaml").read_text(encoding="utf-8")
    path = tmp_path / "model_config.yaml"
    path.write_text(
        text.replace("../models/demo-", f"{derived}/").replace("../models/demo", str(DEMO)), encoding="utf-8"
    )
    fixed = {
        "inference.device_map": "cpu",
        "server.port": 0,
        "server.export_dir": str(tmp_path),
        "engine.num_threads": 1,
    }
    settings = load_settings(path, {**fixed, "inference.max_seq_length": MAX_TOKENS}, {})
    with serving(settings, lambda: open_deployment(settings)) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200, 60)
        command = [sys.executable, "examples/demo_traffic.py", "--base-url", url, "--rounds", "2"]
        result = subprocess.run(command, cwd=DEMO.parents[1], capture_output=True, text=True, timeout=60, check=True)
        assert f"{url}/dashboard" in result.stdout
        assert {row["label"] for row in client.get("/experts/labels").json()["labels"]} == {"prose", "verse", "code"}

        def hot_narrow() -> set[tuple[int, int]]:
            hints = client.get("/experts/hints").json()["hints"]
            return {(hint["layer_id"], hint["expert_id"]) for hint in hints if hint["kind"] == "hot_narrow"}

        assert (5, 0) in hot_narrow()
        client.post("/update_weight_mapping", json={"weight_mapping": {"model.layers.5.mlp.experts.0.*": "fp8"}})
        assert (5, 0) not in hot_narrow()
