"""`--to hf`: compressed-tensors' layouts, as transformers opens them with the compressed-tensors package.

transformers keeps a dense model's projections as modules, each with a layout of its own. A layer's experts are one
tensor there since version 5 (`transformers/integrations/compressed_tensors.py`, 5.23), and while it fills those of all
layers it follows one config group, the first whose targets name experts: it reads symmetric integers in words, or else
E4M3 with a scale for a row or a tensor, and layers without scales only beside E4M3. With `--share none` every expert
stays in its own layout: amalgam opens that, and transformers 4, whose experts are modules.
"""

from __future__ import annotations

from collections.abc import Iterable

from amalgam.models.spec import Slot
from amalgam.tools.export.checkpoint import CheckpointJob
from amalgam.tools.export.choosing import Decision, Engine, all_experts, choose, experts_by_layer, no_units
from amalgam.tools.export.contract import ExportOptions, Job, PlannedModel, Target
from amalgam.tools.export.forms import Form
from amalgam.tools.export.targets.compressed import dialect

_MIXED = (
    "The experts keep the layouts of the plan. transformers opens such a folder up to version 4.57; from 5 on it reads "
    "one layout for all experts: leave --share none out for those."
)


# Experts that are not quantized would be left out beside a group that is not E4M3: this one matches no module.
_NO_EXPERTS = {
    "targets": [r"re:.*\.no_experts$"],
    "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": None,
    "output_activations": None,
    "format": "float-quantized",
}


def prepare(model: PlannedModel, options: ExportOptions) -> Job:
    if options.share == "none":
        decisions = choose(model, Engine("transformers", _takes_modules, no_units), "none")
        notes = [_MIXED] if len(_expert_forms(decisions)) > 1 else []
        return CheckpointJob(model, decisions, dialect("hf", _no_activations, keeps_stacked=True), notes)
    alone = choose(model, Engine("transformers", _takes, no_units), "none")
    is_e4m3 = all(form.kind in ("float", "fp8") for form in _expert_forms(alone))
    units = experts_by_layer if is_e4m3 else all_experts
    decisions = choose(model, Engine("transformers", _takes, units), options.share)
    has_plain_experts = any(form.is_float for form in _expert_forms(decisions))
    first = _NO_EXPERTS if has_plain_experts and not is_e4m3 else None
    return CheckpointJob(model, decisions, dialect("hf", _no_activations, first=first, keeps_stacked=True))


def _takes_modules(slot: Slot, form: Form) -> bool:
    return not slot.is_transposed  # GPT-2's Conv1D, which is no linear module


def _takes(slot: Slot, form: Form) -> bool:
    if slot.role != "expert":
        return _takes_modules(slot, form)
    if form.kind == "int":
        return form.is_packed and not form.has_zero and not form.is_reordered
    return form.kind == "fp8" and form.strategy in ("tensor", "channel")


def _expert_forms(decisions: Iterable[Decision]) -> set[Form]:
    return {decision.form for decision in decisions if decision.weight.slot.role == "expert"}


def _no_activations(slot: Slot, form: Form) -> None:
    return None


TARGET = Target(
    "hf",
    "compressed-tensors' layouts, for transformers",
    prepare,
    frozenset({"share"}),
)
