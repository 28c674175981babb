"""What there is to choose from when a model is to fit a machine: the plan as configured, each source alone, and what
`amalgam quantize` could make; with the commands that make and serve each.

In: settings and a loader. Out: `Way`s, each weight of which can be loaded to be timed. Must never know: the machine.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.config.placement import BASE_SOURCE, Rule, build_rules
from amalgam.config.reading import read_settings
from amalgam.config.settings import Settings
from amalgam.errors import AmalgamError, ConfigError
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.kernels.backends import choose_backend
from amalgam.kernels.weights import PackedWeight
from amalgam.models.spec import Slot
from amalgam.quantizers.nearest import round_to_nearest

AS_CONFIGURED = "as configured"
# What `amalgam quantize` makes without texts. 2 and 3 bits take the memory of 4 and are worse.
MAKEABLE: tuple[tuple[str, int | None], ...] = (("int8", None), ("fp8", None), ("int4", 32), ("int4", 128))
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_DECIDED = {"max_seq_length", "max_batch_size", "kv_cache_bytes", "state_cache_bytes"}  # by what is recommended


@dataclass(frozen=True)
class Held:
    """One weight as it would lie in memory.

    Attributes:
        kind: equal for weights that take the same time.
        load: makes one to be timed.
    """

    kind: tuple[Any, ...]
    memory_bytes: int
    load: Callable[[], PackedWeight]


@dataclass(frozen=True)
class Way:
    """A candidate before it is timed."""

    name: str
    command: str
    serve: str
    held: Sequence[tuple[Slot, Held]]

    @property
    def memory_bytes(self) -> int:
        return sum(held.memory_bytes for _, held in self.held)

    @property
    def bits(self) -> float:
        linear = [(slot, held) for slot, held in self.held if slot.is_linear]
        weights = sum(math.prod(slot.shape) for slot, _ in linear)
        return 8 * sum(held.memory_bytes for _, held in linear) / max(1, weights)


class Serving:
    """Commands that serve what figures were computed for: with the settings that are not as the command has them.

    Args:
        config: the file that settings came from; None: flags and variables only.
    """

    def __init__(self, settings: Settings, config: Path | None) -> None:
        self._settings = settings
        self._file = [] if config is None else ["--config", str(config)]
        self._plain = read_settings(needs_model=False).settings
        sources = settings.model.mixed_precision.sources
        try:
            self._read = read_settings(config, needs_model=False).settings
            known = self._read.model.mixed_precision.sources
        except ConfigError:  # the file's rules name a source that a flag declares
            self._read, known = read_settings(config, sources=sources, needs_model=False).settings, {}
        self._declared = [(name, path) for name, path in sources.items() if known.get(name) != path]

    def as_configured(self) -> str:
        model, read = self._settings.model, self._read.model
        mixed, known = model.mixed_precision, read.mixed_precision
        words = list(self._file)
        if model.base_path != read.base_path:
            words += ["--model", model.base_path]
        for source, path in self._declared:
            words += ["--source", f"{source}={path}"]
        if mixed.default_source != known.default_source:
            words += ["--model.mixed_precision.default_source", mixed.default_source]
        there = len(known.all_rules)
        for rule in mixed.all_rules[there if mixed.all_rules[:there] == known.all_rules else 0 :]:
            at = "" if rule.device is None else f"@{rule.device}"
            words += ["--map", f"{rule.pattern}={rule.source or ''}{at}"]
        return self._line(words, self._read)

    def alone(self, model: str, *words: str) -> str:
        """A checkpoint without the configured rules."""
        return self._line(["--model", model, *words], self._plain)

    def _line(self, words: Sequence[str], there: Settings) -> str:
        flags: list[str] = []
        for section in ("inference", "engine"):
            wanted = getattr(self._settings, section).model_dump(exclude=_DECIDED, exclude_none=True)
            known = getattr(there, section).model_dump()
            for name, value in wanted.items():
                if value != known[name]:
                    flags += [f"--{section}.{name}", str(value).lower() if isinstance(value, bool) else str(value)]
        return shlex.join(["amalgam", "serve", *words, *flags])


class Stock:
    """What there is to choose from: the plan as configured, each source alone, and what could be made.

    Attributes:
        left_out: source → why it cannot be had as a whole.
    """

    def __init__(self, settings: Settings, loader: ModelLoader, config: Path | None) -> None:
        self.left_out: dict[str, str] = {}
        self._settings = settings
        self._loader = loader
        self._serving = Serving(settings, config)
        self._backend = choose_backend(getattr(torch, settings.inference.dtype), loader.device)

    def ways(self) -> Iterator[Way]:
        base_path, mixed = self._settings.model.base_path, self._settings.model.mixed_precision
        base = self._loader.plan(())
        yield self._way(BASE_SOURCE, self._serving.alone(base_path), base)
        if mixed.all_rules or mixed.default_source != BASE_SOURCE:
            yield from self._planned(AS_CONFIGURED, self._serving.as_configured(), None)
        for source, path in mixed.sources.items():
            if source in mixed.derived and not Path(path).expanduser().exists():
                self.left_out[source] = "It is derived and not made yet. `amalgam serve` makes it."
                continue
            yield from self._uniform(source, path)
        if all(weight.stored.is_wide for weight in base if weight.slot.is_linear):
            yield from self._makeable(base)

    def _uniform(self, source: str, path: str) -> Iterator[Way]:
        try:
            names = [rule.pattern for rule in self._loader.uniform(source)]
        except AmalgamError as error:
            self.left_out[source] = error.what
            return
        patterns = sorted({_NUMBER.sub("*", name) for name in names})
        rules = build_rules(dict.fromkeys(patterns, source))
        if not names or {name for name, each in self._chosen(rules) if each == source} != set(names):
            self.left_out[source] = "It does not hold the weights of all layers."
            return
        words = ["--source", f"{source}={path}"]
        for pattern in patterns:
            words += ["--map", f"{pattern}={source}"]
        serve = self._serving.alone(self._settings.model.base_path, *words)
        yield from self._planned(source, serve, rules)

    def _chosen(self, rules: Sequence[Rule]) -> list[tuple[str, str]]:
        choices = self._loader.choose(rules)
        return [(name, choices[name].source) for name in self._loader.names]

    def _planned(self, name: str, serve: str, rules: Sequence[Rule] | None) -> Iterator[Way]:
        try:
            yield self._way(name, serve, self._loader.plan(rules))
        except AmalgamError as error:
            self.left_out[name] = error.what

    def _way(self, name: str, serve: str, planned: Sequence[PlannedWeight]) -> Way:
        return Way(name, "", serve, [(weight.slot, self._held(weight)) for weight in planned])

    def _held(self, weight: PlannedWeight) -> Held:
        kind = weight.slot.shape, weight.format.name, weight.stored.block, weight.coded_bytes is not None
        return Held(kind, weight.memory_bytes, lambda: weight.load(self._backend))

    def _makeable(self, base: Sequence[PlannedWeight]) -> Iterator[Way]:
        """Every weight that is multiplied, but the head and routers, in one format."""
        path = self._settings.model.base_path
        for name, group_size in MAKEABLE:
            label = name if group_size is None else f"{name}-g{group_size}"
            options = QuantizeOptions(group_size)
            flags = f"--format {name}" + ("" if group_size is None else f" --group-size {group_size}")
            out = f"{Path(path).name}-{label}"
            try:
                held = [(weight.slot, self._made(weight, name, options)) for weight in base]
            except AmalgamError as error:  # a shape that the format cannot hold
                self.left_out[label] = error.what
                continue
            yield Way(
                label,
                f"{shlex.join(['amalgam', 'quantize', path, out])} {flags}",
                self._serving.alone(out),
                held,
            )

    def _made(self, weight: PlannedWeight, name: str, options: QuantizeOptions) -> Held:
        slot = weight.slot
        if not slot.is_linear or slot.role == "head":
            return self._held(weight)
        target = writable_format(name)
        grid = target.grid(slot.shape, torch.bfloat16, options)
        activation = self._loader.activation

        def load() -> PackedWeight:
            values = torch.randn(slot.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
            packed = target.pack(target.encode(round_to_nearest(values, grid)))
            return self._backend.prepare(packed, activation, codes=False)

        return Held((slot.shape, name, grid.block, False), target.nbytes(slot.shape, options), load)
