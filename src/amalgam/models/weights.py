"""A weight version: an immutable map from slots to packed weights, and where each of them came from.

In: packed weights and their origins. Out: `WeightVersion`. Must never know: requests.

Packed weights are shared between versions, so that a re-map costs only what changed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from amalgam.base.mapping import has_lost_at
from amalgam.errors import LostWeightsError
from amalgam.kernels.weights import Expert, ExpertTable, PackedWeight

_EXPERT = re.compile(r"layers\.\d+\.mlp\.experts\.\d+\.down")


@dataclass(frozen=True)
class Origin:
    """Where one weight came from: one line of the manifest."""

    name: str  # logical name
    slot: str
    source: str
    format: str  # as loaded; differs from the stored format when quantized while loading
    stored_format: str
    shape: tuple[int, ...]
    rule: str  # why this source
    parts: tuple[Part, ...]
    device: str | None = None  # where it lies; None: with the rest of the model


@dataclass(frozen=True)
class Part:
    """One tensor of a source that a weight was made from."""

    tensor: str
    file: str
    offset: int | None  # bytes from the file's start; None inside a .bin and for bytes that are not one run
    nbytes: int

    @property
    def key(self) -> str:
        """Names the part among all sources."""
        return f"{self.file}:{self.tensor}"


class BlockWeights(Mapping[str, PackedWeight]):
    """The weights of one block, by their name within it."""

    def __init__(self, weights: Mapping[str, PackedWeight], devices: Mapping[str, str] | None = None) -> None:
        """
        Args:
            devices: of those that do not lie with the rest of the model.
        """
        self._weights = dict(weights)
        self._devices = dict(devices or {})

    def __getitem__(self, name: str) -> PackedWeight:
        return self._weights[name]

    def __iter__(self) -> Any:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def vector(self, name: str) -> Tensor | None:
        """A bias or norm as a tensor, None if the block has none."""
        weight = self._weights.get(name)
        return None if weight is None else weight.dense

    @cached_property
    def experts(self) -> ExpertTable:
        """`experts.<n>.{gate,up,down}[_bias]` as a table, in order of n."""
        ids = {int(name.split(".")[1]) for name in self._weights if name.startswith("experts.")}

        def expert(expert_id: int) -> Expert:
            prefix = f"experts.{expert_id}."
            gate, up, down = (self._weights[prefix + part] for part in ("gate", "up", "down"))
            gate_bias, up_bias, down_bias = (self.vector(f"{prefix}{part}_bias") for part in ("gate", "up", "down"))
            return Expert(gate, up, down, gate_bias, up_bias, down_bias)

        order = sorted(ids)
        devices = tuple(self._devices.get(f"experts.{expert_id}.down") for expert_id in order) if self._devices else ()
        return ExpertTable(tuple(expert(expert_id) for expert_id in order), devices)


class WeightVersion:
    """All weights of one model under one plan. Never changes; a re-map makes a new one.

    Attributes:
        version_id: 1, 2, … in order of creation.
        origins: slot → where it came from; with `fingerprint`, the provenance manifest.
        keys: slot → identity of the bytes and the way they were packed; equal keys share one packed weight.
        devices: slot → device, of those that do not lie with the rest of the model.
    """

    def __init__(
        self,
        version_id: int,
        weights: Mapping[str, PackedWeight],
        origins: Mapping[str, Origin],
        keys: Mapping[str, tuple[Any, ...]],
    ) -> None:
        self.version_id = version_id
        self.origins = dict(origins)
        self.keys = dict(keys)
        self._weights = dict(weights)
        self.devices = {slot: one.device for slot, one in self.origins.items() if one.device is not None}
        blocks: dict[str, dict[str, PackedWeight]] = {}
        devices: dict[str, dict[str, str]] = {}
        for slot, weight in self._weights.items():
            block, local = split_slot(slot)
            blocks.setdefault(block, {})[local] = weight
            if slot in self.devices:
                devices.setdefault(block, {})[local] = self.devices[slot]
        self._blocks = {name: BlockWeights(block, devices.get(name)) for name, block in blocks.items()}

    def __getitem__(self, slot: str) -> PackedWeight:
        return self._weights[slot]

    def get(self, slot: str) -> PackedWeight | None:
        return self._weights.get(slot)

    def block(self, name: str) -> BlockWeights:
        """The weights of `layers.<n>.attention` or `layers.<n>.mlp`; with an empty name those outside the blocks."""
        return self._blocks[name]

    @property
    def weights(self) -> Collection[PackedWeight]:
        """All of them."""
        return self._weights.values()

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights.values())

    @property
    def mapped_bytes(self) -> int:
        """Those of them that are a packed cache's pages and not this process's memory."""
        return sum(weight.nbytes for weight in self._weights.values() if weight.is_mapped)

    def check_mapped(self) -> None:
        """
        Raises:
            LostWeightsError: a file of the packed cache has become shorter since its pages were mapped.
        """
        for slot, weight in self._weights.items():
            if weight.is_mapped and any(has_lost_at(run.data_ptr()) for run in weight.runs):
                raise LostWeightsError(
                    f"Weights of version {self.version_id} are lost, among them {self.origins[slot].name!r}: a file of "
                    "the packed cache has been truncated while it was in use.",
                    remedy="Start again: the cache is written anew. Its files may be removed, but never changed.",
                )

    @cached_property
    def fingerprint(self) -> str:
        """Names the version by what it holds; see `fingerprint`."""
        return fingerprint(self.origins, self.keys)


def fingerprint(origins: Mapping[str, Origin], keys: Mapping[str, tuple[Any, ...]]) -> str:
    """16 hexadecimal digits over every weight's origin and the state of its files, not over rules or version ids.

    Two versions with one fingerprint hold the same bytes. File state is path, modification time, size and inode; only
    the manifest's SHA-256 digests compare files across machines.
    """
    digest = hashlib.sha256()
    for slot in sorted(origins):
        origin = origins[slot]
        record = (slot, origin.name, origin.source, origin.format, origin.shape, keys[slot])
        digest.update(repr(record).encode() + b"\n")
    return digest.hexdigest()[:16]


def manifest(version: str, origins: Mapping[str, Origin], digests: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The provenance of every weight as JSON.

    Args:
        version: the fingerprint.
        digests: SHA-256 of each part, by `Part.key`, where they have been computed.
    """

    def record(part: Part) -> dict[str, Any]:
        return {**vars(part), **({} if digests is None else {"sha256": digests[part.key]})}

    # `vars` and not `asdict`, which copies deeply: there are tens of thousands of them.
    weights = [{**vars(origin), "parts": [record(part) for part in origin.parts]} for origin in origins.values()]
    return {"fingerprint": version, "weights": weights}


def is_expert(slot: str) -> bool:
    """Whether a slot is the one that stands for an expert of a layer: its last projection's weight."""
    return _EXPERT.fullmatch(slot) is not None


def split_slot(slot: str) -> tuple[str, str]:
    """`layers.3.mlp.experts.7.gate` → (`layers.3.mlp`, `experts.7.gate`); outside the layers the block is empty."""
    parts = slot.split(".", 3)
    return (".".join(parts[:3]), parts[3]) if len(parts) == 4 else ("", slot)
