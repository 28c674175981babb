"""A span of each request, for OpenTelemetry collectors.

In: the records of requests. Out: spans, sent in a thread of their own. Must never know: what an endpoint does.

Attributes follow OpenTelemetry's conventions for HTTP servers and for generative AI (`gen_ai.…`); the times of the
latter that have no name there have those that vLLM gives them. Prompts and answers are not among them. A request that
brings W3C Trace Context (`traceparent`) continues that trace.

The library is an extra. It reads variables of its own, `OTEL_…`, such as headers for the collector.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from amalgam.base.escaping import one_line
from amalgam.errors import ConfigError
from amalgam.server.http.record import RequestRecord
from amalgam.version import DISTRIBUTION, __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

PATH = "/v1/traces"  # of a collector, where the setting names none
BATCH_MILLISECONDS = 1000.0
FLUSH_MILLISECONDS = 2000
MAX_TEXT = 200
_OPERATIONS = {"chat": "chat", "messages": "chat", "responses": "chat", "embeddings": "embeddings"}


class Tracer(Protocol):
    """Takes records of requests that have ended."""

    def export(self, record: RequestRecord) -> None: ...
    def close(self) -> None: ...


class NoTracer:
    """Nobody wants to know."""

    def export(self, record: RequestRecord) -> None:
        """Forget it."""

    def close(self) -> None:
        """Nothing to close."""


def tracer_of(endpoint: str, model_name: Callable[[], str]) -> Tracer:
    """What sends spans to `endpoint`; empty: nobody.

    Raises:
        ConfigError: the library is not installed.
    """
    if not endpoint:
        return NoTracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            "server.otlp_endpoint is set, and OpenTelemetry is not installed.",
            remedy=f"Install it: pip install '{DISTRIBUTION}[tracing]'.",
        ) from None
    return OpenTelemetryTracer(OTLPSpanExporter(endpoint=traces_url(endpoint)), model_name)


def traces_url(endpoint: str) -> str:
    """`http://collector:4318` → `http://collector:4318/v1/traces`; with a path it is as it is."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + PATH


class OpenTelemetryTracer:
    """Makes a span of each record, and has it sent in batches.

    Args:
        model_name: what is served, once that is known.
    """

    def __init__(self, exporter: SpanExporter, model_name: Callable[[], str]) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "amalgam", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=BATCH_MILLISECONDS))
        self._tracer = self._provider.get_tracer("amalgam.server", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    def export(self, record: RequestRecord) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        carrier = {"traceparent": record.traceparent, "tracestate": record.tracestate}
        context = self._propagator.extract({name: value for name, value in carrier.items() if value})
        model = self._model_name()
        operation = operation_of(record)
        name = f"{operation} {model}" if operation else f"{record.method} {record.route}".strip()
        attributes = {**http_attributes(record), **(gen_ai_attributes(record, operation, model) if operation else {})}
        span = self._tracer.start_span(
            name, context, kind=SpanKind.SERVER, attributes=attributes, start_time=record.started_ns
        )
        if record.status >= 500 or (record.error and record.status < 400):  # a stream that ended with an error
            span.set_status(Status(StatusCode.ERROR))
        span.end(record.started_ns + round(record.seconds * 1e9))

    def close(self) -> None:
        """Send what is left, if the collector takes it within seconds. Blocking."""
        started = time.monotonic()
        if self._provider.force_flush(FLUSH_MILLISECONDS) and time.monotonic() - started < FLUSH_MILLISECONDS / 1000:
            self._provider.shutdown()


def operation_of(record: RequestRecord) -> str:
    """Of generation, as `gen_ai.operation.name` has it; empty where the model computed nothing."""
    if not record.num_prompt_tokens:
        return ""
    parts = record.path.split("/")
    return next((name for part, name in _OPERATIONS.items() if part in parts), "text_completion")


def http_attributes(record: RequestRecord) -> dict[str, Any]:
    return {
        "http.request.method": record.method,
        "url.path": one_line(record.path[:MAX_TEXT]),
        **({"http.route": record.route} if record.route else {}),
        "http.response.status_code": record.status,
        "amalgam.request_id": record.request_id,
        **({"amalgam.key": record.caller} if record.caller else {}),
    }


def gen_ai_attributes(record: RequestRecord, operation: str, model: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "amalgam",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_new_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        "gen_ai.latency.e2e": record.seconds,
    }
    if record.finish_reasons:
        found["gen_ai.response.finish_reasons"] = record.finish_reasons
    if record.weight_version is not None:
        found["amalgam.weight_version"] = record.weight_version
    if record.queue_seconds is not None:
        found["gen_ai.latency.time_in_queue"] = record.queue_seconds
    if record.first_token_seconds is not None:
        found["gen_ai.latency.time_to_first_token"] = record.first_token_seconds
        found["gen_ai.latency.time_in_model_prefill"] = record.first_token_seconds - (record.queue_seconds or 0.0)
        found["gen_ai.latency.time_in_model_decode"] = record.seconds - record.first_token_seconds
    return found
