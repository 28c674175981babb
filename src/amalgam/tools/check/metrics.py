"""What /metrics says, in Prometheus' text format or OpenMetrics.

In: a body and its type. Out: families and their values. Must never know what they ought to be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from amalgam.tools.check.asking import Response
from amalgam.tools.check.failures import CannotTellError

if TYPE_CHECKING:
    from amalgam.tools.check.target import Target

_RUNNING = re.compile(r"(requests_running|running_reqs?|requests_processing|requests_in_progress|in_?flight)(?!\w)")
_GENERATED = re.compile(r"(generated_tokens|generation_tokens|tokens_predicted|completion_tokens|output_tokens)_total$")
_SUFFIXES = ("", "_total", "_count", "_sum", "_bucket", "_created", "_info")


def parse(response: Response) -> list[Metric]:
    """
    Raises:
        ValueError: Prometheus could not read it.
    """
    is_openmetrics = "openmetrics" in response.headers.get("content-type", "")
    text = response.content.decode()  # UnicodeDecodeError is a ValueError
    return list((parse_openmetrics if is_openmetrics else parse_text)(text))


def names(families: list[Metric]) -> set[str]:
    """Of all samples, also of families that have none now."""
    found = {sample.name for family in families for sample in family.samples}
    return found | {family.name + suffix for family in families for suffix in _SUFFIXES}


async def gauge_of_running(target: Target) -> float | None:
    """Requests under way, as the server says; None: it does not."""
    try:
        families = parse(await target.metrics())
    except (CannotTellError, ValueError):
        return None
    return _total(families, _RUNNING)


def tokens_generated(families: list[Metric]) -> float | None:
    """Since the server started; None: it does not say."""
    return _total(families, _GENERATED)


def resident_bytes(families: list[Metric]) -> float | None:
    return _total(families, re.compile("^process_resident_memory_bytes$"))


def _total(families: list[Metric], pattern: re.Pattern[str]) -> float | None:
    """The sum of the first name that fits; others may say the same under another name."""
    for name in dict.fromkeys(sample.name for sample in _samples(families) if pattern.search(sample.name)):
        return float(sum(sample.value for sample in _samples(families) if sample.name == name))
    return None


def _samples(families: list[Metric]) -> Iterator[Sample]:
    for family in families:
        yield from family.samples
