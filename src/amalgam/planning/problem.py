"""What may be chosen: each weight in every source that has it in another precision.

In: a loader. Out: a `Problem`: items with their options, and what is fixed. Must never know: how good an option is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from amalgam.composition.loader import ModelLoader
from amalgam.composition.patterns import compile_pattern, idle_alternative
from amalgam.composition.planned import PlannedWeight
from amalgam.config.placement import BASE_SOURCE
from amalgam.errors import ConfigError, PlanError

_EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)$")
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Option:
    """One weight in one source.

    Attributes:
        stored_bytes: in its file, with scales and zero points.
        memory_bytes: what it is expected to take when it is loaded.
    """

    source: str
    format: str
    stored_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Item:
    """One weight that has a choice, of sources or of devices.

    Attributes:
        part: gate, up or down of an expert; the slot's last word of others.
        options: the narrowest first.
    """

    name: str
    slot: str
    role: str
    part: str
    layer: int | None
    expert: int | None
    num_weights: int
    options: tuple[Option, ...]

    def index_of(self, source: str) -> int | None:
        """The option of a source; None where it has none."""
        return next((i for i, option in enumerate(self.options) if option.source == source), None)


@dataclass(frozen=True)
class Problem:
    """All weights that have a choice.

    Attributes:
        fixed_stored, fixed_memory: bytes of the weights that have none.
        sources: those with options, by their bits per weight, the narrowest first.
        left_out: source → why none of its weights can be chosen.
    """

    items: tuple[Item, ...]
    fixed_stored: int
    fixed_memory: int
    sources: tuple[str, ...]
    left_out: Mapping[str, str]

    @cached_property
    def num_weights(self) -> int:
        return sum(item.num_weights for item in self.items)

    def bits_of(self, source: str) -> float:
        """Mean bits of a weight in a source, as stored."""
        found = [(o.stored_bytes, item.num_weights) for item in self.items for o in item.options if o.source == source]
        return 8 * sum(size for size, _ in found) / max(1, sum(count for _, count in found))

    def stored_bytes(self, choice: Sequence[int]) -> int:
        return sum(item.options[index].stored_bytes for item, index in zip(self.items, choice, strict=True))

    def memory_bytes(self, choice: Sequence[int]) -> int:
        return sum(item.options[index].memory_bytes for item, index in zip(self.items, choice, strict=True))

    def bits_per_weight(self, choice: Sequence[int]) -> float:
        return 8 * self.stored_bytes(choice) / self.num_weights

    def mapping(self, choice: Sequence[int]) -> dict[str, str]:
        """Logical name → source, of the weights that do not stay with base."""
        chosen = ((item.name, item.options[index].source) for item, index in zip(self.items, choice, strict=True))
        return {name: source for name, source in chosen if source != BASE_SOURCE}

    def uniform(self, source: str) -> list[int] | None:
        """Every weight that has a choice from one source; None where one lacks it."""
        found = [item.index_of(source) if len(item.options) > 1 else 0 for item in self.items]
        return None if None in found else [index for index in found if index is not None]


def problem_of(
    loader: ModelLoader,
    sources: Sequence[str] | None = None,
    floors: Mapping[str, str] | None = None,
    *,
    compares: bool = True,
    places: bool = False,
) -> Problem:
    """Every weight that some sources hold in different precisions.

    Args:
        sources: which may be chosen from; None: all that are declared.
        floors: pattern → source: weights that match take no option with fewer bytes than in that source.
        compares: whether to leave out sources whose weights cannot stand beside base's.
        places: whether experts can lie on several devices, so that those of one source have a choice, too.

    Raises:
        PlanError: no weight has a choice; a floor matches none or names a source that does not hold it.
        CheckpointError: a source is damaged or of another model.
    """
    wanted = [BASE_SOURCE, *(name for name in loader.sources if name != BASE_SOURCE)]
    if sources is not None:
        unknown = [name for name in sources if name not in wanted]
        if unknown:
            raise PlanError(f"Source {unknown[0]!r} is not declared.", remedy=f"Declared: {', '.join(wanted)}.")
        wanted = [name for name in wanted if name in sources]
    base = {weight.choice.name: weight for weight in loader.plan(())}
    left_out: dict[str, str] = {}
    for source in wanted:
        if compares and source != BASE_SOURCE and (reason := _why_not(loader, source)) is not None:
            left_out[source] = reason
    usable = [source for source in wanted if source not in left_out]
    items, fixed_stored, fixed_memory = [], 0, 0
    for name, weight in base.items():
        options = _options(loader, name, weight, usable)
        if len(options) < 2 and not (places and options and weight.slot.role == "expert"):
            fixed_stored += _stored_bytes(weight)
            fixed_memory += weight.memory_bytes
            continue
        slot = weight.slot
        expert, layer = _EXPERT.match(slot.name), _LAYER.match(slot.name)
        items.append(
            Item(
                name,
                slot.name,
                slot.role,
                slot.name.rpartition(".")[2],
                int(layer[1]) if layer else None,
                int(expert[2]) if expert else None,
                math.prod(slot.shape),
                options,
            )
        )
    if not items:
        reasons = "".join(f" {source}: {reason}" for source, reason in left_out.items())
        raise PlanError(
            f"No weight has a choice: the sources hold all of them in one precision.{reasons}",
            remedy="Declare sources in other precisions, for instance under mixed_precision.derived.",
        )
    items = _with_floors(items, floors or {})
    found = {option.source for item in items for option in item.options}
    problem = Problem(tuple(items), fixed_stored, fixed_memory, (), left_out)
    ordered = tuple(sorted(found, key=problem.bits_of))
    return Problem(problem.items, fixed_stored, fixed_memory, ordered, left_out)


def _why_not(loader: ModelLoader, source: str) -> str | None:
    """Why a source's weights cannot stand beside the others' (another basis, say); None if they can."""
    try:
        loader.plan(loader.uniform(source))
    except PlanError as error:
        return error.what
    return None


def _options(loader: ModelLoader, name: str, base: PlannedWeight, sources: Sequence[str]) -> tuple[Option, ...]:
    """One option for each size and format that some source has; of two alike, the first source's."""
    found: dict[tuple[str, int, tuple[int, int] | None], Option] = {}
    if not (base.slot.is_linear or base.slot.role == "embedding"):
        return ()
    for source in sources:
        weight = base if source == BASE_SOURCE else loader.candidate(name, source)
        if weight is None:
            continue
        stored = weight.stored
        is_copy = stored.is_wide and stored.nbytes == base.stored.nbytes
        key = (stored.format.name, stored.nbytes, stored.block) if not stored.is_wide else ("", stored.nbytes, None)
        if is_copy and source != BASE_SOURCE:
            continue
        # Two sources of one format differ in how they were rounded, which is a choice too.
        found[(f"{source}/{key[0]}", key[1], key[2])] = Option(
            source, stored.format.name, _stored_bytes(weight), weight.memory_bytes
        )
    return tuple(sorted(found.values(), key=lambda option: (option.stored_bytes, option.memory_bytes)))


def _stored_bytes(weight: PlannedWeight) -> int:
    """Codes, scales and zero points; a tensor that only says the shape is none of them."""
    return sum(part.nbytes for role, part in weight.stored.parts.items() if role != "weight_shape")


def _with_floors(items: Sequence[Item], floors: Mapping[str, str]) -> list[Item]:
    result = list(items)
    for pattern, source in floors.items():
        regex = compile_pattern(pattern)
        matching = [index for index, item in enumerate(result) if regex.fullmatch(item.name)]
        if not matching:
            raise PlanError(f"Floor {pattern!r} matches no weight that has a choice.", remedy="See `amalgam plan`.")
        names = [result[index].name for index in matching]
        if (idle := idle_alternative(pattern, names, names)) is not None:
            raise PlanError(
                f"Floor {pattern!r} matches no weight that has a choice with {idle!r}.", remedy="See `amalgam plan`."
            )
        for index in matching:
            item = result[index]
            at = item.index_of(source)
            if at is None:
                raise PlanError(f"Floor {pattern!r} names source {source!r}, which has no option for {item.name!r}.")
            least = item.options[at].stored_bytes
            kept = tuple(option for option in item.options if option.stored_bytes >= least)
            result[index] = Item(
                item.name, item.slot, item.role, item.part, item.layer, item.expert, item.num_weights, kept
            )
    return result


def parse_floor(text: str) -> tuple[str, str]:
    """`PATTERN=SOURCE`.

    Raises:
        ConfigError: it is not.
    """
    pattern, equals, source = text.rpartition("=")
    if not (pattern and equals and source):
        raise ConfigError(f"--floor is {text!r}.", remedy="Expected PATTERN=SOURCE.")
    return pattern, source
