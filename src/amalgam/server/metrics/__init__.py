"""The server's figures for Prometheus: under our own names, and under vLLM's where that is asked for.

In: the service. Out: their text. Imported at the first request: the library brings an HTTP server and TLS along.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.registry import Collector

from amalgam.server.metrics import own, vllm
from amalgam.server.metrics.families import EngineFigures
from amalgam.server.service import Service, Status


def render_metrics(service: Service, accept: str) -> tuple[bytes, str]:
    """What `GET /metrics` answers, and its media type. Any thread; works while the model loads, too.

    Args:
        accept: the request's header; Prometheus' text format 0.0.4 is the default, OpenMetrics is there too.
    """
    try:
        encode, media_type = choose_encoder(accept)
    except TypeError:  # it asks for a version that is no number
        encode, media_type = generate_latest, CONTENT_TYPE_PLAIN_0_0_4
    return encode(ServiceCollector(service)), media_type


class ServiceCollector(Collector):
    """All metric families of one server, read when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service, figures = self._service, None
        if service.has_loaded and service.status is not Status.FAILED:
            engine = service.deployment.engine
            figures = EngineFigures(engine.meter.read(), engine.status())
        yield from own.families(service, figures)
        if figures is not None and service.settings.server.metrics_compat == "vllm":
            yield from vllm.families(service, figures)
        yield from service.more_families()
