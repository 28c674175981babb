"""`--to vllm`: compressed-tensors' layouts, one for what vLLM computes at once.

vLLM holds a layer's experts in one tensor with one scheme, and fuses query, key and value, gate and up; it refuses a
folder in which these differ ("All MoE projections need to have same quantization scheme"). What it takes
(`layers/quantization/compressed_tensors`, 0.32): integers of 4 and 8 bits in words, symmetric among experts; E4M3 with
a scale for a tensor, a row or a block of 128×128; NVFP4, MXFP4, MXFP8. E4M3 among experts, and in blocks anywhere,
needs 8-bit activations, which vLLM rounds as it runs. Its build for CPUs takes 8 bits with such activations only
(`--activations dynamic`), and quantized experts on some processors only.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from amalgam.composition.quantizing.recipe import input_arguments
from amalgam.errors import ConfigError
from amalgam.models.spec import Slot
from amalgam.tools.export.checkpoint import CheckpointJob
from amalgam.tools.export.choosing import Engine, Unit, choose, experts_by_layer, fused_projections
from amalgam.tools.export.contract import ExportOptions, Job, PlannedModel, Target
from amalgam.tools.export.forms import Form, scheme_of
from amalgam.tools.export.targets.compressed import dialect

_BLOCK = (128, 128)
_GROUPS = (32, 64, 128)
# vLLM asks for the experts of families that number their projections by these names.
_NUMBERED = {".w1": ".gate_proj", ".w3": ".up_proj", ".w2": ".down_proj"}
_ROUNDED = "vLLM rounds the activations of {count} weights to 8 bits as it runs, which no figure of amalgam shows."


def prepare(model: PlannedModel, options: ExportOptions) -> Job:
    if options.share == "none":
        raise ConfigError("--share is 'none', and vLLM opens nothing of that kind.", remedy="Leave it out.")
    is_dynamic = options.activations == "dynamic"

    def activations(slot: Slot, form: Form) -> dict[str, Any] | None:
        is_needed = form.kind == "fp8" and (slot.role == "expert" or form.strategy == "block")
        is_wanted = is_dynamic and form.kind in ("fp8", "int") and form.bits == 8 and not form.is_packed
        return input_arguments("dynamic", scheme_of(form).arguments) if is_needed or is_wanted else None

    decisions = choose(model, _engine(is_dynamic=is_dynamic), options.share)
    found = (decision for decision in decisions if not decision.form.is_float)
    count = sum(activations(decision.weight.slot, decision.form) is not None for decision in found)
    notes = [_ROUNDED.format(count=count)] if count else []
    return CheckpointJob(model, decisions, dialect("vllm", activations, _aliases), notes)


def _engine(*, is_dynamic: bool) -> Engine:
    def takes(slot: Slot, form: Form) -> bool:
        if slot.is_transposed or slot.role == "head":
            return False
        if form.kind == "int":
            return _takes_words(slot, form) if form.is_packed else is_dynamic and _takes_bytes(form)
        if form.kind == "fp8":
            return form.strategy in ("tensor", "channel") or form.block == _BLOCK
        return True

    def units(model: PlannedModel) -> Iterator[Unit]:
        return chain(experts_by_layer(model), fused_projections(model))

    return Engine("vLLM", takes, units)


def _takes_words(slot: Slot, form: Form) -> bool:
    if form.bits not in (4, 8) or form.strategy == "tensor":
        return False
    if form.block is not None and form.block[1] not in _GROUPS and form.block[1] != slot.shape[1]:
        return False
    return slot.role != "expert" or not (form.has_zero or form.is_reordered)


def _takes_bytes(form: Form) -> bool:
    return form.strategy in ("tensor", "channel") and not form.has_zero


def _aliases(module: str) -> list[str]:
    ending = f".{module.rpartition('.')[2]}"
    if ".experts." not in module or ending not in _NUMBERED:
        return []
    return [module.removesuffix(ending) + _NUMBERED[ending]]


TARGET = Target(
    "vllm",
    "one compressed-tensors layout for what vLLM computes at once, for vLLM and SGLang",
    prepare,
    frozenset({"share", "activations"}),
)
