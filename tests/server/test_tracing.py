"""A span of each request: its trace, its attributes, its times."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from amalgam.errors import ConfigError
from amalgam.server import create_app
from amalgam.server.http import tracing
from amalgam.server.http.lifecycle import DrainingServer, listen, url_of
from amalgam.server.http.tracing import NoTracer, OpenTelemetryTracer, tracer_of, traces_url
from amalgam.server.service import Service
from tests.errors import raises
from tests.server.conftest import running, wait_until
from tests.server.fakes import FAIL, FakeDeployment, fake_settings

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GENERATE = {"prompt": "abcde", "max_new_tokens": 4}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    monkeypatch.setattr(tracing, "BATCH_MILLISECONDS", 10.0)
    settings = fake_settings(port=0, api_keys="key")
    service = Service(settings, FakeDeployment)
    listeners = listen(settings.server)
    tracer = OpenTelemetryTracer(exporter, lambda: service.model_name)
    server = DrainingServer(create_app(service, tracer=tracer), service)
    with running(server, listeners), httpx.Client(base_url=url_of(listeners[0], ""), timeout=60) as client:
        client.headers["Authorization"] = "Bearer key"
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield client


def spans(exporter: InMemorySpanExporter, count: int) -> list[ReadableSpan]:
    wait_until(lambda: len(exporter.get_finished_spans()) >= count)
    return list(exporter.get_finished_spans())


def test_a_request_has_a_span_in_its_trace(client: httpx.Client, exporter: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b", "X-Request-ID": "mine-1"}
    client.post("/generate", json={**GENERATE, "stream": True}, headers=headers)
    [span] = spans(exporter, 1)
    assert span.name == "text_completion fake"
    assert span.context is not None and span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert span.context.trace_state.get("a") == "b"
    attributes = dict(span.attributes or {})
    times = {name: attributes.pop(name) for name in list(attributes) if name.startswith("gen_ai.latency.")}
    assert attributes == {
        "http.request.method": "POST", "url.path": "/generate", "http.route": "/generate",
        "http.response.status_code": 200, "amalgam.request_id": "mine-1", "amalgam.key": "key-1",
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "amalgam", "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake", "gen_ai.usage.input_tokens": 5, "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0, "gen_ai.response.finish_reasons": ("length",),
        "amalgam.weight_version": 1,
    }  # fmt: skip
    parts = [
        times[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")
    ]
    assert sum(map(float, parts)) == pytest.approx(times["gen_ai.latency.e2e"])  # type: ignore[arg-type]
    assert span.start_time is not None and span.end_time is not None
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(times["gen_ai.latency.e2e"], abs=1e-6)


@pytest.mark.parametrize(
    "traceparent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 55, "00-" + "x" * 4000]
)
def test_what_is_no_trace_begins_one(client: httpx.Client, exporter: InMemorySpanExporter, traceparent: str) -> None:
    headers = [(b"traceparent", traceparent.encode("latin-1"))] if traceparent else []
    response = client.post("/generate", json=GENERATE, headers=[*client.headers.raw[-1:], *headers])
    assert response.status_code == 200
    [span] = spans(exporter, 1)
    assert span.parent is None


def test_errors_are_marked_and_tell_nothing_of_the_prompt(client: httpx.Client, exporter: InMemorySpanExporter) -> None:
    assert client.post("/generate", json={"prompt": FAIL}).status_code == 500
    client.post("/generate", json={"prompt": FAIL, "stream": True})
    client.get("/nowhere?q=secret")
    client.get("/health")
    by_status = {(span.attributes or {})["http.response.status_code"]: span for span in spans(exporter, 3)}
    failed, broken, missing = (by_status[status] for status in (500, 200, 404))
    assert failed.status.status_code is broken.status.status_code is StatusCode.ERROR
    assert missing.name == "GET" and missing.status.status_code is not StatusCode.ERROR
    assert not any(text in span.to_json() for span in by_status.values() for text in (f'"{FAIL}"', "secret"))


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_where_spans_are_sent(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


def test_without_an_endpoint_there_is_no_tracer() -> None:
    assert isinstance(tracer_of("", str), NoTracer)
    with raises(ConfigError, "server.otlp_endpoint"):
        fake_settings(otlp_endpoint="collector:4318")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with raises(ConfigError, "amalgam-llm[tracing]"):
        create_app(Service(fake_settings(otlp_endpoint="http://127.0.0.1:9"), FakeDeployment))
