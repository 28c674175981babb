"""Several experts → one: a mean of their weights, channel by matching channel.

In: the projections of some experts, how much each counts. Out: those of their mean. Must never know: layers, how the
experts were chosen.

The order of an expert's channels is arbitrary, so that a plain mean would mix channels that have nothing to do with
each other. Each expert's channels are put beside those of the first one that they are most like, by the cosine of all
that belongs to a channel: its rows of gate and up, its column of down (Li et al. 2024, "Merge, Then Compress", section
3.1). The pairing is greedy, the most similar first, where theirs is optimal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

# Expert and projection (`gate`, `up_bias`) → its values.
Part = Callable[[int, str], Tensor]


def merged(group: Sequence[int], shares: Sequence[float], part: Part, name: str) -> Tensor:
    """One projection of the mean of a group, in the first one's order of channels and in its type.

    Args:
        shares: how much each expert counts; all 0: all alike.
    """
    total = sum(shares)
    weights = [share / total for share in shares] if total else [1 / len(group)] * len(group)
    first = channels_of(group[0], part)
    result = part(group[0], name).float() * weights[0]
    for expert_id, weight in zip(group[1:], weights[1:], strict=True):
        order = matching(first, channels_of(expert_id, part))
        other = part(expert_id, name).float()
        if name == "down":
            other = other[:, order]
        elif name != "down_bias":
            other = other[order]
        result += weight * other
    return result.to(part(group[0], name).dtype)


def channels_of(expert_id: int, part: Part) -> Tensor:
    """All that belongs to each channel, as unit vectors: float32 `[channels, 3 hidden]`."""
    gate, up, down = (part(expert_id, name).float() for name in ("gate", "up", "down"))
    return functional.normalize(torch.cat((gate, up, down.t()), dim=1), dim=1)


def matching(first: Tensor, other: Tensor) -> Tensor:
    """For each of the first's channels, the other's that is paired with it: int64 `[channels]`, each once."""
    similarity = first @ other.t()
    count = len(similarity)
    best = similarity.flatten().sort(descending=True, stable=True).indices
    order = torch.full((count,), -1, dtype=torch.int64)
    is_free = torch.ones(count, dtype=torch.bool)
    is_open = torch.ones(count, dtype=torch.bool)
    while bool(is_open.any()):
        best = best[is_open[best // count] & is_free[best % count]]
        rows, columns = best // count, best % count
        # What is the best pair of both its row and its column cannot be taken by another.
        at = torch.arange(len(best))
        first_of_row = torch.full((count,), len(best)).scatter_reduce(0, rows, at, "amin")
        first_of_column = torch.full((count,), len(best)).scatter_reduce(0, columns, at, "amin")
        is_taken = (first_of_row[rows] == at) & (first_of_column[columns] == at)
        order[rows[is_taken]] = columns[is_taken]
        is_open[rows[is_taken]] = False
        is_free[columns[is_taken]] = False
    return order
