"""By what a server is judged, and how much it is asked: a YAML file in which every key has a default.

In: a file. Out: `Thresholds`. An unknown key is refused. The defaults of `performance` are those of a chat; `batch` has
its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from amalgam.base.validation import expectation
from amalgam.config.fields import Section
from amalgam.config.text import read_yaml
from amalgam.errors import ConfigError, describe

Profile = Literal["chat", "batch"]


class Performance(Section):
    """Load, and what it must not fall behind. A threshold of 0 is not judged."""

    prompt_tokens: int = Field(default=64, ge=4, le=2**20)
    """Length of a prompt."""
    output_tokens: int = Field(default=32, ge=2, le=2**16)
    """Length of an answer."""
    requests: int = Field(default=20, ge=1, le=10**4)
    """Requests of one client, one after the other."""
    clients: int = Field(default=8, ge=1, le=4096)
    """Clients that ask at the same time; so many prompts are also asked at once to see that answers do not mix."""
    concurrent_requests: int = Field(default=64, ge=1, le=10**4)
    """Requests of all these clients together."""
    seconds: float = Field(default=30.0, gt=0, le=86400)
    """None is sent later than so long after the first one, of each of the two loads."""
    ttft_p95_ms: float = Field(default=500.0, ge=0)
    """95% of first tokens come within."""
    tpot_p95_ms: float = Field(default=50.0, ge=0)
    """95% of answers to one client have less than this between tokens."""
    stream_tokens_per_second: float = Field(default=30.0, ge=0)
    """New tokens a second of one client."""
    total_tokens_per_second: float = Field(default=0.0, ge=0)
    """New tokens a second of all clients together."""
    requests_per_second: float = Field(default=10.0, ge=0)
    """Answers a second of all clients together."""
    latency_p99_ms: float = Field(default=3000.0, ge=0)
    """99% of whole answers come within, while all clients ask."""
    error_share: float = Field(default=0.001, ge=0, le=1)
    """At most so many of the requests may fail; more is a warning."""
    error_share_fail: float = Field(default=0.01, ge=0, le=1)
    """More than so many is a failure."""
    latency_fail_factor: float = Field(default=2.0, ge=1)
    """A latency above its threshold is a warning; above so many times that, a failure."""
    rate_fail_share: float = Field(default=0.7, ge=0, le=1)
    """A rate below its threshold is a warning; below such a share of it, a failure."""


BATCH = {
    "ttft_p95_ms": 2000.0,
    "tpot_p95_ms": 0.0,
    "stream_tokens_per_second": 0.0,
    "total_tokens_per_second": 1000.0,
    "requests_per_second": 100.0,
    "latency_p99_ms": 30000.0,
    "error_share": 0.005,
    "clients": 32,
    "concurrent_requests": 256,
}


class Resources(Section):
    """Of the machine that the server runs on."""

    memory_share: float = Field(default=0.85, gt=0, le=1)
    """Share of the memory in use from which there is a warning."""
    memory_share_fail: float = Field(default=0.95, gt=0, le=1)
    """Share from which it is a failure."""
    memory_bytes: int = Field(default=0, ge=0)
    """Most resident memory of the server's process. 0: any."""
    disk_free_bytes: int = Field(default=50 * 10**9, ge=0)
    """Least free space where the server works and writes its log; below half of it is a failure."""
    descriptors_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the descriptors a process may have from which there is a warning."""


class Access(Section):
    """Who may ask."""

    require_key: bool = True
    """Whether a server that answers without a key has failed. false: something in front of it asks for keys."""
    certificate_days: float = Field(default=14.0, ge=0)
    """Least days that a certificate has to hold on."""
    keyless_metrics: bool = True
    """Whether /metrics may answer without a key, where others need one."""
    admin_paths: tuple[str, ...] = ()
    """Paths (GET) that a user's key must not open, beside those known of amalgam, vLLM and SGLang."""


class Limits(Section):
    """What a server must refuse."""

    prompt_tokens: int = Field(default=0, ge=0, le=2**24)
    """Length of a prompt that is too long. 0: twice what the server says it takes, else 100,000."""
    body_bytes: int = Field(default=16 * 2**20 + 1, ge=1, le=2**30)
    """Size of a body that is too large."""
    max_tokens: int = Field(default=10**9, ge=1)
    """An answer's length that no server can give."""
    rate_requests: int = Field(default=80, ge=1, le=10**5)
    """Most requests, of one token each, that are sent to see a limit of the rate."""
    rate_seconds: float = Field(default=20.0, gt=0, le=3600)
    """None of them is sent later."""


class Filters(Section):
    """Words that the server's filters must stop; without them, nothing is asked."""

    input_marker: str = Field(default="", max_length=256)
    """A text that no prompt may bring in."""
    output_marker: str = Field(default="", max_length=256)
    """A text that no answer may bring out."""


class Privacy(Section):
    """What must not be kept."""

    log_bytes: int = Field(default=64 * 2**20, ge=1024)
    """How much of a log's end is searched."""
    log_seconds: float = Field(default=2.0, ge=0, le=600)
    """How long after the requests the log is read: what is written late is seen too."""


class Monitoring(Section):
    """What others must be able to see."""

    health_paths: tuple[str, ...] = ("/health", "/healthz", "/livez", "/v1/health")
    """The first that answers is taken."""
    ready_paths: tuple[str, ...] = ("/ready", "/readyz", "/health/ready", "/v1/health/ready")
    """Likewise."""
    health_ms: float = Field(default=1000.0, gt=0)
    """Longest that a probe may take, also under load."""
    metrics_path: str = "/metrics"
    """Where Prometheus reads."""
    fresh_seconds: float = Field(default=3.0, gt=0, le=600)
    """Longest until what has happened shows in the metrics."""
    families: dict[str, str] = Field(
        default_factory=lambda: {
            "time to first token": "first_token|time_to_first_token|ttft",
            "time of a request": "request_seconds|e2e_request_latency|request_duration|request_latency",
            "time between tokens": "inter_token|per_token|time_per_output_token",
            "tokens generated": "generated_tokens|generation_tokens|tokens_predicted|completion_tokens|output_tokens",
            "requests under way": "requests_running|running_req|requests_processing|in_flight|inprogress",
            "requests that wait": "requests_waiting|queue_req|requests_deferred|queue_size|queue_len",
            "requests finished": "requests_finished|request_success|requests_total|request_count",
            "errors": "refused|error|fail|exception|5xx|status",
        }
    )
    """What must be measured → a pattern for the names of the families that do."""
    family_share: float = Field(default=0.7, ge=0, le=1)
    """With fewer of these there is a failure, with fewer than all a warning."""
    alerts: dict[str, str] = Field(
        default_factory=lambda: {
            "latency": "latency|slow|first_token|request_seconds|duration|ttft|p9[59]",
            "errors": "error|refused|fail|5xx|5\\.\\.",
            "server is away": "\\bup\\b|absent|ready|down\\b|unavailable",
            "memory": "memory|oom|resident|kv_(blocks|cache)",
        }
    )
    """What must raise an alert → a pattern for the alert's name or expression."""
    min_alerts: int = Field(default=2, ge=0)
    """With fewer of these there is a failure, with fewer than all a warning."""


class Operation(Section):
    """How it ends."""

    drain_seconds: float = Field(default=60.0, gt=0, le=3600)
    """Longest from SIGTERM to the end of the process."""
    drain_tokens: int = Field(default=256, ge=8, le=2**16)
    """Length of the answer that is under way at SIGTERM."""


class Thresholds(Section):
    """By what a server is judged, and how much it is asked."""

    profile: Profile = "chat"
    """chat | batch: other defaults for performance."""
    timeout_seconds: float = Field(default=30.0, gt=0, le=3600)
    """Longest for one answer; a server that takes longer hangs."""
    cancel_seconds: float = Field(default=5.0, gt=0, le=600)
    """Longest until the place of a client that has left is free."""
    severity: dict[str, Literal["warn", "fail"]] = Field(default_factory=dict)
    """A check's id → what a fault of it counts as, whatever the check says."""
    performance: Performance = Performance()
    """Load, and what it must not fall behind."""
    resources: Resources = Resources()
    """Of the machine that the server runs on."""
    access: Access = Access()
    """Who may ask."""
    limits: Limits = Limits()
    """What a server must refuse."""
    filters: Filters = Filters()
    """Words that filters must stop."""
    privacy: Privacy = Privacy()
    """What must not be kept."""
    monitoring: Monitoring = Monitoring()
    """What others must be able to see."""
    operation: Operation = Operation()
    """How it ends."""

    @field_validator("monitoring")
    @classmethod
    def _patterns(cls, value: Monitoring) -> Monitoring:
        for pattern in (*value.families.values(), *value.alerts.values()):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{describe(pattern)} is no regular expression: {error}") from None
        return value

    def quick(self) -> Thresholds:
        """The same with less that is asked: about a fifth."""
        performance = self.performance
        return self.model_copy(
            update={
                "performance": performance.model_copy(
                    update={
                        "requests": min(performance.requests, 5),
                        "clients": min(performance.clients, 4),
                        "concurrent_requests": min(performance.concurrent_requests, 12),
                        "seconds": min(performance.seconds, 8.0),
                    }
                ),
                "limits": self.limits.model_copy(
                    update={
                        "rate_requests": min(self.limits.rate_requests, 20),
                        "rate_seconds": min(self.limits.rate_seconds, 5.0),
                    }
                ),
            }
        )


def read_thresholds(path: Path | None, profile: str = "") -> Thresholds:
    """
    Args:
        profile: in place of the file's.

    Raises:
        ConfigError: the file cannot be read, or has a key or a value that is none.
    """
    data: dict[str, Any] = {} if path is None else read_yaml(path)
    if profile:
        data["profile"] = profile
    if data.get("profile") == "batch":
        performance = data.get("performance") or {}
        data["performance"] = {**BATCH, **performance} if isinstance(performance, Mapping) else performance
    try:
        return Thresholds.model_validate(data)
    except ValidationError as error:
        where = "Thresholds" if path is None else str(path)
        raise ConfigError(f"{where}: " + "; ".join(_explained(error)), remedy=_REMEDY) from None


_REMEDY = "`amalgam check --print-thresholds` shows every key with its default."


def _explained(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            yield f"{key} is no key that is known."
        else:
            yield f"{key} is {describe(item['input'])}. {expectation(item)}"


def as_yaml(thresholds: Thresholds) -> str:
    """Every key with its meaning, as a file that can be edited."""
    return "".join(f"{line}\n" for line in _lines(thresholds, 0))


def _lines(section: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        yield f"{indent}# {field.description}"
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(value, depth + 1)
            continue
        value = list(value) if isinstance(value, tuple) else value
        is_block = isinstance(value, dict) and bool(value)
        block = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=200, default_flow_style=not is_block)
        lines = block.removesuffix("...\n").splitlines()
        if is_block:
            yield f"{indent}{name}:"
            yield from (f"{indent}  {line}" for line in lines)
        else:
            yield f"{indent}{name}: {lines[0]}"
