"""Metric families made of our figures.

In: names, labels, values, histograms. Out: families of the Prometheus library. Must never know: which there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from amalgam.base.histogram import Histogram
from amalgam.engine.meter import Reading
from amalgam.engine.request import EngineStatus
from amalgam.server.metrics.catalogue import CATALOGUE

Samples = Iterable[tuple[Mapping[str, Any], float]]  # labels, value


class EngineFigures(NamedTuple):
    """What the engine tells at one moment."""

    reading: Reading
    status: EngineStatus


@dataclass(frozen=True)
class Families:
    """Makes families whose names begin with `prefix`, and whose samples all have `labels`."""

    prefix: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def gauge(self, name: str, help_text: str, samples: Samples | float) -> Metric:
        return self._filled(GaugeMetricFamily(self.prefix + name, help_text), name, samples)

    def counter(self, name: str, help_text: str, samples: Samples | float) -> Metric:
        return self._filled(CounterMetricFamily(self.prefix + name, help_text), f"{name}_total", samples)

    def of(self, name: str, figures: Samples | float | Histogram) -> Metric:
        """A family of the catalogue."""
        declared = CATALOGUE[name]
        if isinstance(figures, Histogram):
            return self.histogram(name, declared.help_text, figures)
        make = self.counter if declared.kind == "counter" else self.gauge
        return make(name, declared.help_text, figures)

    def histogram(self, name: str, help_text: str, histogram: Histogram) -> Metric:
        bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family = HistogramMetricFamily(self.prefix + name, help_text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), buckets, histogram.sum)
        return family

    def _filled(self, family: Metric, name: str, samples: Samples | float) -> Metric:
        for labels, value in [({}, samples)] if isinstance(samples, int | float) else samples:
            texts = {key: str(text) for key, text in labels.items()}
            family.add_sample(self.prefix + name, {**self.labels, **texts}, value)
        return family
