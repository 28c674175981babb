"""Whether weights of different sources compute one function together.

In: the planned weights. Out: nothing, or the error. Must never know: which tool made a source.

Two checkpoints of one function can stand in different bases (`gauges`), and no shape tells. A mix of
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

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from amalgam.composition.gauges import RESIDUAL, Axes, axes_of
from amalgam.composition.likeness import SAME, UNTOLD, Axis, Likeness, compare
from amalgam.composition.patterns import patterns_of
from amalgam.composition.planned import PlannedWeight
from amalgam.composition.rounding import rounding_of
from amalgam.composition.samples import name_hash, sample
from amalgam.composition.source import Source
from amalgam.errors import PlanError
from amalgam.formats.contract import StoredWeight
from amalgam.kernels.quiet import alone

# Vectors are stored as they are or cast to 16 bits, which moves them by less than half of a hundredth.
_VECTOR_TOLERANCE = 0.01
# In all layers together: experts that are put together from both sources, others, and other weights that no gauge asks
# for. A tool that moved something moved it in more than a few places.
_MIXED_EXPERTS, _WHOLE_EXPERTS, _OTHERS = 192, 4, 4
_EXPERTS_OF_LAYER = 2  # that stand for a norm or a router that one of two sources lacks
# How weights of two sources compare: by slot and bytes, so that no loader of a process asks what another one has asked.
_known: dict[tuple[Any, ...], Likeness | None] = {}
_MAX_KNOWN = 2**16
_EXPERT = re.compile(r"(layers\.\d+\.mlp)\.experts\.\d+(?=\.)")


def check_agreement(planned: Sequence[PlannedWeight]) -> None:
    """Compare the sources that a plan mixes; reads what `_Pair` chooses and nobody in this process has compared.

    Raises:
        PlanError: a basis differs between two sources, and weights that stand in it come from both.
    """
    sources = {id(weight.source): weight.source for weight in planned}
    if len(sources) < 2:
        return
    origins = _Origins(planned)
    with alone():  # some rows at a time
        for one, other in combinations(sources.values(), 2):
            _Pair(one, other, origins).check()


class _Origins:
    """Which sources the weights of a plan come from, by the gauges that they touch.

    Most weights are experts', and most experts come whole from one source: their inner gauges are left out.
    """

    def __init__(self, planned: Sequence[PlannedWeight]) -> None:
        self.planned = planned
        self.weights: list[PlannedWeight] = []  # all but experts'
        self.experts: dict[str, dict[str, list[PlannedWeight]]] = defaultdict(lambda: defaultdict(list))  # by layer
        self.sources_of_experts: dict[str, dict[str, frozenset[int]]] = {}
        self.equal: dict[str, list[set[int]]] = defaultdict(list)  # sources that have a weight byte by byte
        self.sources: dict[str, set[int]] = defaultdict(set)
        for weight in planned:
            name = weight.slot.name
            if weight.slot.role == "expert" and (found := _EXPERT.match(name)) is not None:
                self.experts[found[1]][found[0]].append(weight)
            else:
                self.weights.append(weight)
                self._add(weight)
        for block, experts in self.experts.items():
            seen: set[int] = set()
            found_sources = self.sources_of_experts[block] = {}
            for name, weights in experts.items():
                own = found_sources[name] = frozenset([id(weight.source) for weight in weights])
                if len(own) > 1 or not own <= seen:
                    for weight in weights:
                        self._add(weight)
                seen |= own

    def note_equal(self, name: str, one: Source, other: Source) -> None:
        """Two sources have a weight byte by byte; so have those that share it with either."""
        groups = self.equal[name]
        joined = {id(one), id(other)}.union(*(group for group in groups if group & {id(one), id(other)}))
        self.equal[name] = [*(group for group in groups if not group & joined), joined]

    def are_equal(self, name: str, one: Source, other: Source) -> bool:
        return any({id(one), id(other)} <= group for group in self.equal[name])

    def _add(self, weight: PlannedWeight) -> None:
        for gauge in axes_of(weight.slot.name).all:
            self.sources[gauge].add(id(weight.source))


@dataclass
class _Gauge:
    """What is known of one gauge between two sources."""

    is_same: bool = False
    is_decided: bool = False  # by the weights that do
    suspects: list[PlannedWeight] = field(default_factory=list)  # that differ, perhaps because of it


class _Pair:
    """Two sources of a plan, and what is known of the gauges between them."""

    def __init__(self, one: Source, other: Source, origins: _Origins) -> None:
        self._sources = one, other
        self._origins = origins
        self._gauges: dict[str, _Gauge] = defaultdict(_Gauge)

    def check(self) -> None:
        """
        Raises:
            PlanError: see `check_agreement`.
        """
        differing: list[tuple[PlannedWeight, frozenset[str], bool]] = []
        for weight, likeness in self._compared():
            axes = axes_of(weight.slot.name)
            for axis, gauges in ((likeness.outputs, axes.outputs), (likeness.inputs, axes.inputs)):
                self._note(weight, axes, gauges, is_same=axis is Axis.SAME)
            if not likeness.is_same:
                moved_outputs = axes.outputs if likeness.outputs is not Axis.SAME else frozenset()
                moved_inputs = axes.inputs if likeness.inputs is not Axis.SAME else frozenset()
                differing.append((weight, moved_outputs | moved_inputs, likeness.is_sure))
        for weight, suspected, is_sure in differing:
            for gauge in self._reasons(weight, suspected, is_sure):
                self._gauges[gauge].suspects.append(weight)
        moved = {name for name, gauge in self._gauges.items() if gauge.suspects}
        broken = [gauge for gauge in moved if self._is_mixed(gauge)]
        if broken:
            raise self._error(broken, moved)

    def _reasons(self, weight: PlannedWeight, suspected: frozenset[str], is_sure: bool) -> list[str]:
        """The gauges that may be why a weight differs."""
        left = [gauge for gauge in suspected if not self._gauges[gauge].is_same]
        # A norm that differs is reason enough for what reads it.
        decides = axes_of(weight.slot.name).decides
        decided_by_others = [gauge for gauge in left if self._gauges[gauge].is_decided and gauge != decides]
        if left:
            return decided_by_others or left
        # Other weights say that all of them are the same: so one of them moved where those do not show it, unless one
        # lies in weights of one source. A doubt is not enough for that.
        if not is_sure or any(not self._is_mixed(gauge) for gauge in suspected):
            return []
        return [gauge for gauge in suspected if not self._gauges[gauge].is_decided] or list(suspected)

    def _note(self, weight: PlannedWeight, axes: Axes, gauges: Iterable[str], *, is_same: bool) -> None:
        """What an axis says of its gauges. A vector says nothing but of the gauge that it decides."""
        for gauge in gauges:
            known = self._gauges[gauge]
            if axes.decides == gauge:
                known.is_same = is_same and (known.is_same or not known.is_decided)
                known.is_decided = True
            elif is_same and not known.is_decided and len(weight.slot.shape) == 2 and gauge not in axes.leaves_open:
                known.is_same = True

    def _is_mixed(self, gauge: str) -> bool:
        return {id(source) for source in self._sources} <= self._origins.sources.get(gauge, set())

    # --- What is compared ---

    def _compared(self) -> Iterator[tuple[PlannedWeight, Likeness]]:
        for weight in self._chosen():
            likeness = self._compare_once(weight) if self._have(weight) else None
            if likeness is not None:
                yield weight, likeness

    def _chosen(self) -> Iterator[PlannedWeight]:
        """What tells of the gauges that the sources share, and some weights more, by a hash of their names."""
        others = []
        lacking: set[str] = set()  # blocks that are told by what stands in them: a source has no norm or no router
        for weight in self._origins.weights:
            name = weight.slot.name
            axes = axes_of(name)
            decides_mixed = axes.decides is not None and self._is_mixed(axes.decides)
            is_asked = any(self._is_mixed(gauge) for gauge in axes.all if not _is_wide(gauge))
            if decides_mixed and not self._have(weight):
                lacking.add(_block_of(name))
            if len(weight.slot.shape) == 1:
                is_asked = any(self._is_mixed(gauge) for gauge in axes.all)
            if decides_mixed or is_asked or weight.slot.role in ("embedding", "head"):
                yield weight
            elif len(weight.slot.shape) == 2:
                others.append(weight)
        yield from _some(others, _OTHERS)
        yield from (weight for weight in others if _block_of(weight.slot.name) in lacking)
        yield from self._chosen_experts(lacking)

    def _chosen_experts(self, lacking: set[str]) -> Iterator[PlannedWeight]:
        pair = {id(source) for source in self._sources}
        mixed: dict[str, list[str]] = {}
        whole: list[tuple[str, str]] = []
        for block, sources in self._origins.sources_of_experts.items():
            found = [name for name, own in sources.items() if pair <= own]
            if found:
                mixed[block] = found
            whole += [(block, name) for name, own in sources.items() if own & pair and not pair <= own]
        share = max(2, _MIXED_EXPERTS // max(1, len(mixed)))
        chosen = [(block, name) for block, names in mixed.items() for name in sorted(names, key=name_hash)[:share]]
        # By a hash, too, so that they are the same ones after a re-map, and known by then.
        whole.sort(key=lambda each: name_hash(each[1]))
        chosen += whole[:_WHOLE_EXPERTS]
        for block in sorted(lacking):
            chosen += [each for each in whole[_WHOLE_EXPERTS:] if each[0] == block][:_EXPERTS_OF_LAYER]
        for block, name in chosen:
            yield from self._origins.experts[block][name]

    def _have(self, weight: PlannedWeight) -> bool:
        return all(weight.choice.name in source.weights for source in self._sources)

    def _compare_once(self, weight: PlannedWeight) -> Likeness | None:
        """`_compare`, unless the same bytes of the same files have been compared before."""
        stored = (source.weights[weight.choice.name] for source in self._sources)
        compared = ((source.identity(s), source.config_digest) for source, s in zip(self._sources, stored, strict=True))
        key = (weight.slot, *compared)
        with suppress(KeyError):  # no question before: plans of other threads are compared at the same time
            return _known[key]
        likeness = self._compare(weight)
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[key] = likeness
        return likeness

    def _compare(self, weight: PlannedWeight) -> Likeness | None:
        """How the sources' versions of a weight, which both have, compare; None if the shapes differ."""
        one, other = (source.weights[weight.choice.name] for source in self._sources)
        slot = weight.slot
        if one.shape != other.shape:
            return None
        if len(slot.shape) == 1:
            values = [source.values(weight.choice.name) for source in self._sources]
            assert values[0] is not None and values[1] is not None
            return SAME if _are_close(values[0], values[1]) else UNTOLD
        if slot.role == "router" and one.is_wide and other.is_wide and one.format is other.format:
            if self._origins.are_equal(weight.choice.name, *self._sources):
                return SAME
            if self._have_same_bytes(one, other):
                self._origins.note_equal(weight.choice.name, *self._sources)
                return SAME
        parts = [sample(source, s, slot) for source, s in zip(self._sources, (one, other), strict=True)]
        rounding = [rounding_of(s, part) for s, part in zip((one, other), parts, strict=True)]
        return compare(*parts, *rounding)

    def _have_same_bytes(self, one: StoredWeight, other: StoredWeight) -> bool:
        """Of two wide weights of one format."""
        parts = [next(iter(version.parts.values())) for version in (one, other)]
        found = [source.read(part) for source, part in zip(self._sources, parts, strict=True)]
        is_same = torch.equal(*(bits.contiguous().view(torch.uint8) for bits in found))
        for source, part in zip(self._sources, parts, strict=True):
            source.release(part)
        return is_same

    # --- What is said ---

    def _error(self, broken: Sequence[str], moved: set[str]) -> PlanError:
        touching: dict[str, list[PlannedWeight]] = defaultdict(list)
        pair = {id(source) for source in self._sources}
        for weight in self._origins.planned:
            if id(weight.source) in pair:
                for name in axes_of(weight.slot.name).all:
                    touching[name].append(weight)
        gauge = max(sorted(broken), key=lambda name: self._weight_of(name, len(touching[name])))
        concerned = touching[gauge]
        fewer = min(pair, key=lambda key: sum(id(weight.source) == key for weight in concerned))
        taken = next(weight for weight in concerned if id(weight.source) == fewer)
        suspect = min(self._gauges[gauge].suspects, key=lambda weight: self._remoteness(weight, gauge))
        standing = next(weight for weight in concerned if weight.source is not taken.source)
        together = {w.slot.name: w for name in broken for w in self._closure(name, moved, touching)}.values()
        if RESIDUAL in {g for weight in together for g in axes_of(weight.slot.name).all & moved}:
            remedy = (
                "The two compute in different bases throughout, as rotations of a whole model leave them (QuaRot, "
                "SpinQuant), or are different models. Take all weights from one of them."
            )
        else:
            lacking = next(
                (w for w in together for source in self._sources if w.choice.name not in source.weights), None
            )
            names = patterns_of({w.choice.name for w in together}, {w.choice.name for w in self._origins.planned})
            remedy = (
                "Tools such as AWQ and SmoothQuant move factors from one weight into the next, others exchange "
                f"channels, heads or experts; or these are different models. Take {names} from one source."
            )
            if lacking is not None:
                source = next(source for source in self._sources if lacking.choice.name not in source.weights)
                remedy += f" It cannot be {source.name!r}, which has no {lacking.choice.name!r}."
        return PlanError(
            f"Weight {taken.choice.name!r} would come from source {taken.source.name!r}, and "
            f"{standing.choice.name!r} from {standing.source.name!r}, but these sources disagree in "
            f"{suspect.choice.name!r} by more than rounding: a basis that these weights share differs.",
            remedy=remedy,
        )

    def _weight_of(self, gauge: str, num_touching: int) -> tuple[bool, bool, int]:
        """Where several gauges are broken, the one that may be the reason for the others comes last."""
        is_norm = gauge.endswith("norm") and self._gauges[gauge].is_decided
        return gauge == RESIDUAL, is_norm, num_touching

    def _remoteness(self, weight: PlannedWeight, gauge: str) -> int:
        """The weight that decides a gauge, or stands in it alone, says most, then one that writes in it."""
        axes = axes_of(weight.slot.name)
        return 0 if axes.decides == gauge or axes.all == {gauge} else 1 if gauge in axes.outputs else 2

    def _closure(self, gauge: str, moved: set[str], touching: Mapping[str, list[PlannedWeight]]) -> list[PlannedWeight]:
        """What has to come from one source together: all that touches the gauge, and moved ones that those touch.

        Of a norm or of the order of experts the whole block: what else moved in it nobody has looked at.
        """
        pending, seen, found = [gauge], {gauge}, {}
        blocks: set[str] = set()
        while pending:
            name = pending.pop()
            for weight in touching[name]:
                found[weight.slot.name] = weight
                if name != RESIDUAL and _is_wide(name):
                    blocks.add(_block_of(weight.slot.name))
                for other in (axes_of(weight.slot.name).all & moved) - seen:
                    seen.add(other)
                    pending.append(other)
        for weights in touching.values():
            found |= {w.slot.name: w for w in weights if _block_of(w.slot.name) in blocks}
        return list(found.values())


def _are_close(one: Tensor, other: Tensor) -> bool:
    difference = (one - other).abs() - _VECTOR_TOLERANCE * torch.maximum(one.abs(), other.abs())
    return not bool((difference > 1e-5 * one.abs().max()).any())


def _is_wide(gauge: str) -> bool:
    """Whether a gauge is shared by more than the weights of one attention, MLP or expert that follow each other."""
    return gauge == RESIDUAL or gauge.endswith(("norm", ".experts"))


def _block_of(slot: str) -> str:
    """`layers.3.attention` for its weights and norms; the rest of the model is one."""
    parts = slot.split(".")
    return ".".join([*parts[:2], parts[2].split("_")[0]]) if parts[0] == "layers" else ""


def _some(weights: Iterable[PlannedWeight], count: int) -> list[PlannedWeight]:
    return sorted(weights, key=lambda weight: name_hash(weight.slot.name))[:count]
