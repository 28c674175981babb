"""Which metric families we have under our own names: type, help, labels.

In: nothing. Out: `CATALOGUE`, by name. Boards and alerts are made of it, so that they name nothing that is not there.
Must never know: where the figures come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "amalgam_"


@dataclass(frozen=True)
class Declared:
    """A metric family without its figures.

    Attributes:
        name: without the prefix, and without what Prometheus adds (`_total`, `_bucket`).
        labels: beside those that a scrape adds.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help_text: str
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> str:
        """What a query names: of a histogram its buckets."""
        return PREFIX + self.name + {"gauge": "", "counter": "_total", "histogram": "_bucket"}[self.kind]

    @property
    def series_pattern(self) -> str:
        """A regular expression of all names that queries may use for it."""
        suffix = {"gauge": "", "counter": "_total", "histogram": "_(bucket|sum|count)"}[self.kind]
        return PREFIX + self.name + suffix


def _gauge(name: str, help_text: str, *labels: str) -> Declared:
    return Declared(name, "gauge", help_text, labels)


def _counter(name: str, help_text: str, *labels: str) -> Declared:
    return Declared(name, "counter", help_text, labels)


def _histogram(name: str, help_text: str) -> Declared:
    return Declared(name, "histogram", help_text)


_FAMILIES = (
    # the server; known even while the model loads
    _gauge("info", "What is served.", "model", "version"),
    _gauge("ready", "Whether requests are taken."),
    _gauge("uptime_seconds", "Since the server started."),
    _counter("requests_refused", "HTTP requests answered with an error, probes left out.", "reason"),
    _counter("filtered", "What filters have found, by what was done about it.", "filter", "where", "action"),
    _gauge("memory_bytes", "Resident memory; mapped: pages of files, which the system can drop.", "kind"),
    _gauge("memory_limit_bytes", "Memory that the process may use: the machine's, or its control group's limit."),
    _counter("cpu_seconds", "Processor time of the process."),
    _gauge("cpu_threads", "Threads that can compute at the same time."),
    # devices: the one that the model runs on, and those that experts lie on
    _gauge("device_weight_bytes", "Memory that weights take, of all versions.", "device"),
    _gauge("device_limit_bytes", "Memory that weights may take, where it is limited.", "device"),
    _gauge("device_experts", "Experts in all layers, of the version that new requests start on.", "device"),
    _counter("device_uploaded_bytes", "Weights brought to a device beside the one that the model runs on.", "device"),
    _counter("device_sent_bytes", "Activations sent to a device beside the one that the model runs on.", "device"),
    _counter("device_returned_bytes", "Outputs that came back from it.", "device"),
    _counter("device_expert_rows", "Pairs of token and expert that were multiplied there.", "device"),
    # requests, tokens, KV cache, steps
    _counter("requests_finished", "Requests by how they ended.", "reason"),
    _gauge("requests_running", "Requests being computed."),
    _gauge("requests_waiting", "Requests in the queue."),
    _counter("prompt_tokens", "Prompt tokens computed."),
    _counter("generated_tokens", "Tokens generated."),
    _gauge("kv_blocks", "Blocks of the KV cache."),
    _gauge("kv_blocks_used", "Blocks in use."),
    _counter("preemptions", "Requests that gave their blocks back and waited."),
    _counter("prefix_query_tokens", "Prompt tokens looked for."),
    _counter("prefix_hit_tokens", "Prompt tokens found."),
    _gauge("requests_by_weight_version", "Requests bound to each weight version.", "version"),
    _histogram("step_seconds", "That a step took."),
    _histogram("step_tokens", "Tokens that a step computed."),
    _histogram("step_distinct_experts", "Experts that a step computed with in one layer, mean over the layers."),
    # tokens that were guessed ahead
    _counter("speculation_drafts", "Times that a request was given guesses."),
    _counter("speculation_declined", "Times that guesses would not have paid."),
    _counter("speculation_proposed_tokens", "Tokens guessed."),
    _counter("speculation_accepted_tokens", "Guesses that came true."),
    _counter("speculation_accepted_tokens_by_position", "The same by place, 0: the first.", "position"),
    _counter("speculation_seconds", "Time that guessing took."),
    # what a request waits for, and how long it is
    _histogram("first_token_seconds", "From a request's arrival to its first token."),
    _histogram("per_token_seconds", "Between a request's later tokens, on average."),
    _histogram("request_seconds", "From a request's arrival to its end."),
    _histogram("queue_seconds", "In the queue, until a request's first step."),
    _histogram("prompt_seconds", "From a request's first step to its first token."),
    _histogram("answer_seconds", "From a request's first token to its end."),
    _histogram("inter_token_seconds", "Between a request's outputs, each step's."),
    _histogram("prompt_length_tokens", "Tokens of a request's prompt."),
    _histogram("answer_length_tokens", "Tokens of a request's answer."),
    # changes of the weights, and candidates for them
    _gauge("weight_version", "The version that new requests start on."),
    _gauge("remaps", "The latest attempts to change the weights (at most 256).", "result"),
    _counter("weight_versions_failed", "Weight versions that were left because they failed on their first requests."),
    _gauge("canary_share", "Of new requests, how many run on the candidate."),
    _gauge("canary_requests", "Requests of the latest canary by what they ran on.", "weights", "result"),
    _gauge("shadow_requests", "Compared in the latest shadow."),
    _gauge("shadow_divergence", "KL divergence of the candidate from the current weights, nats a token."),
    _gauge("shadow_agreement", "Share of tokens for which both have the same likeliest one."),
    # experts, per layer only: one series per expert would be thousands
    _gauge("expert_tokens", "Tokens counted since the last reset.", "phase"),
    _gauge("expert_activations", "Expert activations since the last reset.", "phase"),
    _counter(
        "expert_activations_by_format",
        "Expert activations, by the format that the expert's projection had then.",
        *("projection", "format"),
    ),
    _gauge("expert_max_to_mean", "Busiest expert against the mean. Since the last reset.", "layer"),
    _gauge("expert_normalized_entropy", "Evenness of the experts' use, 1: even. Since the last reset.", "layer"),
    _gauge("expert_gini", "Inequality of the experts' use, 0: even. Since the last reset.", "layer"),
    _gauge("expert_used_experts", "Experts used at least once. Since the last reset.", "layer"),
    _gauge("expert_hot_experts", "Experts used at least twice as often as the mean. Since the last reset.", "layer"),
    _gauge("expert_drift_bits", "Jensen-Shannon divergence of the last minutes from the reference, in bits.", "layer"),
)
CATALOGUE = {family.name: family for family in _FAMILIES}
