"""The server's figures in Prometheus' text format, version 0.0.4.

In: readings. Out: text. Experts appear per layer only: one series per expert would be thousands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from amalgam.engine.meter import Histogram, Reading
from amalgam.engine.request import EngineStatus, FinishReason

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "amalgam_"
_LAYER_GAUGES = {
    "max_to_mean": "Busiest expert against the mean.",
    "normalized_entropy": "Evenness of the experts' use, 1: even.",
    "gini": "Inequality of the experts' use, 0: even.",
    "num_used_experts": "Experts used at least once.",
    "num_hot_experts": "Experts used at least twice as often as the mean.",
}


class MetricsText:
    """Collects metrics, each with its help and type once."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, help_text: str, samples: Iterable[tuple[Mapping[str, Any], float]]) -> None:
        """A counter or gauge: label sets and their values."""
        self._begin(name, kind, help_text)
        for labels, value in samples:
            self._sample(name, labels, value)

    def add_histogram(self, name: str, help_text: str, histogram: Histogram) -> None:
        """A histogram, cumulative as the format wants it."""
        self._begin(name, "histogram", help_text)
        bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
        for bound, count in zip(bounds, accumulate(histogram.counts), strict=True):
            self._sample(f"{name}_bucket", {"le": bound}, count)
        self._sample(f"{name}_sum", {}, histogram.sum)
        self._sample(f"{name}_count", {}, sum(histogram.counts))

    def render(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _begin(self, name: str, kind: str, help_text: str) -> None:
        self._lines += [f"# HELP {_PREFIX}{name} {help_text}", f"# TYPE {_PREFIX}{name} {kind}"]

    def _sample(self, name: str, labels: Mapping[str, Any], value: float) -> None:
        inner = ",".join(f'{key}="{_escape(str(text))}"' for key, text in labels.items())
        self._lines.append(f"{_PREFIX}{name}{{{inner}}} {value:.17g}" if inner else f"{_PREFIX}{name} {value:.17g}")


def add_server(
    text: MetricsText, model: str, version: str, uptime_seconds: float, refusals: Mapping[str, int], *, is_ready: bool
) -> None:
    """What is known even while the model loads."""
    text.add("info", "gauge", "What is served.", [({"model": model, "version": version}, 1)])
    text.add("ready", "gauge", "Whether requests are taken.", [({}, int(is_ready))])
    text.add("uptime_seconds", "gauge", "Since the server started.", [({}, uptime_seconds)])
    refused = [({"reason": reason}, count) for reason, count in refusals.items()]
    text.add("requests_refused_total", "counter", "HTTP requests answered with an error, probes left out.", refused)


def add_engine(text: MetricsText, reading: Reading, status: EngineStatus) -> None:
    """Requests, tokens, latencies, KV cache."""
    finished = [({"reason": reason.value}, reading.finished.get(reason, 0)) for reason in FinishReason]
    text.add("requests_finished_total", "counter", "Requests by how they ended.", finished)
    text.add("requests_running", "gauge", "Requests being computed.", [({}, status.num_running)])
    text.add("requests_waiting", "gauge", "Requests in the queue.", [({}, status.num_waiting)])
    text.add("prompt_tokens_total", "counter", "Prompt tokens computed.", [({}, reading.num_prompt_tokens)])
    text.add("generated_tokens_total", "counter", "Tokens generated.", [({}, reading.num_new_tokens)])
    text.add("kv_blocks", "gauge", "Blocks of the KV cache.", [({}, status.num_blocks)])
    text.add("kv_blocks_used", "gauge", "Blocks in use.", [({}, status.num_blocks - status.num_free_blocks)])
    versions = [({"version": version}, count) for version, count in status.versions.items()]
    text.add("requests_by_weight_version", "gauge", "Requests bound to each weight version.", versions)
    text.add_histogram("first_token_seconds", "From a request's arrival to its first token.", reading.first_token)
    text.add_histogram("per_token_seconds", "Between a request's later tokens, on average.", reading.per_token)
    text.add_histogram("request_seconds", "From a request's arrival to its end.", reading.total)


def add_remaps(text: MetricsText, num_ok: int, num_failed: int, version: int) -> None:
    """Changes of the weights."""
    text.add("weight_version", "gauge", "The version that new requests start on.", [({}, version)])
    samples = [({"result": "ok"}, num_ok), ({"result": "failed"}, num_failed)]
    text.add("remaps", "gauge", "The latest attempts to change the weights (at most 256).", samples)


def add_experts(text: MetricsText, summary: Mapping[str, Any], layers: Iterable[Mapping[str, Any]]) -> None:
    """Expert statistics since the last reset, by layer."""
    layers = list(layers)
    counted = [({"phase": phase}, summary[f"{phase}_tokens"]) for phase in ("prompt", "generated")]
    text.add("expert_tokens", "gauge", "Tokens counted since the last reset.", counted)
    activations = [({"phase": phase}, summary[f"{phase}_activations"]) for phase in ("prompt", "generated")]
    text.add("expert_activations", "gauge", "Expert activations since the last reset.", activations)
    for name, help_text in _LAYER_GAUGES.items():
        samples = [({"layer": row["layer_id"]}, row[name]) for row in layers if row[name] is not None]
        text.add(f"expert_{name.removeprefix('num_')}", "gauge", f"{help_text} Since the last reset.", samples)


def add_drift(text: MetricsText, layer_ids: Iterable[int], drift: Mapping[str, Any]) -> None:
    """How the last minutes differ from the reference, by layer; nothing if the reference cannot be used."""
    if "error" in drift:
        return
    pairs = zip(layer_ids, drift["jensen_shannon"]["by_layer"], strict=True)
    samples = [({"layer": layer_id}, value) for layer_id, value in pairs if value is not None]
    help_text = f"Jensen-Shannon divergence of the last {drift['minutes']:g} minutes from the reference, in bits."
    text.add("expert_drift_bits", "gauge", help_text, samples)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
