"""Which channels of MLPs and experts go.

In: a survey, weights. Out: the channels that remain, by MLP. Must never know: files.

Criteria, the least of which goes first:

    activation  the norm of the channel over the texts × the norm of its column of `down` (Sun et al. 2024, "Wanda",
                summed over a column; An et al. 2024, "FLAP")
    magnitude   the product of the norms of the channel's weights: its rows of gate and up, its column of down

All MLPs of one width lose as many. An MLP that no token reached goes by magnitude.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from amalgam.composition.progress import Progress
from amalgam.composition.wide import WideModel
from amalgam.errors import ConfigError, UnsupportedError
from amalgam.models.spec import ModelSpec
from amalgam.pruning.amounts import Amount
from amalgam.pruning.survey import Survey

ChannelCriterion = Literal["activation", "magnitude"]
CHANNEL_CRITERIA: tuple[ChannelCriterion, ...] = get_args(ChannelCriterion)
MULTIPLE = 32  # what kernels and groups of scales like widths to be divisible by
_DOWN = re.compile(r"(layers\.\d+\.mlp\.(?:experts\.\d+\.|shared\.)?)down")


def widths_of(spec: ModelSpec, amount: Amount) -> dict[int, int]:
    """Width of an MLP → what remains of it, a multiple of 32 where the width is one.

    Raises:
        ConfigError: nothing goes, or nothing remains.
    """
    found: dict[int, int] = {}
    for slot in spec.slots:
        if _DOWN.fullmatch(slot.name) and (width := slot.shape[1]) not in found:
            multiple = MULTIPLE if width % MULTIPLE == 0 else 1
            remaining = -(-(width - amount.of(width)) // multiple) * multiple
            if not 0 < remaining < width:
                raise ConfigError(
                    f"Of {width} channels {max(remaining, 0)} would remain.",
                    remedy=f"Let some go, and some remain: numbers that remain are multiples of {multiple}.",
                )
            found[width] = remaining
    if not found:
        raise UnsupportedError("The model has no MLP whose channels could go.", remedy="Prune something else.")
    # Shared experts are as wide as several: what remains of them has to be as many times as wide.
    narrow = min(found)
    return {width: found[narrow] * (width // narrow) if width % narrow == 0 else found[width] for width in found}


def kept_channels(
    criterion: ChannelCriterion,
    model: WideModel,
    found: Survey | None,
    widths: Mapping[int, int],
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """MLP → its channels that remain, in order.

    Args:
        found: None: the texts do not matter.
    """
    kept = {}
    mlps = [match[1] for slot in model.spec.slots if (match := _DOWN.fullmatch(slot.name))]
    for number, mlp in enumerate(mlps):
        if progress is not None:
            progress("Choosing channels, MLP", number, len(mlps))
        squares = None if found is None or criterion == "magnitude" else found.channels.get(mlp)
        score = _score(model, mlp, squares)
        order = score.sort(descending=True, stable=True).indices[: widths[len(score)]]
        kept[mlp] = order.sort().values
    return kept


def _score(model: WideModel, mlp: str, squares: Tensor | None) -> Tensor:
    """Of each channel, float64."""
    score: Tensor = model.load(f"{mlp}down").dense.double().norm(dim=0)
    if squares is not None and bool(squares.any()):
        return score * squares.sqrt()
    for part in ("gate", "up"):
        if f"{mlp}{part}" in model.by_slot:
            score = score * model.load(f"{mlp}{part}").dense.double().norm(dim=1)
    if f"{mlp}gate_up" in model.by_slot:
        rows = model.load(f"{mlp}gate_up").dense.double().norm(dim=1)
        score = score * torch.stack(rows.chunk(2)).prod(dim=0)
    return score
