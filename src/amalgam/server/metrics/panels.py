"""The panels of the board: which families are shown together, how, and in which order.

In: queries. Out: `PANELS`, row by row. Must never know: Grafana's JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amalgam.server.metrics.queries import (
    Query,
    busy,
    each,
    error_share,
    levels,
    means,
    most,
    quantiles,
    rates,
    shares,
)


@dataclass(frozen=True)
class Panel:
    """
    Attributes:
        unit: by Grafana's names: s, bytes, percentunit, short, reqps, cps (counts a second).
        kind: timeseries, or stat: the latest value as a number.
        alarm: from where a value is shown in red.
        width: of 24 columns.
    """

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    alarm: float | None = None
    width: int = 8
    is_stacked: bool = False


def _number(title: str, queries: Sequence[Query], unit: str = "short", alarm: float | None = None) -> Panel:
    return Panel(title, queries, unit, kind="stat", alarm=alarm, width=3)


PANELS: dict[str, tuple[Panel, ...]] = {
    "Now": (
        _number("Servers that take requests", levels("ready")),
        _number("Requests running", levels("requests_running")),
        _number("Requests waiting", levels("requests_waiting"), alarm=10),
        _number("Tokens a second", rates("generated_tokens"), "cps"),
        _number("First token, P95", quantiles("first_token_seconds", (0.95,)), "s", alarm=1),
        _number("Failed", error_share(), "percentunit", alarm=0.01),
        _number("KV cache, fullest", most(shares("kv_blocks_used", "kv_blocks")), "percentunit", alarm=0.95),
        _number("Weight version", levels("weight_version", over="max"), "none"),
    ),
    "Traffic": (
        Panel("Requests by end", rates("requests_finished"), "reqps", is_stacked=True),
        Panel("Refused by reason", rates("requests_refused"), "reqps", is_stacked=True),
        Panel("Found by filters", rates("filtered"), "cps", is_stacked=True),
        Panel("Failed, of all", error_share(), "percentunit", alarm=0.01),
        Panel("Running and waiting", levels("requests_running", "requests_waiting")),
        Panel("Tokens a second", rates("prompt_tokens", "generated_tokens"), "cps"),
        Panel("Length of prompts", quantiles("prompt_length_tokens")),
        Panel("Length of answers", quantiles("answer_length_tokens")),
        Panel("Requests by weight version", levels("requests_by_weight_version"), is_stacked=True),
        Panel("Ready", each("ready")),
    ),
    "Latency": (
        Panel("First token", quantiles("first_token_seconds"), "s", alarm=1),
        Panel("Between tokens", quantiles("inter_token_seconds"), "s", alarm=0.2),
        Panel("Per token, a request's mean", quantiles("per_token_seconds"), "s"),
        Panel("Whole request", quantiles("request_seconds"), "s", alarm=30),
        Panel("In the queue", quantiles("queue_seconds"), "s"),
        Panel(
            "Where the time goes, means",
            means("queue_seconds", "prompt_seconds", "answer_seconds"),
            "s",
            is_stacked=True,
        ),
    ),
    "Engine and KV cache": (
        Panel("Time in steps", busy("step_seconds"), "percentunit"),
        Panel("A step", quantiles("step_seconds"), "s"),
        Panel("Tokens of a step", quantiles("step_tokens")),
        Panel("KV blocks in use", shares("kv_blocks_used", "kv_blocks"), "percentunit", alarm=0.95),
        Panel(
            "Prompt tokens found in the prefix cache", shares("prefix_hit_tokens", "prefix_query_tokens"), "percentunit"
        ),
        Panel("Preemptions", rates("preemptions"), "cps"),
    ),
    "Process": (
        Panel("Memory, of what it may use", shares("memory_bytes", "memory_limit_bytes"), "percentunit", alarm=0.9),
        Panel("Memory", [*each("memory_bytes"), *each("memory_limit_bytes")], "bytes"),
        Panel("Processor time, of what it may use", shares("cpu_seconds", "cpu_threads"), "percentunit"),
        Panel("Up since", each("uptime_seconds"), "s"),
        Panel("What is served", each("info")),
    ),
    "Devices": (
        Panel("Weights", [*each("device_weight_bytes"), *each("device_limit_bytes")], "bytes"),
        Panel("Experts", levels("device_experts", over="max"), is_stacked=True),
        Panel("Weights brought to a device", rates("device_uploaded_bytes"), "Bps"),
        Panel("Activations sent and returned", rates("device_sent_bytes", "device_returned_bytes"), "Bps"),
        Panel("Rows that other devices multiply", rates("device_expert_rows"), "cps", is_stacked=True),
    ),
    "Weights": (
        Panel("Weight version", each("weight_version"), "none"),
        Panel("Changes of the weights", levels("remaps")),
        Panel("Versions left because they failed", rates("weight_versions_failed"), "cps"),
        Panel("Canary: share of new requests", each("canary_share"), "percentunit"),
        Panel("Canary: requests", levels("canary_requests")),
        Panel("Shadow: requests compared", each("shadow_requests")),
        Panel("Shadow: divergence in nats a token", each("shadow_divergence")),
        Panel("Shadow: same likeliest token", each("shadow_agreement"), "percentunit"),
    ),
    "Experts": (
        Panel("Drift by layer, in bits", levels("expert_drift_bits", over="avg"), alarm=0.1),
        Panel("Busiest against the mean, by layer", levels("expert_max_to_mean", over="avg")),
        Panel("Evenness by layer", levels("expert_normalized_entropy", over="avg"), "percentunit"),
        Panel("Inequality by layer", levels("expert_gini", over="avg"), "percentunit"),
        Panel("Used experts by layer", levels("expert_used_experts", over="max")),
        Panel("Hot experts by layer", levels("expert_hot_experts", over="max")),
        Panel("Activations by format", rates("expert_activations_by_format"), "cps", is_stacked=True),
        Panel("Counted tokens and activations", levels("expert_tokens", "expert_activations")),
        Panel("Distinct experts of a step", quantiles("step_distinct_experts")),
    ),
    "Speculation": (
        Panel(
            "Guesses that came true",
            shares("speculation_accepted_tokens", "speculation_proposed_tokens"),
            "percentunit",
        ),
        Panel("Guessed and accepted", rates("speculation_proposed_tokens", "speculation_accepted_tokens"), "cps"),
        Panel(
            "Given guesses, and not, as they would not pay", rates("speculation_drafts", "speculation_declined"), "cps"
        ),
        Panel("Accepted by place", rates("speculation_accepted_tokens_by_position"), "cps"),
        Panel("Time that guessing takes", rates("speculation_seconds"), "percentunit"),
    ),
}
