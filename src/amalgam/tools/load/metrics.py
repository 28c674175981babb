"""Answers → figures, as the field defines them; docs/serving/benchmark.md has the definitions.

In: what a load measured. Out: percentiles, throughput, goodput, how far the figures can be trusted. Must never know how
requests were sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from amalgam.errors import ConfigError, describe
from amalgam.tools.load.client import Answer
from amalgam.tools.load.running import Load, Measured

PERCENTILES = (50, 90, 95, 99)
SLOPE_SHARE = 2 / 3  # of the sending time, its end, in which it is looked at whether requests under way become more
OBJECTIVES = ("ttft", "itl", "tpot", "e2e")
_UNITS = {"": 1e-3, "ms": 1e-3, "s": 1.0, "us": 1e-6}
_OBJECTIVE = re.compile(r"(\w+)[:=](\d+(?:\.\d+)?)(ms|us|s|)")
# Above these the sending program's own delays show in the figures.
_MAX_LAG_SHARE = 0.1  # of the median gap between tokens
_MIN_LAG_SECONDS = 0.002  # what any event loop has on a machine with other work
_MAX_CPU_SHARE = 0.9  # of one processor


@dataclass(frozen=True)
class Distribution:
    """Of seconds."""

    count: int
    mean: float
    std: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Distribution | None:
        """With linear interpolation between ranks, as NumPy and most tools have it; None of nothing."""
        values = np.fromiter(seconds, np.float64)
        if not values.size:
            return None
        p50, p90, p95, p99 = np.percentile(values, PERCENTILES).tolist()
        mean, std, least, most = (float(value) for value in (values.mean(), values.std(), values.min(), values.max()))
        return cls(values.size, mean, std, least, p50, p90, p95, p99, most)

    def as_json(self) -> dict[str, float]:
        """In milliseconds."""
        return {key: value if key == "count" else value * 1e3 for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Goodput:
    """Requests that meet every objective.

    Attributes:
        share: of those that have ended, errors among them.
        by_objective: the share that meets each by itself, of whole answers and errors.
    """

    share: float
    requests_per_second: float
    by_objective: Mapping[str, float]


@dataclass(frozen=True)
class Errors:
    count: int
    example: str


@dataclass(frozen=True)
class Point:
    """One load's figures. Latencies are those of whole answers; times in seconds.

    Attributes:
        num_unfinished: requests that had not ended when the measurement was interrupted.
        num_short: answers that ended before the length that was asked for.
        seconds: from the first request to the end of the last answer; of the last whole one if the server went away.
        counted_by: `usage`, `events`, or how many answers had usage.
        tokens_per_event: how many tokens an event with text had, where usage tells.
        num_cached_tokens: of prompts; None where the server does not tell.
        mean_concurrency: requests under way, on the average over `seconds`.
        slope: requests under way more from one second to the next, while requests were sent.
        sending_seconds: for how long requests were sent.
        distortion: why the figures are rather the sending program's; empty if they are not.
    """

    load: Load
    num_sent: int
    num_completed: int
    num_unfinished: int
    num_short: int
    errors: Mapping[str, Errors]
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int | None
    counted_by: str
    tokens_per_event: float | None
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    latencies: Mapping[str, Distribution | None]
    mean_concurrency: float
    max_concurrency: int
    slope: float
    sending_seconds: float
    goodput: Goodput | None
    send_lag: Distribution | None
    loop_lag: Distribution | None
    cpu_share: float
    distortion: str
    is_gone: bool

    @property
    def num_failed(self) -> int:
        return sum(error.count for error in self.errors.values())

    def as_json(self) -> dict[str, Any]:
        lags = {"send_lag_ms": self.send_lag, "loop_lag_ms": self.loop_lag}
        return {
            "load": asdict(self.load),
            "requests": {
                "sent": self.num_sent,
                "completed": self.num_completed,
                "failed": self.num_failed,
                "unfinished": self.num_unfinished,
                "short": self.num_short,
                "errors": {kind: asdict(error) for kind, error in self.errors.items()},
            },
            "seconds": self.seconds,
            "sending_seconds": self.sending_seconds,
            "throughput": {
                "requests_per_second": self.requests_per_second,
                "output_tokens_per_second": self.output_tokens_per_second,
                "total_tokens_per_second": self.total_tokens_per_second,
            },
            "tokens": {
                "prompt": self.num_prompt_tokens,
                "prompt_range": self.prompt_tokens,
                "output": self.num_output_tokens,
                "output_range": self.output_tokens,
                "cached": self.num_cached_tokens,
                "counted_by": self.counted_by,
                "per_event": self.tokens_per_event,
            },
            "latency_ms": {name: value and value.as_json() for name, value in self.latencies.items()},
            "concurrency": {"mean": self.mean_concurrency, "max": self.max_concurrency, "slope": self.slope},
            "goodput": self.goodput and asdict(self.goodput),
            "generator": {
                **{name: value and value.as_json() for name, value in lags.items()},
                "cpu_share": self.cpu_share,
                "distortion": self.distortion,
            },
            "server_gone": self.is_gone,
        }


def parse_objectives(texts: Sequence[str]) -> dict[str, float]:
    """`ttft:500ms itl:50ms` → objective and seconds.

    Raises:
        ConfigError: it is none.
    """
    objectives: dict[str, float] = {}
    for word in " ".join(texts).replace(",", " ").split():
        found = _OBJECTIVE.fullmatch(word.lower())
        name = "e2e" if found and found[1] == "e2el" else found and found[1]
        if not found or name not in OBJECTIVES or float(found[2]) == 0:
            raise ConfigError(
                f"--slo is {describe(word)}.",
                remedy=f"Expected {', '.join(OBJECTIVES)} with a time: ttft:500ms itl:50ms.",
            )
        objectives[name] = float(found[2]) * _UNITS[found[3]]
    return objectives


def figures(measured: Measured, objectives: Mapping[str, float] | None = None) -> Point:
    """What a load came to.

    Args:
        objectives: name and seconds, as `parse_objectives` gives them.
    """
    whole = [answer for answer in measured.answers if not answer.error_kind]
    failed = [answer for answer in measured.answers if answer.error_kind]
    ended = [answer.ended for answer in (whole if measured.is_gone else measured.answers)]
    seconds = max(max(ended, default=0.0) - measured.started, 1e-9)
    num_output = sum(answer.num_tokens for answer in whole)
    num_prompt = sum(answer.num_prompt_tokens or 0 for answer in whole)
    cached = [answer.num_cached_tokens for answer in whole if answer.num_cached_tokens is not None]
    by_usage = [answer for answer in whole if answer.num_new_tokens is not None]
    num_events = sum(len(answer.arrivals) for answer in by_usage)
    latencies = {
        "ttft": Distribution.of(answer.first_token_seconds for answer in whole),
        "itl": Distribution.of(gap for answer in whole for gap in answer.gaps),
        "tpot": Distribution.of(s for answer in whole if (s := answer.seconds_per_token) is not None),
        "e2e": Distribution.of(answer.total_seconds for answer in whole),
    }
    send_lag = Distribution.of(answer.sent - answer.due for answer in measured.answers if answer.sent)
    loop_lag = Distribution.of(measured.generator.loop_lags)
    cpu_share = measured.generator.cpu_seconds / seconds
    most, slope = _under_way(measured)
    return Point(
        load=measured.load,
        num_sent=measured.num_sent,
        num_completed=len(whole),
        num_unfinished=measured.num_sent - len(measured.answers),
        num_short=sum(_is_short(answer) for answer in whole),
        errors=_by_kind(failed),
        seconds=seconds,
        requests_per_second=len(whole) / seconds,
        output_tokens_per_second=num_output / seconds,
        total_tokens_per_second=(num_output + num_prompt) / seconds,
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        num_cached_tokens=sum(cached) if cached else None,
        counted_by=_counted_by(len(by_usage), len(whole)),
        tokens_per_event=sum(answer.num_tokens for answer in by_usage) / num_events if num_events else None,
        prompt_tokens=_range(answer.num_prompt_tokens or 0 for answer in whole),
        output_tokens=_range(answer.num_tokens for answer in whole),
        latencies=latencies,
        mean_concurrency=sum(answer.total_seconds for answer in measured.answers if answer.sent) / seconds,
        max_concurrency=most,
        slope=slope,
        sending_seconds=measured.sending_seconds,
        goodput=_goodput(whole, failed, objectives, seconds) if objectives else None,
        send_lag=send_lag,
        loop_lag=loop_lag,
        cpu_share=cpu_share,
        distortion=_distortion(latencies["itl"], loop_lag, cpu_share),
        is_gone=measured.is_gone,
    )


def meets(answer: Answer, name: str, limit: float) -> bool:
    """Whether a whole answer meets an objective; one of a single token has no time between tokens to miss."""
    if name == "ttft":
        value = answer.first_token_seconds
    elif name == "e2e":
        value = answer.total_seconds
    elif name == "tpot":
        value = answer.seconds_per_token or 0.0
    else:
        value = float(np.mean(answer.gaps)) if answer.gaps else 0.0
    return value <= limit


def _goodput(
    whole: Sequence[Answer], failed: Sequence[Answer], objectives: Mapping[str, float], seconds: float
) -> Goodput:
    met = {name: [meets(answer, name, limit) for answer in whole] for name, limit in objectives.items()}
    good = sum(map(all, zip(*met.values(), strict=True)))
    ended = max(1, len(whole) + len(failed))
    shares = {name: sum(values) / ended for name, values in met.items()}
    return Goodput(good / ended, good / seconds, shares)


def _is_short(answer: Answer) -> bool:
    asked = answer.question.num_tokens
    return asked is not None and answer.num_new_tokens is not None and answer.num_new_tokens < asked


def _by_kind(failed: Sequence[Answer]) -> dict[str, Errors]:
    kinds: dict[str, list[Answer]] = {}
    for answer in failed:
        kinds.setdefault(answer.error_kind, []).append(answer)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return {kind: Errors(len(answers), answers[0].error[:500]) for kind, answers in ordered}


def _counted_by(num_usage: int, num_answers: int) -> str:
    if num_usage == num_answers:
        return "usage"
    return "events" if not num_usage else f"usage of {num_usage} of {num_answers} answers, else events"


def _range(values: Iterable[int]) -> tuple[int, int]:
    found = list(values)
    return (min(found), max(found)) if found else (0, 0)


def _under_way(measured: Measured) -> tuple[int, float]:
    """The most requests under way, and how many more there are from one second to the next while requests are sent.

    The slope is that of a straight line through their number after the first third of the sending time: a server
    that keeps up fills in the beginning, and one that does not keep up goes on filling.
    """
    changes = [(answer.sent, 1) for answer in measured.answers if answer.sent]
    changes += [(answer.ended, -1) for answer in measured.answers if answer.sent]
    if not changes:
        return 0, 0.0
    times, steps = (np.array(column, np.float64) for column in zip(*sorted(changes), strict=True))
    numbers = np.cumsum(steps)
    begin, end = (measured.started + share * measured.sending_seconds for share in (1 - SLOPE_SHARE, 1.0))
    moments = np.linspace(begin, end, 200)
    sampled = np.concatenate(([0.0], numbers))[np.searchsorted(times, moments, side="right")]
    slope = float(np.polyfit(moments - begin, sampled, 1)[0]) if end > begin else 0.0
    return int(numbers.max()), slope


def _distortion(gaps: Distribution | None, lag: Distribution | None, cpu_share: float) -> str:
    if cpu_share > _MAX_CPU_SHARE:
        return f"The sending program used {cpu_share:.0%} of a processor: it is the limit, not the server."
    if lag is not None and gaps is not None and lag.p99 > max(_MIN_LAG_SECONDS, _MAX_LAG_SHARE * gaps.p50):
        return (
            f"The sending program was {lag.p99 * 1e3:.1f} ms late in 1% of cases, beside {gaps.p50 * 1e3:.1f} ms "
            "between tokens: latencies are partly its own."
        )
    return ""
