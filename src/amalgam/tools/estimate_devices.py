"""What of a model lies on which device, before it is loaded.

In: planned weights, settings, perhaps a card that is not here. Out: `DeviceEstimate`s. Must never know: terminals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.config.devices import device_name, size_in_bytes
from amalgam.config.settings import Settings
from amalgam.engine.memory import available_bytes
from amalgam.models.spec import ModelSpec
from amalgam.planning.cards import Card, card_named


@dataclass(frozen=True)
class DeviceEstimate:
    """What lies on one device.

    Attributes:
        num_experts: whole ones or parts of them, of all layers.
        other_bytes: KV cache, recurrent states, draft and workspace.
        available_bytes: of a card that is asked about, all of it. None: not known, since the device is not here.
        limit_bytes: what the settings allow weights; None: they do not say.
        read_bytes: what a step of one sequence reads of the weights, where all experts are used alike.
        seconds: that takes at the published bandwidth of a card; None: not known. Not measured.
    """

    name: str
    dense_bytes: int
    expert_bytes: int
    num_experts: int
    other_bytes: int
    available_bytes: int | None
    limit_bytes: int | None
    read_bytes: int
    seconds: float | None

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.expert_bytes + self.other_bytes

    @property
    def fits(self) -> bool:
        return self.lacking_bytes <= 0

    @property
    def lacking_bytes(self) -> int:
        """Below zero: what is spare."""
        lacks = [self.total_bytes - self.available_bytes] if self.available_bytes is not None else []
        weights = self.dense_bytes + self.expert_bytes
        return max(lacks + ([weights - self.limit_bytes] if self.limit_bytes is not None else []), default=0)


def devices_of(
    loader: ModelLoader, settings: Settings, planned: Sequence[PlannedWeight], card: Card | None, other_bytes: int
) -> tuple[DeviceEstimate, ...]:
    """The device that computes all but the experts that rules place elsewhere, then those of the experts.

    Args:
        other_bytes: KV cache and all else beside the weights, on the first.
    """
    own = settings.inference.device_map if settings.inference.device_map.startswith("cpu:") else str(loader.device)
    primary = device_name(own)
    by_device: dict[str, list[PlannedWeight]] = {primary: []}
    where = _placed(loader)
    for weight in planned:
        device = where.get(weight.choice.name, primary) if weight.slot.role == "expert" else primary
        by_device.setdefault(device, []).append(weight)
    return tuple(
        _estimate(
            name, weights, loader.spec, settings, card if name == primary else None, other_bytes * (name == primary)
        )
        for name, weights in by_device.items()
    )


def _placed(loader: ModelLoader) -> dict[str, str]:
    """Name → device, of the weights that some rule places."""
    return {name: choice.device for name, choice in loader.choose().items() if choice.device is not None}


def _estimate(
    name: str,
    weights: Sequence[PlannedWeight],
    spec: ModelSpec,
    settings: Settings,
    card: Card | None,
    other_bytes: int,
) -> DeviceEstimate:
    experts = [weight for weight in weights if weight.slot.role == "expert"]
    expert_bytes = sum(weight.memory_bytes for weight in experts)
    active = spec.num_active_experts * len(spec.expert_counts) / max(1, sum(spec.expert_counts))
    looked_up = sum(w.memory_bytes for w in weights if w.slot.role == "embedding" and not spec.has_tied_head)
    dense = sum(weight.memory_bytes for weight in weights) - expert_bytes
    read = dense - looked_up + round(active * expert_bytes)
    rate = card.bandwidth if card is not None else _bandwidth(name)
    return DeviceEstimate(
        name,
        dense,
        expert_bytes,
        len({weight.slot.name.rpartition(".")[0] for weight in experts}),
        other_bytes,
        card.memory_bytes if card is not None else _available(name),
        size_in_bytes(limit) if (limit := settings.inference.devices.get(name)) else None,
        read,
        None if rate is None else read / rate,
    )


def _is_here(name: str) -> bool:
    kind, _, number = name.partition(":")
    return kind == "cpu" or (torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count())


def _available(name: str) -> int | None:
    """What is free; None: the device is not here."""
    if not _is_here(name):
        return None
    kind, _, number = name.partition(":")
    return available_bytes(torch.device("cpu") if kind == "cpu" else torch.device(kind, int(number or 0)))


def _bandwidth(name: str) -> float | None:
    """As published for the card that is here; None: it is none, or not a known one."""
    if not name.startswith("cuda") or not _is_here(name):
        return None
    found = card_named(torch.cuda.get_device_name(int(name.partition(":")[2] or 0)))
    return None if found is None else found.bandwidth
