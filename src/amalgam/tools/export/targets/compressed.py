"""compressed-tensors' folders: what `hf` and `vllm` have in common."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from amalgam.models.spec import Slot
from amalgam.tools.export.checkpoint import Dialect
from amalgam.tools.export.choosing import Decision
from amalgam.tools.export.encoding import compressed_tensors
from amalgam.tools.export.forms import Form, is_published, scheme_of

# The `QuantizationArgs` of the activations beside a weight; None: they stay as they are.
Activations = Callable[[Slot, Form], dict[str, Any] | None]
# Further names under which an engine looks for a module.
Aliases = Callable[[str], Sequence[str]]
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def dialect(
    name: str,
    activations: Activations,
    aliases: Aliases = lambda module: (),
    first: Mapping[str, Any] | None = None,
    *,
    keeps_stacked: bool = False,
) -> Dialect:
    """
    Args:
        first: a group to declare before the others, if there are any.
    """

    def declare(
        decisions: Sequence[Decision], modules: Mapping[str, str], others: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        groups, left = _grouped(decisions, modules, activations, aliases)
        return quantization_config(groups, [*left, *others], first), {}

    return Dialect(name, compressed_tensors, is_published, declare, keeps_stacked)


def _grouped(
    decisions: Sequence[Decision], modules: Mapping[str, str], activations: Activations, aliases: Aliases
) -> tuple[dict[str, list[str]], list[str]]:
    """Modules by the group that declares them, as JSON, and those that are not quantized.

    Groups with experts come first: transformers takes the first whose targets name experts for the experts'.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    with_experts: set[str] = set()
    left = ["lm_head"]
    for decision in decisions:
        slot, module = decision.weight.slot, modules[decision.name]
        if decision.form.is_float:
            if slot.is_linear or slot.decides:
                left += [module, *aliases(module)]
            continue
        scheme = scheme_of(decision.form)
        group = {
            "weights": dict(scheme.arguments),
            "input_activations": activations(slot, decision.form),
            "output_activations": None,
            "format": scheme.layout,
        }
        key = json.dumps(group)
        groups[key] += [module, *aliases(module)]
        if slot.role == "expert":
            with_experts.add(key)
    return {key: groups[key] for key in sorted(groups, key=lambda key: key not in with_experts)}, left


def quantization_config(
    groups: Mapping[str, Sequence[str]], left: Sequence[str], first: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The key of config.json; nothing if no weight is quantized.

    Args:
        groups: a config group as JSON → its modules.
        left: modules that are not quantized.
    """
    if not groups:
        return {}
    known = {*left, *(module for modules in groups.values() for module in modules)}
    described = [] if first is None else [first]
    described += [{"targets": targets_of(modules, known), **json.loads(group)} for group, modules in groups.items()]
    layouts = {group["format"] for group in described}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{index}": group for index, group in enumerate(described)},
            "ignore": targets_of(dict.fromkeys(left), known),
            "kv_cache_scheme": None,
        }
    }


def targets_of(modules: Iterable[str], known: Collection[str]) -> list[str]:
    """Names and regular expressions that match these of all known modules, few enough for models with many experts."""
    everywhere = _by_shape(known)
    targets: list[str] = []
    for shape, numbers in sorted(_by_shape(modules).items()):
        if "{}" not in shape:
            targets.append(shape)
        else:
            targets += [f"re:{_regex(shape, columns)}$" for columns in _boxes(numbers, everywhere[shape])]
    return targets


def _by_shape(modules: Iterable[str]) -> dict[str, set[tuple[str, ...]]]:
    """Names with their numbers taken out → the numbers."""
    found: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for module in modules:
        found[_NUMBER.sub("{}", module)].add(tuple(_NUMBER.findall(module)))
    return found


def _boxes(wanted: Collection[tuple[str, ...]], known: Collection[tuple[str, ...]]) -> list[list[str]]:
    """Tuples of numbers as products of alternatives: a regular expression for each place."""
    if set(wanted) == set(known):
        return [[r"\d+"] * len(next(iter(known)))]
    firsts: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    others: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for numbers in wanted:
        firsts[numbers[0]].add(numbers[1:])
    for numbers in known:
        others[numbers[0]].add(numbers[1:])
    alike: dict[tuple[tuple[str, ...], ...], list[str]] = defaultdict(list)
    for first, rests in firsts.items():
        boxes = _boxes(rests, others[first]) if rests != {()} else [[]]
        alike[tuple(tuple(box) for box in boxes)].append(first)
    return [[_any_of(alternatives), *box] for boxes, alternatives in sorted(alike.items()) for box in boxes]


def _any_of(numbers: Sequence[str]) -> str:
    ordered = sorted(numbers, key=int)
    return ordered[0] if len(ordered) == 1 else f"(?:{'|'.join(ordered)})"


def _regex(shape: str, numbers: Sequence[str]) -> str:
    pieces = shape.split("{}")
    return "".join(re.escape(piece) + number for piece, number in zip(pieces, [*numbers, ""], strict=True))
