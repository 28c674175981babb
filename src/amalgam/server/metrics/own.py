"""The server's figures under our own names, `amalgam_…`.

In: the service. Out: metric families. Experts appear per layer only: one series per expert would be thousands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import Metric

from amalgam.engine.meter import SpeculationCounts
from amalgam.engine.request import FinishReason
from amalgam.planning.trial_plans import WHICH
from amalgam.runtime.changes import RemapRecord
from amalgam.server.interface import Statistics
from amalgam.server.metrics.families import EngineFigures, Families
from amalgam.server.service import Service, Status
from amalgam.version import __version__

if TYPE_CHECKING:
    from amalgam.runtime.trial import Trials

_LAYER_GAUGES = {
    "max_to_mean": "Busiest expert against the mean.",
    "normalized_entropy": "Evenness of the experts' use, 1: even.",
    "gini": "Inequality of the experts' use, 0: even.",
    "num_used_experts": "Experts used at least once.",
    "num_hot_experts": "Experts used at least twice as often as the mean.",
}

make = Families("amalgam_")


def families(service: Service, engine: EngineFigures | None) -> Iterator[Metric]:
    """All of one server's; `engine` is None while the model loads."""
    yield from _of_server(service)
    if engine is None:
        return
    deployment = service.deployment
    yield from _of_engine(engine)
    yield from _of_latencies(engine)
    yield from _of_remaps(deployment.remaps, deployment.version_id)
    yield from _of_trials(deployment.trials)
    if deployment.statistics is not None:
        yield from _of_experts(deployment.statistics)


def _of_server(service: Service) -> Iterator[Metric]:
    """What is known even while the model loads."""
    yield make.gauge("info", "What is served.", [({"model": service.model_name, "version": __version__}, 1)])
    yield make.gauge("ready", "Whether requests are taken.", int(service.status is Status.HEALTHY))
    yield make.gauge("uptime_seconds", "Since the server started.", service.uptime_seconds)
    refused = [({"reason": reason}, count) for reason, count in dict(service.refusals).items()]
    yield make.counter("requests_refused", "HTTP requests answered with an error, probes left out.", refused)


def _of_engine(engine: EngineFigures) -> Iterator[Metric]:
    """Requests, tokens, KV cache, steps."""
    reading, status = engine
    finished = [({"reason": reason.value}, reading.finished.get(reason, 0)) for reason in FinishReason]
    yield make.counter("requests_finished", "Requests by how they ended.", finished)
    yield make.gauge("requests_running", "Requests being computed.", status.num_running)
    yield make.gauge("requests_waiting", "Requests in the queue.", status.num_waiting)
    yield make.counter("prompt_tokens", "Prompt tokens computed.", reading.num_prompt_tokens)
    yield make.counter("generated_tokens", "Tokens generated.", reading.num_new_tokens)
    yield make.gauge("kv_blocks", "Blocks of the KV cache.", status.num_blocks)
    yield make.gauge("kv_blocks_used", "Blocks in use.", status.num_blocks - status.num_free_blocks)
    counts = reading.counts
    yield make.counter("preemptions", "Requests that gave their blocks back and waited.", counts.num_preemptions)
    yield make.counter("prefix_query_tokens", "Prompt tokens looked for.", counts.num_prefix_query_tokens)
    yield make.counter("prefix_hit_tokens", "Prompt tokens found.", counts.num_prefix_hit_tokens)
    versions = [({"version": version}, count) for version, count in status.versions.items()]
    yield make.gauge("requests_by_weight_version", "Requests bound to each weight version.", versions)
    yield make.histogram("step_seconds", "That a step took.", reading.step)
    yield make.histogram("step_tokens", "Tokens that a step computed.", reading.step_tokens)
    if reading.distinct_experts is not None:
        help_text = "Experts that a step computed with in one layer, mean over the layers."
        yield make.histogram("step_distinct_experts", help_text, reading.distinct_experts)
    if reading.speculation is not None:
        yield from _of_speculation(reading.speculation)


def _of_speculation(counts: SpeculationCounts) -> Iterator[Metric]:
    """Tokens that were guessed ahead."""
    yield make.counter("speculation_drafts", "Times that a request was given guesses.", counts.num_drafts)
    yield make.counter("speculation_declined", "Times that guesses would not have paid.", counts.num_declined)
    yield make.counter("speculation_proposed_tokens", "Tokens guessed.", counts.num_proposed)
    yield make.counter("speculation_accepted_tokens", "Guesses that came true.", counts.num_accepted)
    places = [({"position": place}, count) for place, count in enumerate(counts.accepted_at)]
    yield make.counter("speculation_accepted_tokens_by_position", "The same by place, 0: the first.", places)
    yield make.counter("speculation_seconds", "Time that guessing took.", counts.proposing_seconds)


def _of_latencies(engine: EngineFigures) -> Iterator[Metric]:
    """What a request waits for, and how long it is."""
    reading = engine.reading
    for name, help_text, histogram in (
        ("first_token_seconds", "From a request's arrival to its first token.", reading.first_token),
        ("per_token_seconds", "Between a request's later tokens, on average.", reading.per_token),
        ("request_seconds", "From a request's arrival to its end.", reading.total),
        ("queue_seconds", "In the queue, until a request's first step.", reading.queue),
        ("prompt_seconds", "From a request's first step to its first token.", reading.prompt),
        ("answer_seconds", "From a request's first token to its end.", reading.answer),
        ("inter_token_seconds", "Between a request's outputs, each step's.", reading.inter_token),
        ("prompt_length_tokens", "Tokens of a request's prompt.", reading.prompt_lengths),
        ("answer_length_tokens", "Tokens of a request's answer.", reading.answer_lengths),
    ):
        yield make.histogram(name, help_text, histogram)


def _of_remaps(remaps: Iterable[RemapRecord], version_id: int) -> Iterator[Metric]:
    """Changes of the weights."""
    yield make.gauge("weight_version", "The version that new requests start on.", version_id)
    results = [record.error is None for record in remaps]
    samples = [({"result": "ok"}, results.count(True)), ({"result": "failed"}, results.count(False))]
    yield make.gauge("remaps", "The latest attempts to change the weights (at most 256).", samples)


def _of_trials(trials: Trials) -> Iterator[Metric]:
    """A candidate for the weights on live requests, and versions that could not answer."""
    help_text = "Weight versions that were left because they failed on their first requests."
    yield make.counter("weight_versions_failed", help_text, trials.num_failed_versions)
    if trials.canary is not None:
        canary = trials.canary
        share = canary.plan.share if canary.is_running else 0.0
        yield make.gauge("canary_share", "Of new requests, how many run on the candidate.", share)
        samples = []
        for which in WHICH:
            arm = canary.arm(which)
            counts = {"ok": arm.num_requests - arm.num_errors, "error": arm.num_errors}
            samples += [({"weights": which, "result": result}, count) for result, count in counts.items()]
        yield make.gauge("canary_requests", "Requests of the latest canary by what they ran on.", samples)
    if trials.shadow is not None and (compared := trials.shadow.compared()) is not None:
        yield make.gauge("shadow_requests", "Compared in the latest shadow.", compared.num_requests)
        help_text = "KL divergence of the candidate from the current weights, nats a token."
        yield make.gauge("shadow_divergence", help_text, compared.divergence.value)
        help_text = "Share of tokens for which both have the same likeliest one."
        yield make.gauge("shadow_agreement", help_text, compared.agreement.value)


def _of_experts(statistics: Statistics) -> Iterator[Metric]:
    """Expert statistics since the last reset, by layer and by format, and how the last minutes differ from the
    reference; not the latter if the reference cannot be used.
    """
    figures = statistics.by_layer()
    summary, layers, drift = figures["summary"], figures["layers"], figures["drift"]
    for what, help_text in (("tokens", "Tokens counted"), ("activations", "Expert activations")):
        samples = [({"phase": phase}, summary[f"{phase}_{what}"]) for phase in ("prompt", "generated")]
        yield make.gauge(f"expert_{what}", f"{help_text} since the last reset.", samples)
    by_format = [
        ({"projection": row["projection"], "format": row["format"]}, row["activations"]) for row in figures["formats"]
    ]
    help_text = "Expert activations since the last reset, by the format that the expert's projection has now."
    yield make.gauge("expert_activations_by_format", help_text, by_format)
    for name, help_text in _LAYER_GAUGES.items():
        samples = [({"layer": row["layer_id"]}, row[name]) for row in layers if row[name] is not None]
        yield make.gauge(f"expert_{name.removeprefix('num_')}", f"{help_text} Since the last reset.", samples)
    if "error" not in drift:
        pairs = zip(layers, drift["jensen_shannon"]["by_layer"], strict=True)
        samples = [({"layer": row["layer_id"]}, value) for row, value in pairs if value is not None]
        help_text = f"Jensen-Shannon divergence of the last {drift['minutes']:g} minutes from the reference, in bits."
        yield make.gauge("expert_drift_bits", help_text, samples)
