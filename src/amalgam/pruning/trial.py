"""A smaller model in memory, at work beside the whole one, without files of its own.

In: a loaded plan of the whole model, what remains of it. Out: a `Contestant`, to be measured like any other. Must never
know: what is measured.

Weights that remain as they are stay where they are; those that change are made from wide ones, and rounded to what the
plan stores their origin in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from amalgam.composition.planned import PlannedWeight
from amalgam.evaluation.running import Contestant
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.models.decoder import Decoder
from amalgam.models.weights import WeightVersion
from amalgam.pruning.cut import Load
from amalgam.pruning.pruned import Pruned

# The values of a weight, and the source whose precision it is to have → it, as that source would hold it.
RoundTo = Callable[[Tensor, str], PackedWeight]

_version_ids = itertools.count(1)


def on_trial(
    name: str,
    base: Contestant,
    planned: Sequence[PlannedWeight],
    pruned: Pruned,
    load: Load,
    round_to: RoundTo,
    zeros: Mapping[str, Tensor] | None = None,
) -> Contestant:
    """
    Args:
        base: the whole model, wide; weights that the plan has in common with it are in memory once.
        planned: a plan of the whole model.
        load: the whole model's wide weights.
        zeros: weights that have other values than a cut leaves them, by slot.
    """
    whole = base.with_plan(name, planned)
    sources = {weight.slot.name: weight.choice.source for weight in planned}
    wide = {weight.slot.name: weight.stored.is_wide for weight in planned}
    weights: dict[str, PackedWeight] = {}
    for slot in pruned.spec.slots:
        origin = pruned.origins[slot.name]
        values = None if zeros is None else zeros.get(slot.name)
        if values is None and pruned.is_same(slot):
            weights[slot.name] = whole.version[origin.name]
            continue
        values = pruned.values(slot, load) if values is None else values
        packed = dense(values) if wide[origin.name] else round_to(values, sources[origin.name])
        weights[slot.name] = base.loader.prepare(slot, packed)
    decoder = Decoder(pruned.spec, base.decoder.max_positions, base.decoder.dtype, base.decoder.device)
    return Contestant(name, base.loader, decoder, WeightVersion(next(_version_ids), weights, {}, {}))
