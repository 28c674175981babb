"""Which weights of a model learn, and what of them.

In: a model's slots and packed weights, the kinds that are asked for. Out: `Trained` by slot. Must never know: files,
losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from amalgam.errors import ConfigError
from amalgam.kernels.weights import PackedWeight
from amalgam.models.spec import Slot
from amalgam.training.codes import range_of
from amalgam.training.weights import Trained, TrainedCodes, TrainedScales, TrainedValues

Kind = Literal["scales", "codes", "norms", "biases", "routers", "wide"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HEALING: frozenset[Kind] = frozenset(("scales", "norms", "biases", "routers"))
LEARNING: frozenset[Kind] = frozenset(("norms", "biases", "routers", "wide"))
_BY_ROLE: Mapping[str, Kind] = {"norm": "norms", "bias": "biases", "router": "routers"}
# Read when a program is made, or where only the order of scores counts: no gradient comes back.
_INDEXER = ".index_"
_UNTRAINED_ENDS = ("rope_growth", ".scalar", ".router_correction")
_POWERS_OF_TWO = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Selection:
    """What learns.

    Attributes:
        kinds: scales: of quantized weights; codes: those are rounded anew, too; norms, biases, routers; wide: all other
            floating weights.
        rank: of matrices that learn value by value or code by code: a low-rank update instead; None: no.

    Raises:
        ConfigError: no such kind, or none; a rank that nothing has.
    """

    kinds: frozenset[Kind]
    rank: int | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            what = f"There is no kind of weight {unknown[0]!r}." if unknown else "Nothing is to be trained."
            raise ConfigError(what, remedy=f"Kinds: {', '.join(KINDS)}.")
        if self.rank is not None and not self.kinds & {"codes", "wide"}:
            raise ConfigError(
                f"A rank of {self.rank} is given, and no matrix learns.", remedy="Train codes or wide, or leave it out."
            )


def trained_weights(
    slots: Sequence[Slot],
    weights: Mapping[str, PackedWeight],
    bits: Mapping[str, int | None],
    selection: Selection,
    wide: Callable[[str], Tensor | None],
    seed: int,
) -> dict[str, Trained]:
    """What learns, by slot.

    Args:
        weights, bits: by slot; bits of a code as it is stored.
        wide: slot → the weight before it was quantized, if that is known.
        seed: of low-rank updates.

    Raises:
        ConfigError: nothing of the model does.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {
        slot.name: trained
        for slot in slots
        if (trained := _trained(slot, weights[slot.name], bits.get(slot.name), selection, wide, generator)) is not None
    }
    if not found:
        raise ConfigError(
            f"The student has no weights of the kinds {', '.join(sorted(selection.kinds))}.",
            remedy="Choose others, or a student that is quantized to train its scales.",
        )
    return found


def _trained(
    slot: Slot,
    weight: PackedWeight,
    bits: int | None,
    selection: Selection,
    wide: Callable[[str], Tensor | None],
    generator: torch.Generator,
) -> Trained | None:
    if _INDEXER in slot.name or slot.name.endswith(_UNTRAINED_ENDS):
        return None
    if weight.layout.name == "dense":
        kind = _BY_ROLE.get(slot.role, "wide")
        rank = selection.rank if kind == "wide" and len(slot.shape) == 2 else None
        return TrainedValues(weight, rank, generator=generator) if kind in selection.kinds else None
    if not selection.kinds & {"scales", "codes"} or not has_trainable_scales(weight):
        return None
    allowed = range_of(weight, bits) if "codes" in selection.kinds and bits is not None else None
    if allowed is None:
        return TrainedScales(weight)
    return TrainedCodes(weight, allowed, wide(slot.name), selection.rank, generator=generator)


def has_trainable_scales(weight: PackedWeight) -> bool:
    """Powers of two cannot move by a little."""
    scale = weight.parts.get("scale")
    return scale is not None and scale.dtype is not _POWERS_OF_TWO
