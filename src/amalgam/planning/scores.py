"""Scores of weights that need no texts, for comparison with what is measured.

In: a loader, a problem. Out: `Scores`. Must never know: texts.

- rounding: mean square of the rounding error in the narrowest option, relative to the weight's
- kurtosis: of the values; heavy tails round badly
- spectrum: how fast the singular values fall, as the exponent of a power law (Martin & Mahoney 2021, as AlphaQ uses it)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.composition.loader import ModelLoader
from amalgam.composition.progress import Progress
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.planning.problem import Problem
from amalgam.planning.sensitivity import Sensitivities

KINDS = ("rounding", "kurtosis", "spectrum")
_TAIL = 0.5  # of the eigenvalues, the largest


@dataclass(frozen=True)
class Scores:
    """Score → logical name → value; larger: to be kept wider."""

    values: Mapping[str, Mapping[str, float]]

    def ranks(self, sensitivities: Sensitivities) -> dict[str, float]:
        """Spearman's rank correlation of each score with the measured divergence of the narrowest option."""
        names = [name for name in self.values[KINDS[0]] if name in sensitivities.weights]
        measured = [max(option.divergence for option in sensitivities.weights[name].options.values()) for name in names]
        return {kind: _spearman([found[name] for name in names], measured) for kind, found in self.values.items()}


def scores(loader: ModelLoader, problem: Problem, progress: Progress | None = None) -> Scores:
    """Reads every weight that has a choice, and its narrowest option."""
    backend = ReferenceBackend(torch.float32, torch.device("cpu"))
    base = {weight.choice.name: weight for weight in loader.plan(())}
    values: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for number, item in enumerate(problem.items):
        if progress is not None:
            progress("Scoring weights", number, len(problem.items))
        weight = base[item.name].load(backend).dequantize(torch.float32)
        narrow = loader.candidate(item.name, item.options[0].source)
        assert narrow is not None, item.name
        change = narrow.load(backend).dequantize(torch.float32) - weight
        values["rounding"][item.name] = float(change.square().sum() / weight.square().sum().clamp(min=1e-30))
        values["kurtosis"][item.name] = kurtosis(weight)
        values["spectrum"][item.name] = -tail_exponent(weight)  # a heavy tail, a small exponent: to be kept wider
    return Scores(values)


def kurtosis(weight: Tensor) -> float:
    """Fourth standardised moment: 3 of a normal distribution."""
    centred = weight - weight.mean()
    return float(centred.pow(4).mean() / centred.square().mean().clamp(min=1e-30).square())


def tail_exponent(weight: Tensor) -> float:
    """Exponent of a power law that the largest eigenvalues of WᵀW follow (Hill 1975)."""
    eigenvalues = torch.linalg.svdvals(weight).square()
    tail = eigenvalues[: max(2, int(len(eigenvalues) * _TAIL))]
    tail = tail[tail > 0]
    if len(tail) < 2:
        return 0.0
    mean = float((tail / tail[-1]).log().sum())
    return 1.0 + len(tail) / mean if mean > 0 else float("inf")


def _spearman(first: list[float], second: list[float]) -> float:
    def ranks(values: list[float]) -> npt.NDArray[np.float64]:
        return np.argsort(np.argsort(np.array(values))).astype(np.float64)

    if len(first) < 2:
        return 0.0
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])
