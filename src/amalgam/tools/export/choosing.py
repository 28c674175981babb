"""In which form each weight is stored, so that an engine takes it: what `contract.Job`s of checkpoint folders decide.

In: a plan, what an engine takes and computes together. Out: a `Decision` for each weight. Reads headers only.

A weight keeps its form where the engine takes it, or gets the first that holds the same values, or becomes floating.
Where several weights need one form and have different ones, it is the widest or the narrowest of theirs. A weight that
gets another form is taken from a source that has it so, which costs nothing of what that source knows, or else rounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from amalgam.composition.planned import PlannedWeight
from amalgam.config.placement import BASE_SOURCE
from amalgam.errors import ConfigError, PlanError
from amalgam.models.spec import Slot
from amalgam.tools.export.contract import Change, PlannedModel, Share
from amalgam.tools.export.forms import Form, exact_forms, floating, form_of, is_published, writable

_SAMPLE = (4096, 4096)  # forms are compared by the size of a matrix like this
_EXPERTS = re.compile(r"(layers\.\d+\.mlp)\.experts\.\d+\.\w+")
_FUSED = (
    re.compile(r"(.*\.attention)\.[qkv]"),
    re.compile(r"(.*\.attention)\.(?:q_a|kv_a)"),
    re.compile(r"(.*\.mlp(?:\.shared)?)\.(?:gate|up)"),
)


@dataclass(frozen=True)
class Unit:
    """Weights that an engine computes as one, or keeps in one tensor.

    Attributes:
        what: for people: `the experts of a layer`.
        names: logical names.
    """

    what: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """What a folder has to be like for those who open it.

    Attributes:
        name: for people.
        takes: whether the weight of a slot may have a form.
        units: which weights have to have the same one.
    """

    name: str
    takes: Callable[[Slot, Form], bool]
    units: Callable[[PlannedModel], Iterable[Unit]]


@dataclass(frozen=True)
class Decision:
    """How one weight is stored.

    Attributes:
        weight: where its values come from; mostly as planned.
        is_same: whether the form holds just these values.
        reason: why it is not stored as it was; empty if it is.
    """

    name: str
    weight: PlannedWeight
    form: Form
    is_same: bool
    reason: str = ""

    @property
    def nbytes(self) -> int:
        return self.form.nbytes(self.weight.slot.shape)


def choose(model: PlannedModel, engine: Engine, share: Share) -> list[Decision]:
    """A decision for every weight, in the order of the plan.

    Raises:
        ConfigError: a form that is to be shared cannot be made of a weight.
    """
    wide = floating(wide_dtype(model))
    sources = tuple(dict.fromkeys((BASE_SOURCE, *(weight.choice.source for weight in model.planned))))
    found: dict[str, Decision] = {}
    for weight in model.planned:
        name = weight.choice.name
        found[name] = _kept(weight, engine) or _moved(name, weight, wide, sources, model, _refusal(weight, engine))
    if share != "none":
        for unit in engine.units(model):
            _unite(unit, found, model, engine, share)
    return list(found.values())


def changes_of(model: PlannedModel, decisions: Iterable[Decision]) -> list[Change]:
    """What decisions make of a plan."""
    changes = []
    for decision in decisions:
        planned = model.by_name[decision.name]
        before = form_of(planned)
        is_moved = decision.weight is not planned
        is_kept = before == decision.form and not is_moved
        if is_kept and (decision.form.is_float or planned.quantize_to or is_published(decision.form, planned.stored)):
            continue
        stored = planned.format.name
        changes.append(
            Change(
                decision.name,
                stored if is_kept or before is None else str(before),
                str(decision.form),
                planned.nbytes,
                decision.nbytes,
                decision.is_same and not is_moved,
                decision.reason or "the same values in the target's layout",
            )
        )
    return changes


def wide_dtype(model: PlannedModel) -> torch.dtype:
    """Of floating values that are made: the base checkpoint's type, or the one that the plan computes in."""
    config = model.base.config
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            dtype = getattr(torch, str(part.get(key)), None)
            if dtype in (torch.bfloat16, torch.float16, torch.float32):
                return dtype  # type: ignore[no-any-return]
    return getattr(torch, model.settings.inference.dtype)  # type: ignore[no-any-return]


def no_units(model: PlannedModel) -> Iterator[Unit]:
    """Of an engine that keeps every weight apart."""
    return iter(())


def experts_by_layer(model: PlannedModel) -> Iterator[Unit]:
    """All routed experts of a layer."""
    groups: dict[str, list[str]] = {}
    for weight in model.planned:
        if weight.slot.role == "expert" and (layer := _EXPERTS.fullmatch(weight.slot.name)):
            groups.setdefault(layer[1], []).append(weight.choice.name)
    yield from (Unit("a layer's experts", tuple(names)) for names in groups.values())


def all_experts(model: PlannedModel) -> Iterator[Unit]:
    """All routed experts of the model."""
    names = [weight.choice.name for weight in model.planned if weight.slot.role == "expert"]
    if names:
        yield Unit("all experts", tuple(names))


def fused_projections(model: PlannedModel) -> Iterator[Unit]:
    """Query, key and value; gate and up; what makes latent attention's inputs; a recurrence's inputs."""
    groups: dict[tuple[str, int], list[str]] = {}
    for weight in model.planned:
        slot = weight.slot
        if not slot.is_linear or slot.role == "expert":
            continue
        for index, pattern in enumerate(_FUSED):
            if found := pattern.fullmatch(slot.name):
                groups.setdefault((found[1], index), []).append(weight.choice.name)
        if slot.role == "linear_attention" and not slot.name.endswith(".out"):
            groups.setdefault((slot.name.rpartition(".")[0], -1), []).append(weight.choice.name)
    yield from (Unit("fused projections", tuple(names)) for names in groups.values() if len(names) > 1)


def _kept(weight: PlannedWeight, engine: Engine) -> Decision | None:
    """A weight in the first form with its values that the engine takes."""
    name, slot, form = weight.choice.name, weight.slot, form_of(weight)
    if form is None:
        return None
    if form.is_float:
        return Decision(name, weight, form, True)
    for same in exact_forms(form, slot.shape) if slot.is_linear else ():
        if engine.takes(slot, same):
            reason = "" if same == form else f"{engine.name} takes no {form} there, and this has the same values"
            return Decision(name, weight, same, True, reason)
    return None


def _refusal(weight: PlannedWeight, engine: Engine) -> str:
    what = form_of(weight) or weight.format.name
    return f"{engine.name} takes no {what} {'there' if weight.slot.is_linear else f'for a {weight.slot.role}'}"


def _unite(unit: Unit, found: dict[str, Decision], model: PlannedModel, engine: Engine, share: Share) -> None:
    forms = {_key(found[name].form): found[name].form for name in unit.names}
    if len(forms) < 2:
        return
    sizes: dict[Form, int] = {}
    for name in unit.names:  # of forms of one width, the one that most bytes have
        form = forms[_key(found[name].form)]
        sizes[form] = sizes.get(form, 0) + found[name].nbytes
    extreme = max if share == "widest" else min
    width = extreme(form.bits for form in sizes)
    target = max((form for form in sizes if form.bits == width), key=lambda form: sizes[form])
    sources = dict.fromkeys(found[name].weight.choice.source for name in unit.names if found[name].form == target)
    reason = f"{engine.name} computes {unit.what} in one form"
    for name in unit.names:
        if _key(found[name].form) != _key(target):
            found[name] = _moved(name, found[name].weight, target, sources, model, reason)


def _moved(
    name: str, planned: PlannedWeight, target: Form, sources: Iterable[str], model: PlannedModel, reason: str
) -> Decision:
    """A weight in a form that others have: from a source of theirs, or as it is if the form holds the same values, or
    rounded to it."""
    others = []
    for source in sources:
        try:
            others.append(model.loader.candidate(name, source))
        except PlanError:  # in another shape
            continue
    for other in others:
        if other is not None and _has(other, target):
            form = form_of(other) if target.is_float else target
            assert form is not None
            return Decision(name, other, form, True, f"{reason}: taken from source {other.choice.source}")
    if _has(planned, target):
        return Decision(name, planned, target, True, reason)
    if not target.is_float and writable(target) is None:
        raise ConfigError(
            f"{reason}, which would be {target}, and weight {name!r} cannot be rounded to it.",
            remedy="Choose sources that agree, or --share widest.",
        )
    return Decision(name, planned, target, False, reason)


def _has(weight: PlannedWeight, target: Form) -> bool:
    form = form_of(weight)
    if form is None:
        return False
    return form.is_float if target.is_float else target in exact_forms(form, weight.slot.shape)


def _key(form: Form) -> object:
    """Equal for forms that an engine does not tell apart: it has floating values in one type anyway."""
    return "float" if form.is_float else form
