"""Which layers go.

In: what each layer does. Out: the layers that remain. Must never know: files, how a divergence is measured.

Criteria, the least of which goes first:

    influence  1 - the mean cosine of a token's hidden state before the layer and behind it (Men et al. 2024,
               "ShortGPT")
    kl         the divergence from the whole model without the layer; one layer after the other, each measured without
               those that have gone before it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from amalgam.composition.progress import Progress
from amalgam.errors import ConfigError, UnsupportedError

LayerCriterion = Literal["influence", "kl"]
LAYER_CRITERIA: tuple[LayerCriterion, ...] = get_args(LayerCriterion)
# Layers that remain → the divergence of what is left.
Measure = Callable[[tuple[int, ...]], float]


def check_count(count: int, num_layers: int) -> None:
    """
    Raises:
        ConfigError: no layer goes, or none remains.
    """
    if num_layers < 2:
        raise UnsupportedError("The model has one layer.", remedy="Prune experts, channels or weights.")
    if not 0 < count < num_layers:
        raise ConfigError(f"{count} of {num_layers} layers would go.", remedy=f"Let 1 to {num_layers - 1} of them go.")


def by_influence(influence: Sequence[float], count: int) -> tuple[int, ...]:
    """The layers that remain when the `count` with the least influence go; of equals the later ones go."""
    order = sorted(range(len(influence)), key=lambda layer_id: (influence[layer_id], -layer_id))
    return tuple(sorted(order[count:]))


def by_divergence(
    num_layers: int, count: int, measure: Measure, progress: Progress | None = None
) -> tuple[tuple[int, ...], list[tuple[int, float]]]:
    """The layers that remain, and those that went, in order, each with the divergence behind it.

    Raises:
        UnsupportedError: no layer can go.
    """
    kept = tuple(range(num_layers))
    gone: list[tuple[int, float]] = []
    total, done = sum(num_layers - step for step in range(count)), 0
    for _ in range(count):
        tried: dict[int, float] = {}
        for layer_id in kept:
            try:
                tried[layer_id] = measure(tuple(other for other in kept if other != layer_id))
            except UnsupportedError:  # others read what this one makes
                continue
            finally:
                done += 1
                if progress is not None:
                    progress("Measuring without layer", done, total)
        if not tried:
            raise UnsupportedError("No layer can go: each makes what others read.", remedy="Prune something else.")
        layer_id = min(tried, key=lambda each: (tried[each], -each))
        gone.append((layer_id, tried[layer_id]))
        kept = tuple(other for other in kept if other != layer_id)
    return kept, gone
