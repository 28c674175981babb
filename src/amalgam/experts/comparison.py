"""How differently two sets of traffic use the experts.

In: counts. Out: differences and divergences. Must never know where the counts came from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def shares(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Each expert's part of its layer, [layers, experts]; 0 for a layer without activations."""
    totals = counts.sum(axis=-1, keepdims=True)
    return np.asarray(counts / np.where(totals > 0, totals, 1), np.float64)


def jensen_shannon(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Jensen-Shannon divergence of each layer's distributions in bits, [layers]: 0 for equal ones, 1 for disjoint ones.

    NaN where either has no activations. Few tokens make it too large, by about experts / (5.5 × activations).
    """
    p, q = shares(first), shares(second)
    middle = (p + q) / 2

    def divergence(part: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(part > 0, part * np.log2(part / middle), 0.0).sum(axis=-1))

    result = (divergence(p) + divergence(q)) / 2
    return np.where((first.sum(axis=-1) > 0) & (second.sum(axis=-1) > 0), np.clip(result, 0, 1), np.nan)


def mean_or_none(values: npt.NDArray[np.float64]) -> float | None:
    """The mean of what is known."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def compare(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> dict[str, Any]:
    """Difference of the shares (first − second) and divergence, by layer and on average; null: unknown.

    Args:
        first, second: counts or gate mass, [layers, experts].
    """
    divergence = jensen_shannon(first, second)
    return {
        "difference": (shares(first) - shares(second)).tolist(),
        "jensen_shannon": {
            "by_layer": [None if np.isnan(value) else value for value in divergence.tolist()],
            "mean": mean_or_none(divergence),
        },
    }
