"""Whether weights of different sources can stand behind each other.

In: the planned weights. Out: nothing, or the error. Must never know: which tool made a source.

Some tools move scales between weights that follow each other and leave no word of it: AWQ (Lin et al. 2023,
arXiv:2306.00978) and SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) divide a norm by factors and multiply the
projections behind it by them, or up and down of one MLP; rotations make all norms ones. Each such checkpoint is right
by itself. A projection of it behind another one's norm gives garbage, and no shape tells. So where a block takes
weights from several sources, their norms must be the same, and where a factor could be shared by two projections of
different sources, some such pairs are read from both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amalgam.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    from amalgam.models.loader import PlannedWeight
    from amalgam.precision.format import StoredWeight
    from amalgam.precision.source import Source

# Norms are stored as they are or cast to 16 bits, which moves them by less than half of a hundredth.
_NORM_TOLERANCE = 0.01
# The second projection of each pair multiplies what the first one gives, channel by channel.
_PAIRS = (("up", "down"), ("v", "o"))
# Rounding to 2 bits leaves the rows' lengths within a few percent of each other, and a row's direction within 0.9.
_MAX_SPREAD = 0.15
_MIN_COSINE = 0.5
# AWQ often spreads the rows' lengths by less than that, but what a row loses its column gains; rounding to 8 bits moves
# lengths by less than a hundredth, and coarser rounding moves rows and columns independently.
_MIN_MOVED = 0.01
# Of each kind of pair, spread over the model: a tool may find nothing to move in some.
_NUM_EXAMPLES = 8
_EVERY_ROW = 61  # of the hundreds of megabytes of a head
_REMEDY = (
    "Tools such as AWQ and SmoothQuant move scales from one weight into the next; or these are different models. "
    "Take {what} from one source."
)


def check_agreement(planned: Sequence[PlannedWeight]) -> None:
    """Compare norms, and some examples of each kind of pair, between the sources that share a block; reads those.

    Raises:
        PlanError: two weights that follow each other come from sources that disagree, by name.
    """
    if len({id(weight.source) for weight in planned}) < 2:
        return
    blocks: dict[str, list[PlannedWeight]] = defaultdict(list)
    for weight in planned:
        blocks[_block(weight.slot.name)].append(weight)
    for weights in blocks.values():
        _check_norms(weights)
    _check_pairs({weight.slot.name: weight for weight in planned})


def check_tied_head(source: Source, embedding: str, head: str) -> None:
    """Compare a head that a tied checkpoint stores nevertheless with its embedding.

    Raises:
        CheckpointError: they differ: either the head is one of its own and the config wrong, or the head is left over.
    """
    found = [source.weights[name] for name in (embedding, head) if name in source.weights]
    if len(found) == 2 and not (all(weight.is_wide for weight in found) and _have_same_rows(source, *found)):
        raise CheckpointError(
            f"{source.config_place} ties the head to the embedding, but {source.folder} has a {head!r} of its own.",
            remedy="Set tie_word_embeddings to false in config.json if it is to be used, or remove the tensor.",
        )


def _have_same_rows(source: Source, *weights: StoredWeight) -> bool:
    """Whether a sample of two wide weights is the same: one that was trained by itself differs in every row."""
    first, second = (source.read(part)[::_EVERY_ROW] for weight in weights for part in weight.parts.values())
    return torch.equal(first.float(), second.float())


def _block(slot: str) -> str:
    """`layers.3.attention` for its projections and norms; `` for the last norm and the head."""
    parts = slot.split(".")
    return ".".join([*parts[:2], parts[2].split("_")[0]]) if parts[0] == "layers" else ""


def _check_norms(weights: Iterable[PlannedWeight]) -> None:
    norms = [weight for weight in weights if weight.slot.role == "norm"]
    users = {weight.source.name: weight for weight in weights if weight.slot.is_linear or weight.slot.role == "router"}
    for norm in norms:
        others = [user for user in users.values() if user.source is not norm.source]
        used = norm.source.values(norm.choice.name) if others else None
        for user in others:
            theirs = user.source.values(norm.choice.name)
            if used is None or theirs is None or theirs.shape != used.shape:
                continue
            difference = (theirs - used).abs() - _NORM_TOLERANCE * torch.maximum(theirs.abs(), used.abs())
            if bool((difference > 1e-5 * used.abs().max()).any()):
                raise PlanError(
                    f"Weight {user.choice.name!r} would come from source {user.source.name!r}, and "
                    f"{norm.choice.name!r} before it from {norm.source.name!r}, but these sources disagree in the "
                    "latter.",
                    remedy=_REMEDY.format(what="the norm and all weights of its block"),
                )


def _check_pairs(weights: Mapping[str, PlannedWeight]) -> None:
    pairs: dict[tuple[str, str, str], list[tuple[PlannedWeight, PlannedWeight]]] = defaultdict(list)
    for slot, second in weights.items():
        prefix, _, last = slot.rpartition(".")
        for before, after in _PAIRS:
            first = weights.get(f"{prefix}.{before}") if last == after else None
            if first is not None and first.source is not second.source:
                pairs[after, first.source.name, second.source.name].append((first, second))
    for found in pairs.values():
        for index in range(min(_NUM_EXAMPLES, len(found))):
            _check_pair(*found[index * len(found) // min(_NUM_EXAMPLES, len(found))])


def _check_pair(first: PlannedWeight, second: PlannedWeight) -> None:
    before = _in_both(first.choice.name, first.source, second.source)
    if before is None:
        return
    is_same = _is_same(*before)
    # Where heads share a value there are fewer rows than columns: no tool moves scales there.
    if is_same and first.slot.shape[0] == second.slot.shape[1]:
        lost = _log_ratio(*before, dim=1)
        del before  # before the next two matrices are read
        after = _in_both(second.choice.name, first.source, second.source)
        is_same = after is None or not _has_moved(lost, _log_ratio(*after, dim=0))
    if not is_same:
        raise PlanError(
            f"Weight {second.choice.name!r} would come from source {second.source.name!r}, and "
            f"{first.choice.name!r} before it from {first.source.name!r}, but these sources disagree in the "
            "latter by more than rounding.",
            remedy=_REMEDY.format(what="both"),
        )


def _in_both(name: str, *sources: Source) -> tuple[Tensor, Tensor] | None:
    """A matrix as two sources have it; None if one lacks it."""
    one, other = (source.values(name) for source in sources)
    return None if one is None or other is None or one.shape != other.shape else (one, other)


def _log_ratio(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Of the lengths of two matrices' rows (1) or columns (0); not finite where one is empty."""
    lengths: tuple[Tensor, Tensor] = one.norm(dim=dim), other.norm(dim=dim)
    return torch.log(lengths[0] / lengths[1])


def _has_moved(lost: Tensor, gained: Tensor) -> bool:
    """Whether the columns of the second weight gained what the rows of the first one lost."""
    is_there = lost.isfinite() & gained.isfinite()
    if not bool(is_there.any()):
        return False
    moved = _spread(lost[is_there])
    return moved > _MIN_MOVED and _spread((lost + gained)[is_there]) < moved / 2


def _spread(values: Tensor) -> float:
    return float((values - values.median()).abs().mean())


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices are one, rounded in different ways: their rows point the same way, all equally long."""
    lengths = one.norm(dim=1), other.norm(dim=1)
    is_there = (lengths[0] > 0) & (lengths[1] > 0)
    if not bool(is_there.any()):
        return True
    cosine = ((one * other).sum(dim=1) / (lengths[0] * lengths[1]))[is_there]
    ratio = (lengths[0] / lengths[1])[is_there].log()
    return bool(cosine.mean() > _MIN_COSINE) and _spread(ratio) < _MAX_SPREAD
