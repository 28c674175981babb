"""The server's figures for Prometheus.

In: the service. Out: metric families, and their text. Experts appear per layer only: one series per expert would be
thousands. Imported at the first request: the library brings an HTTP server and TLS along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.registry import Collector

from amalgam.base.histogram import Histogram
from amalgam.engine.meter import Reading
from amalgam.engine.request import EngineStatus, FinishReason
from amalgam.runtime.changes import RemapRecord
from amalgam.server.interface import Statistics
from amalgam.server.service import Service, Status
from amalgam.version import __version__

_PREFIX = "amalgam_"
_LAYER_GAUGES = {
    "max_to_mean": "Busiest expert against the mean.",
    "normalized_entropy": "Evenness of the experts' use, 1: even.",
    "gini": "Inequality of the experts' use, 0: even.",
    "num_used_experts": "Experts used at least once.",
    "num_hot_experts": "Experts used at least twice as often as the mean.",
}


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
        service = self._service
        yield from _of_server(service)
        if not service.has_loaded or service.status is Status.FAILED:
            return
        deployment = service.deployment
        yield from _of_engine(deployment.engine.meter.read(), deployment.engine.status())
        yield from _of_remaps(deployment.remaps, deployment.version_id)
        if deployment.statistics is not None:
            yield from _of_experts(deployment.statistics)


def _of_server(service: Service) -> Iterator[Metric]:
    """What is known even while the model loads."""
    yield _gauge("info", "What is served.", [({"model": service.model_name, "version": __version__}, 1)])
    yield _gauge("ready", "Whether requests are taken.", [({}, int(service.status is Status.HEALTHY))])
    yield _gauge("uptime_seconds", "Since the server started.", [({}, service.uptime_seconds)])
    refused = [({"reason": reason}, count) for reason, count in dict(service.refusals).items()]
    yield _counter("requests_refused", "HTTP requests answered with an error, probes left out.", refused)


def _of_engine(reading: Reading, status: EngineStatus) -> Iterator[Metric]:
    """Requests, tokens, latencies, KV cache."""
    finished = [({"reason": reason.value}, reading.finished.get(reason, 0)) for reason in FinishReason]
    yield _counter("requests_finished", "Requests by how they ended.", finished)
    yield _gauge("requests_running", "Requests being computed.", [({}, status.num_running)])
    yield _gauge("requests_waiting", "Requests in the queue.", [({}, status.num_waiting)])
    yield _counter("prompt_tokens", "Prompt tokens computed.", [({}, reading.num_prompt_tokens)])
    yield _counter("generated_tokens", "Tokens generated.", [({}, reading.num_new_tokens)])
    yield _gauge("kv_blocks", "Blocks of the KV cache.", [({}, status.num_blocks)])
    yield _gauge("kv_blocks_used", "Blocks in use.", [({}, status.num_blocks - status.num_free_blocks)])
    versions = [({"version": version}, count) for version, count in status.versions.items()]
    yield _gauge("requests_by_weight_version", "Requests bound to each weight version.", versions)
    yield _histogram("first_token_seconds", "From a request's arrival to its first token.", reading.first_token)
    yield _histogram("per_token_seconds", "Between a request's later tokens, on average.", reading.per_token)
    yield _histogram("request_seconds", "From a request's arrival to its end.", reading.total)


def _of_remaps(remaps: Iterable[RemapRecord], version_id: int) -> Iterator[Metric]:
    """Changes of the weights."""
    yield _gauge("weight_version", "The version that new requests start on.", [({}, version_id)])
    results = [record.error is None for record in remaps]
    samples = [({"result": "ok"}, results.count(True)), ({"result": "failed"}, results.count(False))]
    yield _gauge("remaps", "The latest attempts to change the weights (at most 256).", samples)


def _of_experts(statistics: Statistics) -> Iterator[Metric]:
    """Expert statistics since the last reset, by layer, and how the last minutes differ from the reference; not the
    latter if the reference cannot be used.
    """
    figures = statistics.by_layer()
    summary, layers, drift = figures["summary"], figures["layers"], figures["drift"]
    for what, help_text in (("tokens", "Tokens counted"), ("activations", "Expert activations")):
        samples = [({"phase": phase}, summary[f"{phase}_{what}"]) for phase in ("prompt", "generated")]
        yield _gauge(f"expert_{what}", f"{help_text} since the last reset.", samples)
    for name, help_text in _LAYER_GAUGES.items():
        samples = [({"layer": row["layer_id"]}, row[name]) for row in layers if row[name] is not None]
        yield _gauge(f"expert_{name.removeprefix('num_')}", f"{help_text} Since the last reset.", samples)
    if "error" not in drift:
        pairs = zip(layers, drift["jensen_shannon"]["by_layer"], strict=True)
        samples = [({"layer": row["layer_id"]}, value) for row, value in pairs if value is not None]
        help_text = f"Jensen-Shannon divergence of the last {drift['minutes']:g} minutes from the reference, in bits."
        yield _gauge("expert_drift_bits", help_text, samples)


_Samples = Iterable[tuple[Mapping[str, Any], float]]  # labels, value


def _gauge(name: str, help_text: str, samples: _Samples) -> Metric:
    return _filled(GaugeMetricFamily(_PREFIX + name, help_text), _PREFIX + name, samples)


def _counter(name: str, help_text: str, samples: _Samples) -> Metric:
    return _filled(CounterMetricFamily(_PREFIX + name, help_text), f"{_PREFIX}{name}_total", samples)


def _filled(family: Metric, name: str, samples: _Samples) -> Metric:
    for labels, value in samples:
        family.add_sample(name, {key: str(text) for key, text in labels.items()}, value)
    return family


def _histogram(name: str, help_text: str, histogram: Histogram) -> Metric:
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(_PREFIX + name, help_text, buckets=buckets, sum_value=histogram.sum)
