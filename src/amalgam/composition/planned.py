"""A planned weight: a slot with the source that it comes from, found there and checked, ready to be loaded.

In: a slot, a choice and what the source stores. Out: sizes, keys, the provenance, the packed weight. Must never know:
rules, other weights, requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from amalgam.composition.packed_cache import key_of
from amalgam.composition.rules import Choice
from amalgam.composition.source import Source
from amalgam.config.inference import InferenceSettings
from amalgam.errors import CheckpointError, OutOfMemoryError
from amalgam.formats.contract import StoredWeight, WeightFormat, WritableFormat
from amalgam.kernels.backends import ActivationType, Backend
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.models.spec import ModelSpec, Slot
from amalgam.models.weights import Origin, Part
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest

# A dense model with fewer parameters feels it when activations are rounded to int8: docs/performance.md.
NUM_PARAMETERS_FOR_INT8 = 10**9


@dataclass(frozen=True, eq=False)
class PlannedWeight:
    """One slot of a checked plan, ready to be loaded."""

    slot: Slot
    choice: Choice
    source: Source
    stored: StoredWeight
    quantize_to: WritableFormat | None  # quantize while loading
    activation: ActivationType | None  # of bfloat16 activations for integer weights; None: nothing is multiplied
    is_widened: bool  # codes of 2 or 3 bits take the room of 4 in memory
    coded_bytes: int | None  # about what it takes if its bf16 is coded in memory; None: it is not
    device: str | None = None  # where it lies; None: with the rest of the model

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for weights that are packed from the same bytes, which mean the same, in the same way, on one device;
        taken when first asked for. Two folders may hold one file and declare it differently."""
        target = self.quantize_to.name if self.quantize_to else None
        meaning = None if self.stored.is_wide else self.stored.declared
        key = (*self.source.identity(self.stored), meaning, target)
        return key if self.device is None else (*key, self.device)

    @property
    def cache_key(self) -> str:
        """Names its packed bytes for other processes: `key`, and all else that they depend on.

        Panels are the same bytes for every type of activation, so only whether there is one counts.
        """
        stored, slot = self.stored, self.slot
        is_coded = self.coded_bytes is not None
        packing = (slot.shape, slot.is_transposed, self.is_expanded, self.activation is not None, is_coded)
        return key_of(self.key, packing, stored.block, stored.bits, stored.declared, self.source.config_digest)

    @property
    def nbytes(self) -> int:
        """Its size by its format: as stored, or as it is quantized or expanded while loading."""
        if self.is_expanded:
            return math.prod(self.slot.shape) * torch.float32.itemsize
        return self.stored.nbytes if self.quantize_to is None else self.quantize_to.nbytes(self.slot.shape)

    @property
    def memory_bytes(self) -> int:
        """What it is expected to take in memory: `nbytes`, less where bf16 is coded, more where codes are widened.

        Whether bf16 can be coded is known when it is read: trained weights can, one whose exponents are spread takes
        `nbytes`.
        """
        if self.coded_bytes is not None:
            return self.coded_bytes
        stored = self.stored
        if not self.is_widened or stored.bits is None:
            return self.nbytes
        return self.nbytes + math.prod(self.slot.shape) * (4 - stored.bits) // 8

    @property
    def format(self) -> WeightFormat:
        """As it is packed: as stored, or as it is quantized while loading."""
        return self.quantize_to or self.stored.format

    @property
    def is_expanded(self) -> bool:
        """Whether it is dequantized while loading.

        Some tools quantize routers, and ours work in float32. Of an embedding a step needs single rows, which not every
        layout has.
        """
        has_rows = all(layout.has_rows for layout in self.stored.format.layouts)
        is_wanted = self.slot.role == "router" or (self.slot.role == "embedding" and not has_rows)
        return is_wanted and not self.stored.is_wide

    def load(self, backend: Backend) -> PackedWeight:
        """Read, arrange and pack it for a backend.

        Raises:
            CheckpointError: its file has changed since it was opened, or its data contradict its header.
            OutOfMemoryError: there is no memory for it.
        """
        try:
            return self.source.load(self.stored, lambda packed: self._finish(packed, backend))
        except (MemoryError, RuntimeError) as error:
            if not _is_lack_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"There is no memory for weight {self.choice.name!r} of {self.nbytes} bytes.",
                remedy="Change fewer weights at a time, choose a lower precision, or set inference.packed_cache.",
            ) from error

    def unprepared(self) -> PackedWeight:
        """It for no backend, in a runtime layout on the CPU: what is to be written instead of computed with.

        Raises:
            CheckpointError: see `load`.
        """
        return self.source.load(self.stored, self._arranged)

    def _finish(self, packed: PackedWeight, backend: Backend) -> PackedWeight:
        packed = self._arranged(packed)
        if self.activation is None:
            return packed.to(backend.device)
        return backend.prepare(packed, self.activation, codes=self.coded_bytes is not None)

    def _arranged(self, packed: PackedWeight) -> PackedWeight:
        packed = oriented(packed, self.stored, self.slot)
        if len(self.slot.shape) == 1 and not bool(packed.dense.isfinite().all()):
            raise CheckpointError(
                f"Weight {self.choice.name!r} in source {self.source.name!r} ({self.source.folder}) holds NaN or "
                "infinity.",
                remedy="Every token would be computed as NaN. Download the checkpoint again.",
            )
        if self.quantize_to is not None:
            packed = self.quantize_to.pack(quantize(packed.dequantize(), self.quantize_to, round_to_nearest))
        if self.is_expanded:
            packed = dense(packed.dequantize())
        return packed

    @property
    def origin(self) -> Origin:
        """Where it comes from, one line of the manifest."""
        stored = self.stored
        return Origin(
            name=self.choice.name,
            slot=self.slot.name,
            source=self.source.name,
            format="fp32" if self.is_expanded else self.format.name,
            stored_format=stored.format.name,
            shape=self.slot.shape,
            rule=self.choice.reason,
            device=self.device,
            parts=tuple(Part(e.name, str(e.file), e.offset, e.nbytes) for e in stored.parts.values()),
        )


def _is_lack_of_memory(error: Exception) -> bool:
    """PyTorch raises a plain RuntimeError for it on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def activation_for(spec: ModelSpec, inference: InferenceSettings) -> ActivationType:
    """What bfloat16 activations become for integer weights, chosen by the model where nobody says.

    int8 is fastest. A small dense model feels the rounding; in one with experts, or with many parameters, it makes
    little difference beside that of the weights.
    """
    if inference.activation != "auto":
        return inference.activation
    return "bf16" if spec.num_experts == 0 and spec.num_parameters < NUM_PARAMETERS_FOR_INT8 else "int8"


def codes_bf16(slot: Slot, inference: InferenceSettings, backend: Backend) -> bool:
    """Whether the bf16 weight of a slot is coded; what is multiplied in float32 gains nothing from it."""
    is_wanted = inference.bf16_coding and inference.dtype == "bfloat16" and slot.role != "router"
    return is_wanted and backend.coded_bytes(slot.shape) is not None


def oriented(packed: PackedWeight, stored: StoredWeight, slot: Slot) -> PackedWeight:
    """A weight in the slot's orientation, whichever the source stores it in."""
    return dense(packed.dense.t().contiguous()) if slot.is_transposed and stored.is_wide else packed
