"""Settings of the model and its checkpoints: section `model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from amalgam.config.fields import ModelPath, Section
from amalgam.config.placement import (
    BASE_SOURCE,
    PATH_SUFFIX,
    PlacementValue,
    Rule,
    SourceName,
    build_rules,
    check_declared,
)


class DerivedSource(Section):
    """How to make a source that does not exist yet: quantize the base checkpoint into the source's folder."""

    format: Literal["fp8", "int8", "int4"]
    """Precision of the linear weights."""
    group_size: int | None = Field(default=None, ge=1, le=65536)
    """Inputs that share a scale (int4). None: 128, or the largest power of two below it that divides the inputs."""
    scale: Literal["tensor", "channel", "block"] | None = None
    """Granularity of the scales (fp8: tensor, channel or block of 128×128; int8: channel)."""


class MixedPrecisionSettings(Section):
    """Where each weight comes from. Every `<name>_path` key declares a source called `<name>`."""

    sources: dict[SourceName, ModelPath] = Field(default_factory=dict)
    """Name → folder or hub id, for sources whose names do not fit a `<name>_path` key."""
    weight_mapping: dict[str, PlacementValue] = Field(default_factory=dict)
    """Logical name or pattern → source, or `{source: fp8, device: cuda}`, either of which may be left out. Exact names
    win, then the most specific pattern."""
    rules: tuple[Rule, ...] = ()
    """The same as an ordered list: among equally specific patterns the later wins."""
    default_source: SourceName = BASE_SOURCE
    """Source of weights that no rule names."""
    derived: dict[SourceName, DerivedSource] = Field(default_factory=dict)
    """Sources to make from `base_path` at first use when their folder is absent and no other process is making it."""

    @model_validator(mode="before")
    @classmethod
    def _collect_paths(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        result: dict[str, Any] = {}
        sources: dict[str, Any] = dict(data.get("sources") or {})
        for key, value in data.items():
            if isinstance(key, str) and key.endswith(PATH_SUFFIX) and key not in cls.model_fields:
                name = key.removesuffix(PATH_SUFFIX)
                if name in sources:
                    raise ValueError(f"source {name!r} is declared twice, as {key} and in sources")
                sources[name] = value
            else:
                result[key] = value
        if BASE_SOURCE in sources:
            raise ValueError(f"source name {BASE_SOURCE!r} is taken by model.base_path")
        result["sources"] = sources
        return result

    @model_validator(mode="after")
    def _check_sources(self) -> MixedPrecisionSettings:
        used = [(f"weight_mapping[{name!r}]", placement.source) for name, placement in self.weight_mapping.items()]
        used += [(f"rules[{i}] ({rule.pattern!r})", rule.source) for i, rule in enumerate(self.rules)]
        used += [("default_source", self.default_source), *((f"derived[{name!r}]", name) for name in self.derived)]
        check_declared(used, self.sources)
        return self

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """`weight_mapping` and `rules` as one ordered list."""
        return (*build_rules(self.weight_mapping), *self.rules)


class ModelSettings(Section):
    """The model and its checkpoints."""

    name: str = ""
    """Name shown to clients. Empty: the folder's name."""
    base_path: ModelPath
    """Folder, `.gguf` file or hub id (`org/name`, `org/name:file.gguf`): configuration, tokenizer, default weights."""
    mixed_precision: MixedPrecisionSettings = MixedPrecisionSettings()
    """Further sources and the rules that choose among them."""
