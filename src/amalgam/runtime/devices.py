"""What lies on each device, and what went to and fro.

In: the weights that are served, the engine. Out: figures by device. Must never know: who asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from amalgam.engine.core import Engine
from amalgam.kernels.backends.split.traffic import Traffic
from amalgam.models.weights import is_expert
from amalgam.runtime.served import ServedWeights


@dataclass(frozen=True)
class DeviceFigures:
    """Of one device. Traffic and uploads are those of devices beside the one that the model runs on, since the start.

    Attributes:
        experts: of the version that new requests start on, counted in every layer.
        used_bytes: by weights, of all versions and drafts in memory; pages of the packed cache left out.
        limit_bytes: that weights may take; None: no limit but the device's own.
        uploaded_bytes: of weights.
        sent_bytes: of activations and expert ids, to it.
        returned_bytes: of experts' outputs, from it.
        rows: (token, expert) pairs that it has multiplied.
    """

    experts: int
    used_bytes: int
    limit_bytes: int | None
    available_bytes: int
    uploaded_bytes: int = 0
    sent_bytes: int = 0
    returned_bytes: int = 0
    rows: int = 0


def device_figures(served: ServedWeights, engine: Engine) -> dict[str, DeviceFigures]:
    """By name, the device that the model runs on first; with those that are declared and empty."""
    devices, version = served.loader.devices, served.version
    apart = Counter(device for slot, device in version.devices.items() if is_expert(slot))
    near = sum(served.spec.expert_counts) - apart.total()
    uploaded, traffic = devices.uploaded_bytes, engine.traffic
    found: dict[str, DeviceFigures] = {}
    for name in dict.fromkeys((*devices.names, *apart, *uploaded)):
        other = None if name == devices.primary else name
        room, moved = devices.room(other), traffic.get(name, Traffic())
        found[name] = DeviceFigures(
            experts=near if other is None else apart[name],
            used_bytes=room.used_bytes,
            limit_bytes=room.limit_bytes,
            available_bytes=room.available_bytes,
            uploaded_bytes=uploaded.get(name, 0),
            sent_bytes=moved.sent_bytes,
            returned_bytes=moved.returned_bytes,
            rows=moved.num_rows,
        )
    return found


def together(figures: Iterable[Mapping[str, DeviceFigures]]) -> dict[str, DeviceFigures]:
    """Of several processes, device by device; the experts are those of one."""
    found: dict[str, DeviceFigures] = {}
    for each in figures:
        for name, one in each.items():
            known = found.get(name)
            found[name] = one if known is None else _sum(known, one)
    return found


def _sum(one: DeviceFigures, other: DeviceFigures) -> DeviceFigures:
    limits = [limit for limit in (one.limit_bytes, other.limit_bytes) if limit is not None]
    return DeviceFigures(
        experts=max(one.experts, other.experts),
        used_bytes=one.used_bytes + other.used_bytes,
        limit_bytes=sum(limits) if limits else None,
        available_bytes=min(one.available_bytes, other.available_bytes),
        uploaded_bytes=one.uploaded_bytes + other.uploaded_bytes,
        sent_bytes=one.sent_bytes + other.sent_bytes,
        returned_bytes=one.returned_bytes + other.returned_bytes,
        rows=one.rows + other.rows,
    )
