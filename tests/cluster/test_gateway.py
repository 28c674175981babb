"""One address for several replicas: over HTTP, with scripted members and with two of the demo model."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from amalgam.cluster.gateway import Gateway
from amalgam.cluster.interface import Head
from amalgam.cluster.member import Member
from amalgam.cluster.routing import Routing
from amalgam.config.placement import Rule
from amalgam.config.reading import load_settings
from amalgam.config.settings import Settings
from amalgam.runtime.changes import ChangeRequest
from amalgam.runtime.opening import open_deployment
from amalgam.server.http.lifecycle import DrainingServer, listen, url_of
from tests.cluster.replicas import RULES, ForeignError, LocalTransport, ScriptedMember, until
from tests.conftest import write_demo_config
from tests.server.conftest import running, wait_until
from tests.server.fakes import fake_settings

FORMATS = ("bf16", "fp8", "int4")
EXPERT = "model.layers.3.mlp.experts.9.up_proj.weight"
JSON_HEAD = Head(200, ((b"content-type", b"application/json"),))


class Starting:
    """Members that are real are started in the gateway's event loop, where their requests run."""

    def __init__(self, gateway: Gateway, members: Mapping[str, Any]) -> None:
        self._gateway, self._members, self._is_started = gateway, members, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self._is_started:
            self._is_started = True
            for member in self._members.values():
                if isinstance(member, Member):
                    await member.start()
        await self._gateway(scope, receive, send)


@contextmanager
def serving(settings: Settings, members: dict[str, Any]) -> Iterator[httpx.Client]:
    routing = Routing(settings.cluster.max_imbalance)
    gateway = Gateway(settings, LocalTransport(members, routing), routing)
    listeners = listen(settings.server)
    server = DrainingServer(Starting(gateway, members), gateway.service)
    with (
        running(server, listeners),
        httpx.Client(base_url=url_of(listeners[0], settings.server.host), timeout=60) as client,
    ):
        wait_until(lambda: client.get("/ready").status_code == 200)
        wait_until(lambda: metric(client, 'amalgam_cluster_replicas{state="ready"}') == len(members))
        yield client


def metric(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[-1]) if lines else 0.0


@pytest.fixture
def members() -> dict[str, ScriptedMember]:
    return {name: ScriptedMember() for name in "ab"}


@pytest.fixture
def client(members: dict[str, ScriptedMember]) -> Iterator[httpx.Client]:
    with serving(fake_settings(port=0), members) as client:
        yield client


def dying(members: dict[str, ScriptedMember], before: int) -> None:
    """Whoever answers first dies before so many events have left."""

    def die(number: int) -> None:
        if number == before and all(not member.is_dead for member in members.values()):
            next(member for member in members.values() if member.num_answers).is_dead = True

    for member in members.values():
        member.before_event = die


def test_a_stream_is_passed_on_as_it_is(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"prompt": "x", "stream": True})
    assert answer.text == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert answer.headers["content-type"] == "text/event-stream"
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_a_stream_that_has_not_begun_goes_to_another_replica(
    client: httpx.Client, members: dict[str, ScriptedMember]
) -> None:
    dying(members, before=0)
    answer = client.post("/generate", json={"prompt": "x", "stream": True})
    assert answer.text == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert [member.is_dead for member in members.values()].count(True) == 1
    assert metric(client, "amalgam_cluster_requests_resent_total") == 1


def test_a_replica_that_is_said_to_be_gone_before_the_routing_knows(
    members: dict[str, ScriptedMember], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then requests wait, and nothing else does."""
    with serving(fake_settings(port=0), members) as client:
        monkeypatch.setattr(Routing, "update", lambda *_, **__: None)  # whatever is seen of the replicas
        gone = dict(members)
        members.clear()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.post, "/generate", json={"prompt": "x", "stream": True})
            time.sleep(0.2)
            assert client.get("/health").status_code == 200
            assert not answer.done()
            members |= gone
            assert answer.result().text == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
        assert metric(client, "amalgam_cluster_requests_resent_total") == 0


def test_a_request_waits_for_replicas_so_long_in_all(
    members: dict[str, ScriptedMember], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is tried again."""
    with serving(fake_settings(port=0), members) as client:
        monkeypatch.setattr(Routing, "update", lambda *_, **__: None)  # whatever is seen of the replicas
        monkeypatch.setattr("amalgam.cluster.forwarding.ROOM_SECONDS", 0.2)
        members.clear()
        answer = client.post("/generate", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable")


def test_a_stream_of_which_only_the_head_has_left_says_that_there_is_no_replica(
    members: dict[str, ScriptedMember], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amalgam.cluster.forwarding.ROOM_SECONDS", 0.2)

    def die(number: int) -> None:
        for member in members.values():
            member.is_dead = True

    with serving(fake_settings(port=0), members) as client:
        for member in members.values():
            member.before_event = die
        answer = client.post("/generate", json={"prompt": "x", "stream": True})
        assert answer.status_code == 200
        assert json.loads(answer.text.partition("data: ")[2].split("\n\n")[0])["error"]["type"] == "unavailable"


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_stream_that_has_begun_says_that_its_replica_is_lost(
    client: httpx.Client, members: dict[str, ScriptedMember], path: str
) -> None:
    dying(members, before=1)
    answer = client.post(path, json={"prompt": "x", "stream": True})
    first, told, *rest = answer.text.split("\n\n")
    assert first == "data: 1"
    fields = json.loads(told.rpartition("data: ")[2])
    if path in ("/v1/messages", "/v1/responses"):  # which name their events
        assert told.startswith("event: error\n")
    codes = [fields.get("code"), *[fields.get("error", {}).get(key) for key in ("type", "code")]]
    assert "replica_lost" in codes or (path == "/v1/messages" and "api_error" in codes)
    assert ("data: [DONE]" in rest) == (path in ("/generate", "/v1/chat/completions"))
    wait_until(lambda: metric(client, 'amalgam_requests_refused_total{reason="replica_lost"}') == 1)


def test_an_answer_that_does_not_stream_is_never_lost(client: httpx.Client, members: dict[str, ScriptedMember]) -> None:
    for member in members.values():
        member.head, member.events = JSON_HEAD, (b'{"text":', b'"abc"}')
    dying(members, before=1)
    assert client.post("/generate", json={"prompt": "x"}).json() == {"text": "abc"}


def test_what_a_replica_refuses_is_told_as_it_is(client: httpx.Client, members: dict[str, ScriptedMember]) -> None:
    for member in members.values():
        member.head, member.events = Head(422, JSON_HEAD.headers), (b'{"error":{"type":"invalid_request"}}',)
    answer = client.post("/generate", json={"prompt": 3})
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_request")


def test_comments_do_not_begin_a_stream(client: httpx.Client, members: dict[str, ScriptedMember]) -> None:
    for member in members.values():
        member.events = (b": keep-alive\n\n", *member.events)
    dying(members, before=1)
    answer = client.post("/generate", json={"prompt": "x", "stream": True})
    assert answer.text.replace(": keep-alive\n\n", "") == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


def test_keys_are_asked_for_once_and_count_for_all(members: dict[str, ScriptedMember]) -> None:
    settings = fake_settings(port=0, api_keys=("k1",), admin_key="k2", tokens_per_minute=5, keyless_metrics=True)
    with serving(settings, dict(members)) as client:
        assert client.post("/generate", json={"prompt": "x"}).status_code == 401
        headers = {"Authorization": "Bearer k1"}
        answers = [client.post("/generate", json={"prompt": "x"}, headers=headers).status_code for _ in range(3)]
        assert answers[0] == 200
        assert answers[-1] == 429
        assert sum(member.num_answers for member in members.values()) == answers.count(200)


def test_a_new_gateway_goes_on_from_the_history(members: dict[str, ScriptedMember], tmp_path: Path) -> None:
    settings = fake_settings(port=0).replace(weights={"history": str(tmp_path / "h.jsonl")})
    with serving(settings, dict(members)) as client:
        assert (
            client.post("/update_weight_mapping", json={"weight_mapping": {"b": "fp8"}}).json()["weight_version"] == 2
        )
    with serving(settings, dict(members)) as client:
        changes = client.get("/weights/changes").json()["changes"]
        assert sorted(change["version"] for change in changes) == [1, 2]
        assert client.post("/weights/rollback").json()["weight_version"] == 3
        assert {member.current.rules for member in members.values()} == {RULES}


def test_memory_and_processor_time_are_those_of_the_replicas_too(
    client: httpx.Client, members: dict[str, ScriptedMember]
) -> None:
    assert metric(client, 'amalgam_memory_bytes{host="elsewhere",kind="anonymous"}') == 2 * 2**30
    assert metric(client, 'amalgam_memory_limit_bytes{host="elsewhere"}') == 2**31
    assert metric(client, 'amalgam_cpu_seconds_total{host="elsewhere"}') == 10
    assert metric(client, 'amalgam_cluster_memory_bytes{kind="anonymous",replica="a"}') == 2**30
    own = f'amalgam_memory_bytes{{host="{socket.gethostname()}",kind="anonymous"}}'
    assert metric(client, own) > 0
    members["a"].is_dead = True
    wait_until(lambda: metric(client, 'amalgam_memory_bytes{host="elsewhere",kind="anonymous"}') == 2**30)
    assert metric(client, 'amalgam_cpu_seconds_total{host="elsewhere"}') == 10  # what was counted stays


def test_what_filters_find_in_replicas_is_counted(members: dict[str, ScriptedMember]) -> None:
    for member in members.values():
        member.filtered["mail", "prompts", "redact"] = 2
    rule = {"name": "mail", "pii": ["email"], "where": ["prompts"]}
    settings = fake_settings(port=0).replace(filters={"rules": [rule]})
    with serving(settings, dict(members)) as client:
        assert client.get("/filters").json()["filters"][0]["found"]["prompts"] == {"redact": 4}
        assert metric(client, 'amalgam_filtered_total{action="redact",filter="mail",where="prompts"}') == 4


def looking(members: dict[str, ScriptedMember], use: Callable[[LocalTransport, Routing], Awaitable[None]]) -> None:
    """Use what a gateway looks at the members by, in its event loop."""

    async def run() -> None:
        settings = fake_settings(port=0)
        routing = Routing(settings.cluster.max_imbalance)
        transport = LocalTransport(members, routing)
        gateway = Gateway(settings, transport, routing)
        used = asyncio.create_task(use(transport, routing))
        await asyncio.sleep(0)  # it changes the transport before anybody looks
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://gateway") as client:
            await client.get("/health")
        await used

    asyncio.run(asyncio.wait_for(run(), 120))


def test_what_a_replica_told_before_it_was_lost_does_not_bring_it_back(members: dict[str, ScriptedMember]) -> None:
    lost, slow = members.values()

    async def use(transport: LocalTransport, routing: Routing) -> None:
        await until(lambda: len(routing.replicas) == 2)
        told = slow.hangs["state"] = asyncio.Event()
        before = lost.calls.count("state")
        await until(lambda: lost.calls.count("state") > before)
        await asyncio.sleep(0)  # it answers
        lost.hangs["state"] = asyncio.Event()  # when it is asked again
        routing.lost("a")
        slow.coming_id = 7
        told.set()
        await until(lambda: routing.replicas["b"].state.coming_id == 7)
        assert {name: seen.is_lost for name, seen in routing.replicas.items()} == {"a": True, "b": False}

    looking(members, use)


def test_a_failure_does_not_end_the_looks_at_replicas(
    members: dict[str, ScriptedMember], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(transport: LocalTransport, routing: Routing) -> None:
        for name in ("start", "ids"):
            monkeypatch.setattr(transport, name, failing_once(getattr(transport, name)))
        await until(lambda: routing.replicas.keys() == members.keys())

    looking(members, use)


def failing_once(call: Callable[[], Any]) -> Callable[[], Any]:
    failures = [ForeignError()]

    def fail() -> Any:
        if failures:
            raise failures.pop()
        return call()

    return fail


@pytest.fixture(scope="module")
def demo(derived: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, dict[str, Member]]]:
    """Two replicas of the demo model in this process."""
    config = write_demo_config(tmp_path_factory.mktemp("cluster"), derived)
    overrides = {
        "inference.max_seq_length": 256, "server.port": 0, "server.export_dir": str(tmp_path_factory.mktemp("export")),
        "engine.rollback_answers": 0, "engine.kv_cache_bytes": 2**22,
        "filters.rules": [{"name": "mail", "pii": ["email"], "where": ["prompts"]}],
    }  # fmt: skip
    settings = load_settings(config, overrides, {})
    opened = {name: open_deployment(settings) for name in "ab"}
    members = {name: Member(deployment, settings) for name, deployment in opened.items()}
    with serving(settings, members) as client:  # type: ignore[arg-type]
        yield client, members
    for deployment in opened.values():
        deployment.close()


def generate(client: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    answer = client.post("/generate", json={"prompt": prompt, "max_new_tokens": 4, "do_sample": False, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_replicas_are_counted_as_one(demo: tuple[httpx.Client, dict[str, Member]]) -> None:
    client, members = demo
    client.post("/reset_expert_stats")
    before = client.get("/serving").json()
    for number in range(6):
        generate(client, f"Number {number}. " + "abc" * number, domain="numbers")
    alone = [member.state().statistics_revision for member in members.values()]
    assert all(alone)
    # Merged figures may be two seconds old.
    wait_until(lambda: client.get("/serving").json()["generated_tokens"] - before["generated_tokens"] == 24)
    serving = client.get("/serving").json()
    assert sum(serving["finished"].values()) - sum(before["finished"].values()) == 6
    # The last token of an answer is not computed with.
    wait_until(lambda: client.get("/expert_stats").json()["summary"]["generated_tokens"] == 24 - 6)
    stats = client.get("/expert_stats").json()
    assert stats["summary"]["total_requests"] == 6
    assert client.get("/experts/labels").json()["labels"][0]["label"] == "numbers"
    window = client.get("/expert_stats", params={"minutes": 5}).json()["summary"]
    assert window["total_tokens"] == stats["summary"]["total_tokens"]
    experts = ("/experts/grid", "/experts/hints", "/experts/precision_map")
    for path in (*experts, "/model_info", "/dashboard", "/weights", "/props"):
        assert client.get(path).status_code == 200, path
    assert metric(client, "amalgam_generated_tokens_total") == serving["generated_tokens"]
    by_format = [f'amalgam_expert_activations_by_format_total{{format="{name}",projection="gate"}}' for name in FORMATS]
    assert sum(metric(client, name) for name in by_format) >= stats["summary"]["total_activations"]  # since the start
    row = max(stats["expert_stats"], key=lambda row: row["activation_count"])
    expert = {name: row[name] for name in ("layer_id", "expert_id")}
    use = client.get("/dashboard/expert", params=expert).json()["use"]
    assert use["activations"] == row["activation_count"] > 0


def test_a_change_is_of_all_replicas_or_none(demo: tuple[httpx.Client, dict[str, Member]]) -> None:
    client, members = demo
    first = client.get("/weights").json()["current"]
    refused = client.post("/update_weight_mapping", json={"weight_mapping": {"nothing.*": "fp8"}})
    assert (refused.status_code, refused.json()["error"]["type"]) == (422, "invalid_plan")
    assert {member.state().version_id for member in members.values()} == {first}
    changed = client.post("/update_weight_mapping", json={"weight_mapping": {EXPERT: "fp8"}}).json()
    assert changed["num_changed"] == 1
    assert {member.state().version_id for member in members.values()} == {changed["weight_version"]}
    answers = {generate(client, "The sea")["weight_version"] for _ in range(4)}
    assert answers == {changed["weight_version"]}
    named = client.put("/weights/named/fast", json={"weight_mapping": {EXPERT: "int4"}}).json()
    assert generate(client, "The sea", weights="fast")["weight_version"] == named["weight_version"]
    assert client.delete("/weights/named/fast").status_code == 200
    gone = client.post("/generate", json={"prompt": "The sea", "weights": "fast"})
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "version_not_found")
    assert client.post("/weights/rollback").json()["num_changed"] == 1
    assert client.get("/dashboard/mapping").json()["is_configured"]
    changes = client.get("/weights/changes").json()["changes"]
    assert [change["state"] for change in changes] == ["failed", "done", "done", "done"]
    assert client.put(f"/weights/pins/{first}").json()["error"]["type"] == "unsupported"
    assert client.get("/weights/canary").json() == {"state": "none"}


def test_filters_of_replicas_are_counted(demo: tuple[httpx.Client, dict[str, Member]]) -> None:
    client, _ = demo
    for name in ("ann", "bob"):
        generate(client, f"Write to {name}@example.org.")
    wait_until(lambda: client.get("/filters").json()["filters"][0]["found"]["prompts"] == {"redact": 2})


def test_a_version_that_was_left_is_built_again_under_its_number(demo: tuple[httpx.Client, dict[str, Member]]) -> None:
    member = demo[1]["a"]
    rules = (*member.describe().current.rules, Rule(pattern=EXPERT, source="int4"))
    made = []
    for _ in range(2):
        result, digest = member.prepare(ChangeRequest(rules=rules, version_id=90), "again")
        member.discard()
        made.append((result.version, digest))
    assert made[0] == made[1]
    assert made[0][0] == 90


def test_the_version_before_stays_until_it_is_released(demo: tuple[httpx.Client, dict[str, Member]]) -> None:
    member = demo[1]["b"]
    wait_until(lambda: member.state().before_id is None)  # the gateway has released what changes before this one kept
    first = member.describe().current
    result, _ = member.prepare(ChangeRequest(mapping={EXPERT: "fp8"}), "next")
    member.go_live(result.version, None, True)
    member.discard()
    described = member.describe()
    assert (described.current.version_id, described.before) == (result.version, first)
    member.go_live(first.version_id)
    assert member.state().before_id is None
    assert member.describe().current == first
