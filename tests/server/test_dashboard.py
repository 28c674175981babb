"""The dashboard's files and event stream, without a browser."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from amalgam.config.reading import load_settings
from amalgam.config.settings import build_settings
from amalgam.server.dashboard import events, pages
from amalgam.server.dashboard.events import EventHub
from amalgam.server.web.files import PageFile, digest_of
from tests.server.conftest import serving, wait_until, wait_until_ready
from tests.server.fakes import FakeDeployment, fake_settings
from tests.server.large import LargeDeployment
from tests.server.page_files import assert_one_meaning, assert_only_own_files, used_words

OWN = {name: file.content.decode() for name, file in pages.files().items() if name != pages.PLOTLY}
NUM_VIEWERS = 20


@pytest.fixture(scope="module")
def large() -> Iterator[httpx.Client]:
    deployment = LargeDeployment()
    with serving(fake_settings(port=0), lambda: deployment) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield client


@pytest.mark.parametrize("path", ["/dashboard", *(f"/dashboard/static/{name}" for name in pages.files())])
def test_files_come_with_a_strict_policy(shared_client: httpx.Client, path: str) -> None:
    response = shared_client.get(path)
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy and "data:" not in policy and "*" not in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    again = shared_client.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    plain = shared_client.get(path, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == response.content


def test_files_under_the_pages_digest_are_asked_for_once(shared_client: httpx.Client) -> None:
    """The address of another content is another one, and what is not known to be ours is asked for each time."""
    found = dict(re.findall(r'(?:src|href)="(dashboard/static/([0-9a-f]{12})/)', shared_client.get("/dashboard").text))
    [(folder, digest)] = found.items()
    caching = {
        path: shared_client.get(f"{path}page.css").headers["cache-control"]
        for path in (folder, "dashboard/static/", "dashboard/static/0123456789ab/")
    }
    assert caching.pop(folder) == "max-age=31536000, immutable"
    assert set(caching.values()) == {"no-cache"}
    for name in ("page.css", "panels/memory.js"):
        assert shared_client.get(folder + name).content == shared_client.get(f"dashboard/static/{name}").content
    assert shared_client.get("/dashboard").headers["cache-control"] == "no-cache"
    assert shared_client.get(f"dashboard/static/{digest}").status_code == 404
    changed = {**pages.files(), "page.css": PageFile(b"", "text/css")}
    assert digest_of(pages.files()) == digest != digest_of(changed)


def test_what_is_no_file_of_the_page(shared_client: httpx.Client) -> None:
    for name in (
        "",
        "nothing.js",
        "../pages.py",
        "..%2fpages.py",
        "%2e%2e/pages.py",
        "panels",
        "panels/",
        "/etc/passwd",
    ):
        response = shared_client.get(f"/dashboard/static/{name}", follow_redirects=True)
        assert response.status_code == 404, name
    assert shared_client.post("/dashboard", json={}).status_code == 405


def test_the_page_holds_no_inline_code_and_names_only_its_own_files() -> None:
    assert_only_own_files(OWN, "dashboard/static/")


def test_every_word_exists_in_both_languages() -> None:
    assert {"busiest", "most_different", "precision_hint", "stage"} <= used_words(OWN)  # one of each kind


def test_a_chinese_word_has_one_meaning() -> None:
    one_notion = [{"experts", "expert"}, {"share of its layer", "of its layer"}, {"generate", "generated"}]
    assert_one_meaning(OWN, [*one_notion, {"source", "sources"}, {"device", "devices"}])


def test_one_expert(large: httpx.Client) -> None:
    answer = large.get("/dashboard/expert", params={"layer_id": 3, "expert_id": 20}).json()
    stats = large.get("/expert_stats").json()["expert_stats"]
    [row] = [row for row in stats if (row["layer_id"], row["expert_id"]) == (3, 20)]
    use = answer["use"]
    assert use["activations"] == row["activation_count"]
    assert use["share"] == pytest.approx(row["layer_share"])
    assert use["gate_mass"] == pytest.approx(row["gate_mass"])
    busier = [
        other for other in stats if other["layer_id"] == 3 and other["activation_count"] > row["activation_count"]
    ]
    assert use["rank"] == len(busier) + 1
    assert [item["projection"] for item in answer["projections"]] == ["gate", "up", "down"]
    assert {item["bits"] for item in answer["projections"]} <= {4.0, 8.0, 16.0}


@pytest.mark.parametrize(
    "query",
    [
        "",
        "layer_id=0",
        "layer_id=0&expert_id=128",
        "layer_id=94&expert_id=0",
        "layer_id=-1&expert_id=0",
        "layer_id=x&expert_id=0",
        "layer_id=9223372036854775808&expert_id=0",
        "layer_id=0&expert_id=0&expert_id=1",
        "layer_id=0&expert_id=0&minutes=5",
    ],
)
def test_no_such_expert(large: httpx.Client, query: str) -> None:
    response = large.get(f"/dashboard/expert?{query}")
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": [{"role": "robot", "content": "a"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "a", "name": "b"}]},
        {"messages": [{"role": "user", "content": "a"}], "stream": True},
        {"messages": [{"role": "user", "content": "a"}] * 513},
        {"messages": [{"role": "user", "content": "a"}], "temperature": -1},
    ],
)
def test_what_is_no_chat(shared_client: httpx.Client, body: dict[str, Any]) -> None:
    response = shared_client.post("/dashboard/chat", json=body)
    assert response.status_code == 422
    assert response.json()["error"]["message"]


def test_a_chats_answer_stands_by_itself(client: httpx.Client, deployment: FakeDeployment) -> None:
    fields = {"max_new_tokens": 2, "stop": "x", "seed": 3}
    client.post("/dashboard/chat", json={"messages": [{"role": "user", "content": "a"}], **fields})
    client.post("/generate", json={"prompt": "a", **fields})
    chat, prompt = deployment.engine.params
    assert (chat.continues_prompt, prompt.continues_prompt) == (False, True)
    assert replace(chat, continues_prompt=True) == prompt


def test_the_mapping_is_kept_as_a_configuration(
    client: httpx.Client, deployment: FakeDeployment, tmp_path: Path
) -> None:
    """What is downloaded loads again, with names that YAML would take for something else."""
    derived = {"null": {"format": "int4", "group_size": 64}}
    mixed = {"sources": {"null": str(tmp_path), "1e3": "org/name"}, "derived": derived, "default_source": "1e3"}
    rules = [
        *(
            {"pattern": "a.*", "source": "1e3"},
            {"pattern": "[ab].?", "source": "null"},
            {"pattern": "<<", "source": "null"},
        ),
        *({"pattern": "a.*", "source": "base"}, {"pattern": "{0-7}: # 'x'", "source": "1e3"}),
        *({"pattern": "010", "source": "null"}, {"pattern": "模型", "source": "base"}),
    ]
    model = {"name": "a: b", "base_path": "org/fake", "mixed_precision": {**mixed, "rules": rules}}
    deployment.settings = build_settings({"model": model})
    deployment.rules = deployment.configured_rules = deployment.settings.model.mixed_precision.all_rules
    deployment.model_name = "a\nb: c"
    response = client.get("/dashboard/mapping.yaml")
    assert "attachment" in response.headers["content-disposition"]
    path = tmp_path / "saved.yaml"
    path.write_bytes(response.content)
    loaded = load_settings(path, {}, {}).model
    assert (loaded.name, loaded.base_path) == ("a: b", deployment.settings.model.base_path)
    assert loaded.mixed_precision.sources == {"null": str(tmp_path), "1e3": "org/name"}
    assert loaded.mixed_precision.derived == deployment.settings.model.mixed_precision.derived
    assert loaded.mixed_precision.default_source == "1e3"
    assert loaded.mixed_precision.all_rules == (*deployment.rules[1:3], *deployment.rules[3:])  # the later of two


def test_a_change_is_taken_back_only_by_who_has_seen_it(client: httpx.Client) -> None:
    before = client.get("/dashboard/mapping").json()
    assert before == {"weight_version": 1, "num_rules": 0, "is_configured": True, "num_undoable": 0}
    assert client.post("/dashboard/undo", json={"weight_version": 1}).status_code == 409
    client.post("/update_weight_mapping", json={"weight_mapping": {"a": "base", "b": "base"}})
    changed = client.get("/dashboard/mapping").json()
    assert changed == {"weight_version": 2, "num_rules": 2, "is_configured": False, "num_undoable": 1}
    assert client.post("/dashboard/undo", json={"weight_version": 1}).status_code == 409
    answer = client.post("/dashboard/undo", json={"weight_version": 2}).json()
    assert (answer["weight_version"], answer["num_changed"]) == (3, 2)
    assert client.get("/dashboard/mapping").json() == {**before, "weight_version": 3}
    for body in ({}, {"weight_version": True}):
        assert client.post("/dashboard/undo", json=body).status_code == 422


def test_events_tell_what_goes_on(client: httpx.Client, deployment: FakeDeployment) -> None:
    client.post("/update_weight_mapping", json={"weight_mapping": {"a": "fp8"}})
    client.post("/generate", json={"prompt": "a", "max_new_tokens": 3})
    [event] = read_events(client, 1)
    assert (event["status"], event["model"], event["weight_version"]) == ("healthy", "fake", 2)
    assert event["remapped_at"] == deployment.remaps[-1].at
    assert event["serving"]["generated_tokens"] == 3
    assert len(event["serving"]["series"]) <= events.NUM_POINTS


def test_events_come_while_the_model_loads() -> None:
    may_load = threading.Event()

    def open_deployment() -> FakeDeployment:
        may_load.wait(60)
        return FakeDeployment()

    with serving(fake_settings(port=0), open_deployment) as url, httpx.Client(base_url=url, timeout=60) as client:
        [event] = read_events(client, 1)
        may_load.set()
    assert (event["status"], event["serving"], event["weight_version"]) == ("loading", None, None)


def test_all_viewers_share_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    hubs, num_begun, num_ended = [], 0, 0
    hub_of, describe = events.hub_of, events.describe_event

    def noted_hub(state: Any, service: Any) -> EventHub:
        hubs.append(hub_of(state, service))
        return hubs[-1]

    def held_describe(service: Any) -> dict[str, Any]:
        nonlocal num_begun, num_ended
        num_begun += 1
        assert num_begun == num_ended + 1, "two computations at once"
        wait_until(lambda: num_begun > 1 or hubs[0].num_viewers == NUM_VIEWERS)  # the first is for all of them
        fields = {**describe(service), "number": num_begun}
        num_ended += 1
        return fields

    monkeypatch.setattr(events, "hub_of", noted_hub)
    monkeypatch.setattr(events, "describe_event", held_describe)
    monkeypatch.setattr(events, "INTERVAL_SECONDS", 0.05)
    with serving(fake_settings(port=0), lambda: LargeDeployment(6, 16)) as url:
        wait_until_ready(url)

        def view(_: int) -> list[int]:
            with httpx.Client(base_url=url, timeout=60) as client:
                return [event["number"] for event in read_events(client, 5)]

        with ThreadPoolExecutor(NUM_VIEWERS) as pool:
            futures = [pool.submit(view, index) for index in range(NUM_VIEWERS)]
            assert httpx.get(url + "/health", timeout=60).status_code == 200
            seen = [future.result() for future in futures]
        assert all(numbers[0] == 1 and numbers == sorted(set(numbers)) for numbers in seen)
        wait_until(lambda: hubs[0].num_viewers == 0 and num_begun == num_ended)
        num_calls = num_begun
        time.sleep(0.3)
        assert num_begun == num_calls  # nobody watches


def test_too_many_viewers_are_refused(monkeypatch: pytest.MonkeyPatch, client: httpx.Client) -> None:
    monkeypatch.setattr(events, "MAX_VIEWERS", 1)
    with client.stream("GET", "/dashboard/events") as response:
        lines = response.iter_lines()  # dropped, it would close the connection
        next(lines)
        with client.stream("GET", "/dashboard/events") as refused:  # admitted, its body would never end
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
    wait_until(lambda: num_viewers_allow(client))


def num_viewers_allow(client: httpx.Client) -> bool:
    with client.stream("GET", "/dashboard/events") as response:
        return response.status_code == 200


def test_a_slow_viewer_misses_events_and_a_failure_ends_nothing() -> None:
    numbers = iter(range(1000))

    def describe() -> dict[str, Any]:
        if (number := next(numbers)) == 2:
            raise RuntimeError("once")
        return {"number": number}

    async def watch() -> list[int]:
        hub = EventHub(describe, 0.01)
        with hub.watch() as quick, hub.watch() as slow:
            while hub.num_described < 10:
                await quick.get()
            assert slow.qsize() == 1
            first = orjson.loads((await slow.get())[6:])["number"]
            second = orjson.loads((await slow.get())[6:])["number"]
            assert hub.num_viewers == 2
        assert hub.num_viewers == 0
        return [first, second]

    first, second = asyncio.run(watch())
    assert 9 <= first < second


def test_a_call_that_hangs_is_not_begun_twice_and_no_old_event_is_given() -> None:
    may_end, num_begun = threading.Event(), 0
    may_end.set()

    def describe() -> dict[str, Any]:
        nonlocal num_begun
        num_begun += 1
        may_end.wait()
        return {"number": num_begun}

    async def watch() -> list[int]:
        hub = EventHub(describe, 0.01)
        with hub.watch() as steady:
            await steady.get()
            may_end.clear()
            while num_begun == hub.num_described:  # noqa: ASYNC110 – it is a thread that counts
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            with hub.watch() as late:
                assert late.empty()  # the latest event is too old to be given as news
        num_hanging = num_begun
        for _ in range(3):  # pages that try again
            with hub.watch():
                await asyncio.sleep(0.02)
        assert num_begun == num_hanging
        with hub.watch() as viewer:
            may_end.set()
            return [orjson.loads((await viewer.get())[6:])["number"], num_hanging]

    number, num_hanging = asyncio.run(watch())
    assert number == num_hanging


def test_a_drain_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "INTERVAL_SECONDS", 0.1)
    states: list[str] = []
    service_of: list[Any] = []
    describe = events.describe_event

    def keep(service: Any) -> dict[str, Any]:
        service_of.append(service)
        return describe(service)

    monkeypatch.setattr(events, "describe_event", keep)
    with serving(fake_settings(port=0), FakeDeployment) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        with client.stream("GET", "/dashboard/events") as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    states.append(orjson.loads(line[6:])["status"])
                    service_of[-1].drain()
    assert states[0] == "healthy"
    assert states[-1] == "draining"


def read_events(client: httpx.Client, count: int) -> list[dict[str, Any]]:
    """The next `count` events; then leaves."""
    found: list[dict[str, Any]] = []
    with client.stream("GET", "/dashboard/events") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                found.append(orjson.loads(line.removeprefix("data: ")))
            if len(found) == count:
                break
    return found
