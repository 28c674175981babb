"""An analyzed checkpoint and a precision per role → a configuration file that `amalgam plan` and `serve` take.

In: an `Analysis`, role → precision. Out: YAML whose rules match every weight of their role and no other role's. A rule
that would match nothing, or say what the default says, is left out with a note.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from amalgam.base.files import replace_file, writing
from amalgam.composition.patterns import compile_pattern
from amalgam.config.model import DerivedSource
from amalgam.config.placement import BASE_SOURCE, SourceName
from amalgam.config.settings import build_settings
from amalgam.errors import CheckpointError, ConfigError, describe
from amalgam.formats.registry import all_formats
from amalgam.tools.analyze import UNQUANTIZED, Analysis
from amalgam.tools.roles import template

# Roles that may have a precision, and what is said where a model has no such weights. Head last, as in the model.
_ABSENT = {
    "embedding": "the model has no embedding",
    "attention": "the model has no attention weights",
    "linear_attention": "the model has no linear attention",
    "mlp": "the model has no dense MLP layers",
    "expert": "the model has no experts",
    "shared_expert": "the model has no shared experts",
    "head": "the model has no head of its own (it is tied to the embedding)",
}
# `amalgam quantize` leaves them as they are.
_LEFT_WIDE = {"embedding", "head"}
# Small and kept floating in every format: a rule for the module around them may take them along.
_COMPANIONS = {"norm", "bias"}
_MAX_TEMPLATES = 2000
_SPELLABLE = re.compile(r"(?:[\w*-]+\.){0,31}[\w*-]+")
_DERIVABLE = get_args(DerivedSource.model_fields["format"].annotation)


@dataclass(frozen=True)
class RoleRule:
    """One rule of the new mapping.

    Attributes:
        nbytes: bytes of its weights in the base checkpoint; None without headers.
        new_nbytes: about how many they are in the new precision; None where that or a shape is not known.
    """

    role: str
    pattern: str
    source: str
    num_weights: int
    nbytes: int | None
    new_nbytes: int | None


@dataclass(frozen=True)
class Export:
    """What `export_config` wrote."""

    file: Path
    rules: tuple[RoleRule, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _NewSource:
    """A source that the rules need; `path` as it stands in the file."""

    name: str
    path: str
    exists: bool
    is_derived: bool  # made from the base checkpoint at first use


def export_config(analysis: Analysis, out: Path, precisions: Mapping[str, str], force: bool = False) -> Export:
    """Write a configuration that gives roles a precision each; the others stay with the base checkpoint.

    Args:
        precisions: role → a format's name, or any other name for a source. `base` is the analyzed checkpoint.
        force: replace `out` if it exists.

    Raises:
        ConfigError: an impossible name, or `out` exists, or its folder does not.
        CheckpointError: the weights' names follow no pattern; `out` cannot be written.
    """
    for role, precision in precisions.items():
        _check_name(role, precision)
    out = out.expanduser().absolute()
    roles = _roles_of_templates(analysis)
    rules: list[RoleRule] = []
    sources: dict[str, _NewSource] = {}
    notes: list[str] = []
    for role in (role for role in _ABSENT if role in precisions):
        precision, held = precisions[role], set(analysis.formats_of(role))
        if role not in roles.values():
            notes.append(f"{role}: {_ABSENT[role]}, so {precision} gets no rule.")
            continue
        if precision == BASE_SOURCE or held == {precision}:
            notes.append(f"{role}: {precision} is what the base checkpoint holds, so it needs no rule.")
            continue
        source = sources[precision] = _new_source(analysis, out, precision)
        rules += _rules(analysis, roles, role, source)
        if source.is_derived and role in _LEFT_WIDE:
            notes.append(f"{role}: stays as it is in the {precision} checkpoint that is made from base_path.")
        if not source.exists and {precision, *held} <= _wide_names():
            notes.append(
                f"{role}: the base checkpoint holds {', '.join(sorted(held))}; name that to need no {precision} one."
            )
    text = _render(analysis, out, rules, list(sources.values()), notes)
    build_settings(yaml.safe_load(text))
    if os.path.lexists(out) and not force:
        raise ConfigError(f"{out} exists already.", remedy="Choose another name, or give --force.")
    if not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no such folder.", remedy="Make it first.")
    with writing(out):
        replace_file(out, text)
    return Export(out, tuple(rules), (*notes, *_remarks(sources.values())))


def _check_name(role: str, precision: str) -> None:
    try:
        TypeAdapter(SourceName).validate_python(precision)
    except ValidationError:
        known = ", ".join(f.name for f in all_formats())
        raise ConfigError(
            f"The precision of role {role} is {describe(precision)}.",
            remedy=f"Give one of {known}, or a name for a source: letters, digits, _ . and -.",
        ) from None


def _roles_of_templates(analysis: Analysis) -> dict[str, str]:
    """Template → role, of the names that the planner will see: the family's, or else the checkpoint's."""
    if analysis.slots:
        return {template(name): slot.role for name, slot in analysis.slots.items()}
    roles = {template(name): weight.role for name, weight in analysis.weights.items()}
    if len(roles) > _MAX_TEMPLATES:
        raise CheckpointError(
            f"{analysis.folder} has over {_MAX_TEMPLATES} weights whose names differ in more than numbers.",
            remedy="Write its weight mapping by hand.",
        )
    # A name that a pattern cannot spell gets no rule, but no other rule may take it along either.
    return {name: role if _SPELLABLE.fullmatch(name) else "other" for name, role in roles.items()}


def _rules(analysis: Analysis, roles: Mapping[str, str], role: str, source: _NewSource) -> Iterator[RoleRule]:
    target = next((f for f in all_formats() if f.name == source.name), None)
    if source.is_derived and role in _LEFT_WIDE:
        target = None
    weights = {name: weight for name, weight in analysis.weights.items() if weight.role == role}
    for pattern in _patterns(roles, role):
        regex = compile_pattern(pattern)
        matched = [weight for name, weight in weights.items() if regex.fullmatch(name)]
        shapes = Counter(weight.shape for weight in matched)
        new_nbytes = None
        if target is not None and all(shape is not None and len(shape) == 2 for shape in shapes):
            new_nbytes = sum(target.nbytes(shape) * count for shape, count in shapes.items() if shape is not None)
        sizes = [weight.nbytes for weight in matched]
        nbytes = None if None in sizes else sum(size for size in sizes if size is not None)
        yield RoleRule(role, pattern, source.name, len(matched), nbytes, new_nbytes)


def _patterns(roles: Mapping[str, str], role: str) -> list[str]:
    """The widest patterns that together match every name of a role and, but for companions, nothing else."""
    samples = [(name.replace("*", "0"), other) for name, other in roles.items()]

    def is_exclusive(pattern: str) -> bool:
        regex = compile_pattern(pattern)
        return all(other == role or other in _COMPANIONS for name, other in samples if regex.fullmatch(name))

    def cover(prefix: str, members: Sequence[Sequence[str]]) -> list[str]:
        """Patterns for `prefix` + each member's parts."""
        if prefix and is_exclusive(f"{prefix}*"):
            is_one_name = len(members) == 1 and "*" not in (whole := prefix + ".".join(members[0]))
            return [whole] if is_one_name else [f"{prefix}*"]
        children: defaultdict[str, list[Sequence[str]]] = defaultdict(list)
        for first, *rest in members:
            children[first].append(rest)
        found: list[str] = []
        for child, below in children.items():
            if [] in below:
                found.append(prefix + child)
            if longer := [rest for rest in below if rest]:
                found += cover(f"{prefix}{child}.", longer)
        alike = [child for child in children if child != "*" and f"{prefix}{child}.*" in found]
        if len(alike) < 2:
            return found
        merged = {f"{prefix}{child}.*" for child in alike}
        return [f"{prefix}{{{','.join(alike)}}}.*", *(pattern for pattern in found if pattern not in merged)]

    return cover("", [name.split(".") for name, other in roles.items() if other == role])


def _new_source(analysis: Analysis, out: Path, name: str) -> _NewSource:
    model = Path(analysis.model).expanduser()
    is_local = model.exists()
    base = Path(os.path.abspath(model)) if is_local else out.parent / model.name
    folder = base.with_name(f"{base.name}-{name}")
    return _NewSource(
        name=name,
        path=str(folder) if is_local and model.is_absolute() else _relative(folder, out),
        exists=folder.exists(),
        is_derived=not folder.exists()
        and name in _DERIVABLE
        and bool(analysis.slots)
        and analysis.formats.keys() <= _wide_names() | {UNQUANTIZED},
    )


def _wide_names() -> set[str]:
    return {f.name for f in all_formats() if f.is_wide}


def _remarks(sources: Iterable[_NewSource]) -> Iterator[str]:
    known = {f.name for f in all_formats()}
    for source in sources:
        if source.name not in known:
            yield f"{source.name}: no format is called so; it is taken as the name of a source."
        if not source.exists:
            yield f"{source.name}: {source.path} {_state(source)}."


def _state(source: _NewSource) -> str:
    if source.is_derived:
        return "does not exist: made from base_path at first use, unless you put another folder here"
    return f"does not exist: put the folder of the model's {source.name} checkpoint here"


def _base_path(analysis: Analysis, out: Path) -> str:
    model = Path(analysis.model).expanduser()
    if not model.exists():
        return analysis.model  # a hub id
    return os.path.abspath(model) if model.is_absolute() else _relative(Path(os.path.abspath(model)), out)


def _relative(path: Path, out: Path) -> str:
    """`path` from the folder of `out`; begins with a dot, so that nobody takes it for a hub id."""
    text = os.path.relpath(path, out.parent.resolve())
    return text if text.startswith(".") else f"./{text}"


def _render(
    analysis: Analysis, out: Path, rules: Sequence[RoleRule], sources: Sequence[_NewSource], notes: Sequence[str]
) -> str:
    base_path = _base_path(analysis, out)
    lines = [
        "# Written by `amalgam analyze`; `amalgam plan --config FILE` checks it. Relative paths start at this folder.",
        "model:",
        f"  name: {_quote(Path(os.path.abspath(analysis.model)).name)}",
        f"  base_path: {_quote(base_path)}  # config.json, tokenizer, and every weight that no rule names",
        "  mixed_precision:",
        *(
            f"    {source.name}_path: {_quote(source.path)}" + ("" if source.exists else f"  # {_state(source)}")
            for source in sources
        ),
    ]
    derived = [source.name for source in sources if source.is_derived]
    if derived:
        lines.append("    derived:  # quantized from base_path at first use")
        lines += [f"      {name}: {{format: {name}}}" for name in derived]
    lines.append("    # Exact names win, then the most specific pattern, then base_path.")
    lines += [f"    # {note}" for note in notes]
    lines.append("    weight_mapping:" if rules else "    weight_mapping: {}")
    lines += [f"      {_quote(r.pattern)}: {_quote(r.source)}  # {r.role}, {r.num_weights} in all" for r in rules]
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    """A YAML scalar in double quotes, on one line whatever it holds."""
    scalar: str = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=2**31)
    return scalar.strip()
