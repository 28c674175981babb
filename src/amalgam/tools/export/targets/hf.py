"""`--to hf`: compressed-tensors' layouts, as transformers opens them with the compressed-tensors package.

transformers keeps a dense model's projections as modules, each with a layout of its own. A layer's experts are one
tensor there since version 5, and while it fills that it reads one layout for the experts of all layers
(`transformers/integrations/compressed_tensors.py`, 5.23): floating values, symmetric integers in words, or E4M3 with a
scale for a row or a tensor. With `--share none` every expert stays in its own layout: amalgam opens that, and
transformers 4, whose experts are modules.
"""

from __future__ import annotations

from collections.abc import Iterator

from amalgam.models.spec import Slot
from amalgam.tools.export.checkpoint import CheckpointJob
from amalgam.tools.export.choosing import Decision, Engine, Unit, all_experts, choose
from amalgam.tools.export.contract import ExportOptions, Job, PlannedModel, Target
from amalgam.tools.export.forms import Form
from amalgam.tools.export.targets.compressed import dialect

_MIXED = (
    "The experts keep the layouts of the plan. transformers opens such a folder up to version 4.57; from 5 on it reads "
    "one layout for all experts: leave --share none out for those."
)


def prepare(model: PlannedModel, options: ExportOptions) -> Job:
    is_stacked = options.share != "none"
    decisions = choose(model, _engine(is_stacked=is_stacked), options.share)
    notes = [_MIXED] if not is_stacked and _num_forms(decisions) > 1 else []
    return CheckpointJob(model, decisions, dialect("hf", lambda slot, form: None), notes)


def _engine(*, is_stacked: bool) -> Engine:
    def takes(slot: Slot, form: Form) -> bool:
        if slot.is_transposed:  # GPT-2's Conv1D, which is no linear module
            return False
        if slot.role != "expert" or not is_stacked:
            return True
        if form.kind == "int":
            return form.is_packed and not form.has_zero and not form.is_reordered
        return form.kind == "fp8" and form.strategy in ("tensor", "channel")

    def units(model: PlannedModel) -> Iterator[Unit]:
        return all_experts(model)

    return Engine("transformers", takes, units)


def _num_forms(decisions: list[Decision]) -> int:
    return len({decision.form for decision in decisions if decision.weight.slot.role == "expert"})


TARGET = Target(
    "hf",
    "compressed-tensors' layouts, for transformers",
    prepare,
    frozenset({"share"}),
)
