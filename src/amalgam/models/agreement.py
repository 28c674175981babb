"""Whether weights of different sources compute one function together.

In: the planned weights. Out: nothing, or the error. Must never know: which tool made a source.

Two checkpoints of one function can stand in different bases (`amalgam.models.gauges`), and no shape tells. A mix of
them is right if every weight taken from one is, but for rounding, the other's; or if whatever basis differs between
them lies in weights that all come from one of the two. So for each pair of sources that a plan mixes,

- weights that both have are compared: small ones whole, wide ones by rows and columns chosen by a hash of their name;
- an axis that is the same in both clears the gauges that it stands in, one that moved puts them under suspicion;
- what no other weight has cleared has moved, and all weights that touch it must come from one source;
- where a weight differs although its gauges are cleared, the two are different models, and all of it is one's.

A router decides about the order of its experts and a norm about the factors behind it, since no other weight does.
What only one of two sources has cannot be compared; a source of experts alone is compared by its experts.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amalgam.errors import CheckpointError, PlanError
from amalgam.models.gauges import RESIDUAL, Axes, axes_of
from amalgam.models.likeness import SAME, UNTOLD, Axis, Likeness, compare
from amalgam.precision.rounding import rounding_of

if TYPE_CHECKING:
    from amalgam.models.loader import PlannedWeight
    from amalgam.models.spec import Slot
    from amalgam.precision.format import StoredWeight
    from amalgam.precision.source import Source

# Vectors are stored as they are or cast to 16 bits, which moves them by less than half of a hundredth.
_VECTOR_TOLERANCE = 0.01
_MAX_ROWS = 96  # of a wide weight that are compared
_COLUMN_RUN = 64  # neighbours share scales
_MAX_COLUMNS = 768
# Experts that are looked at in all layers together: where one is put together from both sources, and otherwise.
_MIXED_EXPERTS, _WHOLE_EXPERTS = 512, 128
_CHUNK_ROWS = 4096  # of a head that is compared as a whole
_MAX_NAMED = 4


def check_agreement(planned: Sequence[PlannedWeight]) -> None:
    """Compare the sources that a plan mixes; reads what `_Pair` chooses.

    Raises:
        PlanError: a basis differs between two sources, and weights that stand in it come from both.
    """
    sources = {id(weight.source): weight.source for weight in planned}
    for one, other in combinations(sources.values(), 2):
        _Pair(one, other, planned).check()


def check_tied_head(source: Source, embedding: str, head: str) -> None:
    """Compare a head that a tied checkpoint stores nevertheless with its embedding, all of it.

    Raises:
        CheckpointError: they differ: either the head is one of its own and the config wrong, or the head is left over.
    """
    found = [source.weights[name] for name in (embedding, head) if name in source.weights]
    if len(found) == 2 and not _have_same_values(source, *found):
        raise CheckpointError(
            f"{source.config_place} ties the head to the embedding, but {source.folder} has a {head!r} of its own.",
            remedy="Set tie_word_embeddings to false in config.json if it is to be used, or remove the tensor.",
        )


def _have_same_values(source: Source, one: StoredWeight, other: StoredWeight) -> bool:
    """Whether two weights are equal: byte by byte, or value by value where both are wide in different types."""
    if one.shape != other.shape or one.parts.keys() != other.parts.keys():
        return False
    if not (one.is_wide and other.is_wide) and one.format.name != other.format.name:
        return False
    for role in one.parts:
        first, second = (source.read(weight.parts[role]) for weight in (one, other))
        if first.shape != second.shape or (first.dtype != second.dtype and not one.is_wide):
            return False
        for start in range(0, len(first) if first.dim() else 1, _CHUNK_ROWS):
            parts = [part[start : start + _CHUNK_ROWS] if part.dim() else part for part in (first, second)]
            if first.dtype == second.dtype:
                parts = [part.contiguous().view(torch.uint8) if part.dim() else part for part in parts]
            else:
                parts = [part.float() for part in parts]
            if not torch.equal(*parts):
                return False
    return True


@dataclass
class _Gauge:
    """What is known of one gauge between two sources."""

    is_same: bool = False
    is_decided: bool = False  # by the weight that does
    suspects: list[PlannedWeight] = field(default_factory=list)  # that differ, perhaps because of it


class _Pair:
    """Two sources of a plan, and the weights that come from either."""

    def __init__(self, one: Source, other: Source, planned: Sequence[PlannedWeight]) -> None:
        self._sources = one, other
        self._planned = [weight for weight in planned if weight.source is one or weight.source is other]
        self._axes = {weight.slot.name: axes_of(weight.slot.name) for weight in self._planned}
        self._touching: dict[str, list[PlannedWeight]] = defaultdict(list)
        for weight in self._planned:
            for gauge in self._axes[weight.slot.name].all:
                self._touching[gauge].append(weight)
        self._gauges: dict[str, _Gauge] = defaultdict(_Gauge)

    def check(self) -> None:
        """
        Raises:
            PlanError: see `check_agreement`.
        """
        differing: list[tuple[PlannedWeight, Likeness, frozenset[str]]] = []
        for weight, likeness in self._compared():
            axes = self._axes[weight.slot.name]
            for axis, gauges in ((likeness.outputs, axes.outputs), (likeness.inputs, axes.inputs)):
                self._note(weight, axes, gauges, is_same=axis is Axis.SAME)
            if not likeness.is_same:
                moved_outputs = axes.outputs if likeness.outputs is not Axis.SAME else frozenset()
                moved_inputs = axes.inputs if likeness.inputs is not Axis.SAME else frozenset()
                differing.append((weight, likeness, moved_outputs | moved_inputs))
        others: dict[int, PlannedWeight] = {}  # of another model, by the source that they are taken from
        for weight, likeness, suspected in differing:
            left = [gauge for gauge in suspected if not self._gauges[gauge].is_same]
            # A norm that differs is reason enough for what reads it.
            told = [gauge for gauge in left if self._gauges[gauge].is_decided]
            decided_by_others = [gauge for gauge in told if gauge != self._axes[weight.slot.name].decides]
            left = decided_by_others or left
            for gauge in left:
                self._gauges[gauge].suspects.append(weight)
            if (
                not left and likeness is UNTOLD
            ):  # coarse rounding too may look like factors, but not like another matrix
                others.setdefault(id(weight.source), weight)
        moved = {name for name, gauge in self._gauges.items() if gauge.suspects and not gauge.is_same}
        broken = [gauge for gauge in moved if self._is_mixed(gauge)]
        if broken:
            raise self._error(max(sorted(broken), key=self._weight_of), moved)
        if len(others) == 2:
            raise self._different_models(*others.values())

    def _note(self, weight: PlannedWeight, axes: Axes, gauges: Iterable[str], *, is_same: bool) -> None:
        """What an axis says of its gauges. A vector says nothing but of the gauge that it decides."""
        for gauge in gauges:
            known = self._gauges[gauge]
            if axes.decides == gauge:
                known.is_same, known.is_decided = is_same, True
            elif is_same and not known.is_decided and len(weight.slot.shape) == 2 and not gauge.endswith(".experts"):
                known.is_same = True

    def _weight_of(self, gauge: str) -> tuple[bool, bool, int]:
        """Where several gauges are broken, the one that may be the reason for the others comes last."""
        is_norm = gauge.endswith("norm") and self._gauges[gauge].is_decided
        return gauge == RESIDUAL, is_norm, len(self._touching[gauge])

    def _is_mixed(self, gauge: str) -> bool:
        return len({id(weight.source) for weight in self._touching[gauge]}) > 1

    # --- What is compared ---

    def _compared(self) -> Iterator[tuple[PlannedWeight, Likeness]]:
        for weight in self._chosen():
            likeness = self._compare(weight)
            if likeness is not None:
                yield weight, likeness

    def _chosen(self) -> Iterator[PlannedWeight]:
        """All but the experts, and some of those, told by a hash which."""
        experts: dict[str, list[PlannedWeight]] = defaultdict(list)
        for weight in self._planned:
            found = re.match(r"layers\.\d+\.mlp\.experts\.\d+(?=\.)", weight.slot.name)
            if found is None:
                yield weight
            else:
                experts[found[0]].append(weight)
        for limit, is_mixed in ((_MIXED_EXPERTS, True), (_WHOLE_EXPERTS, False)):
            by_layer: dict[str, list[str]] = defaultdict(list)
            for expert, weights in experts.items():
                if (len({id(weight.source) for weight in weights}) > 1) is is_mixed:
                    by_layer[expert.split(".")[1]].append(expert)
            share = max(1, limit // max(1, len(by_layer)))
            for found_experts in by_layer.values():
                for expert in sorted(found_experts, key=_hash)[:share]:
                    yield from experts[expert]

    def _compare(self, weight: PlannedWeight) -> Likeness | None:
        """How the sources' versions of a weight compare; None where one of them has none of this shape."""
        found = [source.weights.get(weight.choice.name) for source in self._sources]
        stored = [version for version in found if version is not None]
        if len(stored) < 2 or stored[0].shape != stored[1].shape:
            return None
        if len(weight.slot.shape) == 1:
            values = [source.values(weight.choice.name) for source in self._sources]
            assert values[0] is not None and values[1] is not None
            return SAME if _are_close(values[0], values[1]) else UNTOLD
        rows, columns = _sample(weight.slot)
        parts = [
            _values(source, s, weight.slot, rows, columns) for source, s in zip(self._sources, stored, strict=True)
        ]
        rounding = [rounding_of(s, part) for s, part in zip(stored, parts, strict=True)]
        return compare(*parts, *rounding)

    # --- What is said ---

    def _error(self, gauge: str, moved: set[str]) -> PlanError:
        touching = self._touching[gauge]
        fewer = min((id(w.source) for w in touching), key=lambda key: sum(id(w.source) == key for w in touching))
        taken = next(weight for weight in touching if id(weight.source) == fewer)
        suspect = min(self._gauges[gauge].suspects, key=lambda weight: self._remoteness(weight, gauge))
        standing = next(weight for weight in touching if weight.source is not taken.source)
        together = self._closure(gauge, moved)
        if RESIDUAL in {g for weight in together for g in self._axes[weight.slot.name].all & moved}:
            remedy = (
                "The two compute in different bases throughout, as rotations of a whole model leave them (QuaRot, "
                "SpinQuant), or are different models. Take all weights from one of them."
            )
        else:
            names = _patterns(weight.choice.name for weight in together)
            remedy = (
                "Tools such as AWQ and SmoothQuant move factors from one weight into the next, others exchange "
                f"channels, heads or experts; or these are different models. Take {names} from one source."
            )
        return PlanError(
            f"Weight {taken.choice.name!r} would come from source {taken.source.name!r}, and "
            f"{standing.choice.name!r} from {standing.source.name!r}, but these sources disagree in "
            f"{suspect.choice.name!r} by more than rounding: a basis that these weights share differs.",
            remedy=remedy,
        )

    def _remoteness(self, weight: PlannedWeight, gauge: str) -> int:
        """The weight that decides a gauge says most, then one that writes in it."""
        axes = self._axes[weight.slot.name]
        return 0 if axes.decides == gauge else 1 if gauge in axes.outputs else 2

    def _closure(self, gauge: str, moved: set[str]) -> list[PlannedWeight]:
        """What has to come from one source together: all that touches the gauge, and moved ones that those touch."""
        pending, seen, found = [gauge], {gauge}, {}
        while pending:
            for weight in self._touching[pending.pop()]:
                found[weight.slot.name] = weight
                for other in (self._axes[weight.slot.name].all & moved) - seen:
                    seen.add(other)
                    pending.append(other)
        return list(found.values())

    def _different_models(self, one: PlannedWeight, other: PlannedWeight) -> PlanError:
        return PlanError(
            f"Weight {one.choice.name!r} would come from source {one.source.name!r} and {other.choice.name!r} from "
            f"{other.source.name!r}, but these sources disagree in both by more than rounding.",
            remedy="These are different models, or different states of one. Take all weights from one of them.",
        )


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _are_close(one: Tensor, other: Tensor) -> bool:
    difference = (one - other).abs() - _VECTOR_TOLERANCE * torch.maximum(one.abs(), other.abs())
    return not bool((difference > 1e-5 * one.abs().max()).any())


def _sample(slot: Slot) -> tuple[Tensor, Tensor]:
    """Some rows and runs of columns of a matrix, by a hash of its name: what is moved at a stride is seen too."""
    generator = torch.Generator().manual_seed(int.from_bytes(_hash(slot.name)[:7]))
    num_rows, num_columns = slot.shape
    is_whole = slot.role == "router"
    rows = torch.arange(num_rows)
    if num_rows > _MAX_ROWS and not is_whole:
        rows = torch.randperm(num_rows, generator=generator)[:_MAX_ROWS].sort().values
    columns = torch.arange(num_columns)
    if num_columns > _MAX_COLUMNS and not is_whole:
        runs = torch.randperm(num_columns // _COLUMN_RUN, generator=generator)[: _MAX_COLUMNS // _COLUMN_RUN]
        columns = (runs.sort().values[:, None] * _COLUMN_RUN + torch.arange(_COLUMN_RUN)).flatten()
    return rows, columns


def _values(source: Source, stored: StoredWeight, slot: Slot, rows: Tensor, columns: Tensor) -> Tensor:
    """Those rows and columns of a weight, float32."""
    with source.opened(stored) as packed:
        if packed.layout == "dense":
            whole = packed.dense.t() if slot.is_transposed else packed.dense
            return whole[rows][:, columns].float()
        if packed.has_own_rows:
            return packed.take_rows(rows).dequantize(torch.float32)[:, columns]
        return packed.dequantize(torch.float32)[rows][:, columns]


def _patterns(names: Iterable[str]) -> str:
    """Names with their numbers as `*`, each once."""
    found = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    more = f" and {len(found) - _MAX_NAMED} more kinds beside them" if len(found) > 2 * _MAX_NAMED else ""
    return ", ".join(found[: _MAX_NAMED if more else None]) + more
