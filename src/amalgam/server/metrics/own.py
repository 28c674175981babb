"""The server's figures under our own names, `amalgam_…`.

In: the service. Out: metric families, those of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import Metric

from amalgam.base.machine import ProcessFigures
from amalgam.engine.meter import SpeculationCounts
from amalgam.engine.request import FinishReason
from amalgam.planning.trial_plans import WHICH
from amalgam.runtime.changes import RemapRecord
from amalgam.server.interface import Statistics, Trials
from amalgam.server.metrics.catalogue import PREFIX
from amalgam.server.metrics.families import EngineFigures, Families, Samples
from amalgam.server.service import Service, Status
from amalgam.version import __version__

if TYPE_CHECKING:
    from amalgam.runtime.devices import DeviceFigures

_LAYER_GAUGES = ("max_to_mean", "normalized_entropy", "gini", "num_used_experts", "num_hot_experts")

_family = Families(PREFIX).of


def families(service: Service, engine: EngineFigures | None) -> Iterator[Metric]:
    """All of one server's; `engine` is None while the model loads."""
    yield from _of_server(service)
    if engine is None:
        return
    deployment = service.deployment
    yield from _of_devices(deployment.device_figures())
    yield from _of_engine(engine)
    yield from _of_latencies(engine)
    yield from _of_remaps(deployment.remaps, deployment.version_id)
    yield from _of_trials(deployment.trials)
    if deployment.statistics is not None:
        yield from _of_experts(deployment.statistics)


def _of_server(service: Service) -> Iterator[Metric]:
    """What is known even while the model loads."""
    yield _family("info", [({"model": service.model_name, "version": __version__}, 1)])
    yield _family("ready", int(service.status is Status.HEALTHY))
    yield _family("uptime_seconds", service.uptime_seconds)
    refused = [({"reason": reason}, count) for reason, count in dict(service.refusals).items()]
    yield _family("requests_refused", refused)
    if service.filters is not None:
        filtered = [
            ({"filter": name, "where": where, "action": action}, count)
            for (name, where, action), count in sorted(service.filter_counts().items())
        ]
        yield _family("filtered", filtered)
    yield from _of_processes(service.processes())


def _of_processes(hosts: Mapping[str, ProcessFigures]) -> Iterator[Metric]:
    """Memory and processor time, and how much of both there is; with a host's name where there is one."""
    labelled = [({"host": host} if host else {}, figures) for host, figures in hosts.items()]
    memory = [
        ({"kind": kind, **labels}, number) for labels, figures in labelled for kind, number in figures.memory.items()
    ]
    yield _family("memory_bytes", memory)
    yield _family("memory_limit_bytes", [(labels, figures.memory_limit) for labels, figures in labelled])
    yield _family("cpu_seconds", [(labels, figures.cpu_seconds) for labels, figures in labelled])
    yield _family("cpu_threads", [(labels, figures.threads) for labels, figures in labelled])


def _of_devices(devices: Mapping[str, DeviceFigures]) -> Iterator[Metric]:
    """Weights and experts on each, and what went to and fro."""

    def of_each(figure: Callable[[DeviceFigures], int | None], chosen: Mapping[str, DeviceFigures]) -> Samples:
        found = ((name, figure(one)) for name, one in chosen.items())
        return [({"device": name}, value) for name, value in found if value is not None]

    yield _family("device_weight_bytes", of_each(lambda one: one.used_bytes, devices))
    yield _family("device_limit_bytes", of_each(lambda one: one.limit_bytes, devices))
    yield _family("device_experts", of_each(lambda one: one.experts, devices))
    others = dict(list(devices.items())[1:])  # the first one is the one that the model runs on
    yield _family("device_uploaded_bytes", of_each(lambda one: one.uploaded_bytes, others))
    yield _family("device_sent_bytes", of_each(lambda one: one.sent_bytes, others))
    yield _family("device_returned_bytes", of_each(lambda one: one.returned_bytes, others))
    yield _family("device_expert_rows", of_each(lambda one: one.rows, others))


def _of_engine(engine: EngineFigures) -> Iterator[Metric]:
    """Requests, tokens, KV cache, steps."""
    reading, status = engine
    finished = [({"reason": reason.value}, reading.finished.get(reason, 0)) for reason in FinishReason]
    yield _family("requests_finished", finished)
    yield _family("requests_running", status.num_running)
    yield _family("requests_waiting", status.num_waiting)
    yield _family("prompt_tokens", reading.num_prompt_tokens)
    yield _family("generated_tokens", reading.num_new_tokens)
    yield _family("kv_blocks", status.num_blocks)
    yield _family("kv_blocks_used", status.num_blocks - status.num_free_blocks)
    counts = reading.counts
    yield _family("preemptions", counts.num_preemptions)
    yield _family("prefix_query_tokens", counts.num_prefix_query_tokens)
    yield _family("prefix_hit_tokens", counts.num_prefix_hit_tokens)
    versions = [({"version": version}, count) for version, count in status.versions.items()]
    yield _family("requests_by_weight_version", versions)
    yield _family("step_seconds", reading.step)
    yield _family("step_tokens", reading.step_tokens)
    if reading.distinct_experts is not None:
        yield _family("step_distinct_experts", reading.distinct_experts)
    if reading.speculation is not None:
        yield from _of_speculation(reading.speculation)


def _of_speculation(counts: SpeculationCounts) -> Iterator[Metric]:
    """Tokens that were guessed ahead."""
    yield _family("speculation_drafts", counts.num_drafts)
    yield _family("speculation_declined", counts.num_declined)
    yield _family("speculation_proposed_tokens", counts.num_proposed)
    yield _family("speculation_accepted_tokens", counts.num_accepted)
    places = [({"position": place}, count) for place, count in enumerate(counts.accepted_at)]
    yield _family("speculation_accepted_tokens_by_position", places)
    yield _family("speculation_seconds", counts.proposing_seconds)


def _of_latencies(engine: EngineFigures) -> Iterator[Metric]:
    """What a request waits for, and how long it is."""
    reading = engine.reading
    for name, histogram in (
        ("first_token_seconds", reading.first_token),
        ("per_token_seconds", reading.per_token),
        ("request_seconds", reading.total),
        ("queue_seconds", reading.queue),
        ("prompt_seconds", reading.prompt),
        ("answer_seconds", reading.answer),
        ("inter_token_seconds", reading.inter_token),
        ("prompt_length_tokens", reading.prompt_lengths),
        ("answer_length_tokens", reading.answer_lengths),
    ):
        yield _family(name, histogram)


def _of_remaps(remaps: Iterable[RemapRecord], version_id: int) -> Iterator[Metric]:
    """Changes of the weights."""
    yield _family("weight_version", version_id)
    results = [record.error is None for record in remaps]
    samples = [({"result": "ok"}, results.count(True)), ({"result": "failed"}, results.count(False))]
    yield _family("remaps", samples)


def _of_trials(trials: Trials) -> Iterator[Metric]:
    """A candidate for the weights on live requests, and versions that could not answer."""
    yield _family("weight_versions_failed", trials.num_failed_versions)
    if trials.canary is not None:
        canary = trials.canary
        share = canary.plan.share if canary.is_running else 0.0
        yield _family("canary_share", share)
        samples = []
        for which in WHICH:
            arm = canary.arm(which)
            counts = {"ok": arm.num_requests - arm.num_errors, "error": arm.num_errors}
            samples += [({"weights": which, "result": result}, count) for result, count in counts.items()]
        yield _family("canary_requests", samples)
    if trials.shadow is not None and (compared := trials.shadow.compared()) is not None:
        yield _family("shadow_requests", compared.num_requests)
        yield _family("shadow_divergence", compared.divergence.value)
        yield _family("shadow_agreement", compared.agreement.value)


def _of_experts(statistics: Statistics) -> Iterator[Metric]:
    """Expert statistics since the last reset by layer, since the start by format, and how the last minutes differ from
    the reference; not the latter if the reference cannot be used.
    """
    figures = statistics.by_layer()
    summary, layers, drift = figures["summary"], figures["layers"], figures["drift"]
    for what in ("tokens", "activations"):
        samples = [({"phase": phase}, summary[f"{phase}_{what}"]) for phase in ("prompt", "generated")]
        yield _family(f"expert_{what}", samples)
    by_format = [
        ({"projection": projection, "format": name}, count)
        for (projection, name), count in sorted(statistics.activations_by_format().items())
    ]
    yield _family("expert_activations_by_format", by_format)
    for name in _LAYER_GAUGES:
        samples = [({"layer": row["layer_id"]}, row[name]) for row in layers if row[name] is not None]
        yield _family(f"expert_{name.removeprefix('num_')}", samples)
    if "error" not in drift:
        pairs = zip(layers, drift["jensen_shannon"]["by_layer"], strict=True)
        samples = [({"layer": row["layer_id"]}, value) for row, value in pairs if value is not None]
        yield _family("expert_drift_bits", samples)
