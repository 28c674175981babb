"""Snapshot → the answer of `/expert_stats`.

In: an `ExpertSnapshot`. Out: plain JSON-able values. Must never know how the counts were made or how they travel.

Every figure covers the snapshot's window (`window` in the answer), except `uptime`, and `last_activation`, which looks
back to the last reset. Times are Unix seconds. Each part's function says what its fields mean.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from amalgam.errors import RequestError, describe
from amalgam.experts.history import GENERATED, PROMPT, Tally
from amalgam.experts.snapshot import ExpertSnapshot

DEFAULT_TOP_K = 10
HOT = 2.0  # times an even share
COVERAGES = (50, 90, 99)
PHASES = {"all": slice(0, 2), "prompt": slice(PROMPT, PROMPT + 1), "generated": slice(GENERATED, GENERATED + 1)}


def describe_experts(snapshot: ExpertSnapshot, top_k: int | None = None) -> dict[str, Any]:
    """The whole answer: window, summary, layers, experts, the `top_k` busiest and the most recent activations.

    Args:
        top_k: how many of the busiest; None: 10, or all where there are fewer.

    Raises:
        RequestError: `top_k` is not an integer from 1 to the number of experts in all layers.
    """
    num_top = _check_top_k(top_k, snapshot)
    experts = _rows(expert_columns(snapshot))
    order = np.argsort(-snapshot.tally.counts.sum(axis=0)[snapshot.exists], kind="stable")[:num_top]
    return {
        "window": window(snapshot),
        "summary": summary(snapshot),
        "layer_stats": layer_rows(snapshot),
        "expert_stats": experts,
        "top_experts": [experts[index] for index in order.tolist()],
        "recent_activations": recent_rows(snapshot),
        "labels": label_rows(snapshot),
    }


def window(snapshot: ExpertSnapshot) -> dict[str, Any]:
    """The stretch of time the figures cover.

    `minutes` is what was asked for, null for all since the last reset. `start` is the true start: a little before
    `end - 60 × minutes` where older history is kept in coarser steps, and never before the last reset.
    """
    return {
        "minutes": snapshot.minutes,
        "start": snapshot.window_start,
        "end": snapshot.window_end,
        "seconds": snapshot.window_seconds,
    }


def summary(snapshot: ExpertSnapshot) -> dict[str, Any]:
    """Totals. `total_activations` = `total_tokens` × `active_experts_per_token` × `total_layers`.

    `total_layers` counts the layers that have experts, `total_experts` the experts of all of them, `experts_per_layer`
    those of the widest: a pruned model's layers may have different numbers, which `num_experts` of each layer says.
    `uptime` is seconds since counting began, resets or not. `half_life_minutes` is that of the experts'
    `decaying_rate`.
    """
    tally, num_layers = snapshot.tally, len(snapshot.layer_ids)
    activations, tokens = int(tally.counts.sum()), int(tally.num_tokens.sum())
    requests = int(tally.num_requests)
    return {
        "total_activations": activations,
        "prompt_activations": int(tally.counts[PROMPT].sum()),
        "generated_activations": int(tally.counts[GENERATED].sum()),
        "total_tokens": tokens,
        "prompt_tokens": int(tally.num_tokens[PROMPT]),
        "generated_tokens": int(tally.num_tokens[GENERATED]),
        "total_requests": requests,
        "total_layers": num_layers,
        "total_experts": sum(snapshot.expert_counts),
        "experts_per_layer": snapshot.num_experts,
        "active_experts_per_token": snapshot.num_active_experts,
        "uptime": snapshot.window_end - snapshot.started_at,
        "half_life_minutes": snapshot.half_life_minutes,
        "rates": {
            "activations_per_second": _per_second(activations, snapshot),
            "tokens_per_second": _per_second(tokens, snapshot),
            "requests_per_second": _per_second(requests, snapshot),
        },
    }


def layer_rows(snapshot: ExpertSnapshot) -> list[dict[str, Any]]:
    """One row per layer, in order.

    `mean_activations_per_second` is per expert. `num_hot_experts` have at least `HOT` times an even share,
    `num_dead_experts` were never used. `max_to_mean` and what follows it measure balance (see `balance`); null where
    nothing was activated. `coverage` says how many experts take 50, 90 and 99% of the layer's activations.
    """
    if not snapshot.layer_ids:
        return []
    counted = _count_columns(snapshot, axis=-1)
    counts = snapshot.tally.counts.sum(axis=0)
    num_used = np.count_nonzero(counts, axis=-1)
    columns: dict[str, list[Any]] = {
        "layer_id": list(snapshot.layer_ids),
        **counted,
        "mean_activations_per_second": [
            rate / size for rate, size in zip(counted["activations_per_second"], snapshot.expert_counts, strict=True)
        ],
        "num_experts": list(snapshot.expert_counts),
        "num_used_experts": num_used.tolist(),
        "num_dead_experts": (snapshot.sizes - num_used).tolist(),
        "num_hot_experts": np.count_nonzero(relative_share(counts, snapshot.sizes) >= HOT, axis=-1).tolist(),
        **{name: _nullable(values) for name, values in balance(counts, snapshot.sizes).items()},
        "coverage": coverage(counts),
    }
    return _rows(columns)


def expert_columns(snapshot: ExpertSnapshot) -> dict[str, list[Any]]:
    """A column per field, a row per expert, by layer and expert id.

    `layer_share` is the expert's part of its layer's activations (0 to 1), `gate_mass` the sum of the gate weights it
    was given, `decaying_rate` activations per second with recent ones weighing more (whatever the window),
    `last_activation` null if it was never activated.
    """
    counts = snapshot.tally.counts.sum(axis=0)
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    rows, expert_ids = np.nonzero(snapshot.exists)
    return {
        "layer_id": np.array(snapshot.layer_ids, np.int64)[rows].tolist(),
        "expert_id": expert_ids.tolist(),
        **_count_columns(snapshot),
        "layer_share": share[snapshot.exists].tolist(),
        "decaying_rate": snapshot.decaying_rate[snapshot.exists].tolist(),
        "last_activation": _nullable(snapshot.last_activation[snapshot.exists]),
    }


def recent_rows(snapshot: ExpertSnapshot) -> list[dict[str, Any]]:
    """The latest activations, newest first: one row per step, layer and expert, with its number of tokens."""
    return [
        {
            "timestamp": item.timestamp,
            "layer_id": item.layer_id,
            "expert_id": item.expert_id,
            "token_count": item.num_prompt_tokens + item.num_generated_tokens,
            "prompt_count": item.num_prompt_tokens,
            "generated_count": item.num_generated_tokens,
        }
        for item in reversed(snapshot.recent)
    ]


def label_rows(snapshot: ExpertSnapshot) -> list[dict[str, Any]]:
    """The labels that requests had since the last reset, with their tokens."""
    return [{"label": label, "tokens": num_tokens} for label, num_tokens in snapshot.labels.items()]


def balance(
    counts: npt.NDArray[np.integer], sizes: npt.NDArray[np.integer] | None = None
) -> dict[str, npt.NDArray[np.float64]]:
    """How evenly each layer uses its experts, from `counts` [layers, experts]; NaN for a layer without activations.

    Args:
        sizes: experts of each layer, [layers]; None: all have as many as there are columns. Behind them are zeros.

    Returns, each [layers]:
        max_to_mean: the busiest expert against the mean; 1 is even, the number of experts is the worst.
        mean_to_max: its inverse, the part of the capacity in use if experts ran in parallel.
        max_violation: `max_to_mean` - 1 (MaxVio; Wang et al. 2024).
        coefficient_of_variation: standard deviation over mean; 0 is even.
        normalized_entropy: Shannon entropy over its maximum; 1 is even, 0 is one expert only.
        gini: half the mean difference of two experts over the mean; 0 is even, 1 - 1/experts is one expert only.
    """
    width = counts.shape[-1]
    num_experts = np.full(counts.shape[:-1], width) if sizes is None else sizes
    exists = np.arange(width) < num_experts[..., None]
    # Sorted, what does not exist comes first, with nothing of the layer's activations.
    ranks = 2 * (np.arange(1, width + 1) - width) + num_experts[..., None] - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = counts.sum(axis=-1) / num_experts
        spread = np.sqrt((np.where(exists, counts - mean[..., None], 0.0) ** 2).sum(axis=-1) / num_experts)
        share = counts / counts.sum(axis=-1, keepdims=True)
        entropy = -np.where(share > 0, share * np.log(share), share).sum(axis=-1)
        max_to_mean = counts.max(axis=-1, initial=0) / mean
        return {
            "max_to_mean": max_to_mean,
            "mean_to_max": 1 / max_to_mean,
            "max_violation": max_to_mean - 1,
            "coefficient_of_variation": spread / mean,
            "normalized_entropy": entropy / np.log(np.maximum(num_experts, 2)),
            "gini": (np.sort(share, axis=-1) * ranks).sum(axis=-1) / num_experts,
        }


def relative_share(counts: npt.NDArray[Any], sizes: npt.NDArray[np.integer] | None = None) -> npt.NDArray[np.float64]:
    """Each expert's part of its layer over an even part, [layers, experts]; 0 for a layer without activations.

    Args:
        sizes: see `balance`.
    """
    totals = counts.sum(axis=-1, keepdims=True)
    num_experts = counts.shape[-1] if sizes is None else sizes[:, None]
    return np.asarray(counts / np.where(totals > 0, totals, 1) * num_experts)


def coverage(counts: npt.NDArray[np.integer]) -> list[dict[str, int | None]]:
    """How many experts, the busiest first, take 50, 90 and 99% of each layer's activations; null if there are none."""
    cumulative = np.cumsum(-np.sort(-counts, axis=-1), axis=-1)
    totals = counts.sum(axis=-1)
    needed = {str(percent): (cumulative * 100 < percent * totals[:, None]).sum(axis=-1) + 1 for percent in COVERAGES}
    return [
        {name: int(numbers[row]) if total else None for name, numbers in needed.items()}
        for row, total in enumerate(totals.tolist())
    ]


def grid(snapshot: ExpertSnapshot, phase: str = "all", measure: str = "count") -> dict[str, Any]:
    """One number per layer and expert, with each layer's balance; what a heatmap needs.

    Args:
        phase: `all`, `prompt` or `generated`.
        measure: `count` or `gate_mass`.
    """
    phases = PHASES[phase]
    counts = measured(snapshot.tally, phase)
    figures = {name: _nullable(column) for name, column in balance(counts, snapshot.sizes).items()}
    rows = _rows({"layer_id": list(snapshot.layer_ids), **figures, "coverage": coverage(counts)})
    return {
        "layer_ids": list(snapshot.layer_ids),
        "num_experts": snapshot.num_experts,
        "expert_counts": list(snapshot.expert_counts),
        "num_active_experts": snapshot.num_active_experts,
        "phase": phase,
        "measure": measure,
        "label": snapshot.label,
        "values": measured(snapshot.tally, phase, measure).tolist(),
        "total_tokens": int(snapshot.tally.num_tokens[phases].sum()),
        "total_requests": int(snapshot.tally.num_requests),
        "window": window(snapshot),
        "balance": rows,
    }


def measured(tally: Tally, phase: str = "all", measure: str = "count") -> npt.NDArray[Any]:
    """One number per layer and expert, [layers, experts]; the arguments as in `grid`."""
    values: npt.NDArray[Any] = {"count": tally.counts, "gate_mass": tally.gate_mass}[measure]
    return np.asarray(values[PHASES[phase]].sum(axis=0))


def concentration(snapshot: ExpertSnapshot) -> list[dict[str, Any]]:
    """Per layer, the Lorenz curve (`lorenz[i]`: the part of the activations that the i least used experts take), Gini
    and coverage.
    """
    counts = snapshot.tally.counts.sum(axis=0)
    totals = np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    curves = np.concatenate(
        [np.zeros((len(counts), 1)), np.cumsum(np.sort(counts, axis=-1), axis=-1) / totals], axis=-1
    )
    return _rows(
        {
            "layer_id": list(snapshot.layer_ids),
            "lorenz": [curve[-size - 1 :] for curve, size in zip(curves.tolist(), snapshot.expert_counts, strict=True)],
            "gini": _nullable(balance(counts, snapshot.sizes)["gini"]),
            "coverage": coverage(counts),
        }
    )


def _count_columns(snapshot: ExpertSnapshot, axis: int | None = None) -> dict[str, list[Any]]:
    """The columns that layers and experts share, summed over `axis` of the grids."""

    def column(grid: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return grid[snapshot.exists] if axis is None else grid.sum(axis=axis).reshape(-1)

    prompt, generated = (column(snapshot.tally.counts[phase]) for phase in (PROMPT, GENERATED))
    return {
        "activation_count": (prompt + generated).tolist(),
        "prompt_count": prompt.tolist(),
        "generated_count": generated.tolist(),
        "gate_mass": column(snapshot.tally.gate_mass.sum(axis=0)).tolist(),
        "activations_per_second": _per_second(prompt + generated, snapshot).tolist(),
    }


def _per_second(count: Any, snapshot: ExpertSnapshot) -> Any:
    """`count` over the window; 0 for a window without length."""
    return count / snapshot.window_seconds if snapshot.window_seconds > 0 else count * 0.0


def _nullable(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    # Without a loop of our own: a grid of 94 × 128 experts has twelve thousand rows.
    return list(map(dict, map(zip, repeat(tuple(columns)), zip(*columns.values(), strict=True))))


def _check_top_k(top_k: int | None, snapshot: ExpertSnapshot) -> int:
    num_experts = sum(snapshot.expert_counts)
    if top_k is None:
        return min(DEFAULT_TOP_K, num_experts)
    if not num_experts:
        raise RequestError(f"top_k is {describe(top_k)}.", remedy="Leave it out: this model has no experts.")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise RequestError(
            f"top_k is {describe(top_k)}.",
            remedy=f"Allowed: an integer from 1 to {num_experts} (this model's experts in all layers).",
        )
    return top_k
