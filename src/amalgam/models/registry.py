"""Which families there are, and the one that a config.json is of.

In: a Hugging Face `config.json`. Out: a `Family` and a `ModelSpec`. Nothing below imports this.

To add a family, write a file in `models/families/` that exports `FAMILY`; outside the package, point the entry point
`amalgam.families` at such an object.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from amalgam.base.plugins import load_plugins
from amalgam.errors import CheckpointError, UnsupportedError, describe
from amalgam.formats.fused import FusedTensor
from amalgam.models import families
from amalgam.models.own_layers import read_own_layers
from amalgam.models.spec import AttentionBlock, ConfigReader, Family, ModelSpec

# Several times what the largest published models have. Every layer and expert becomes an object, before any file is
# asked whether it holds them.
MAX_LAYERS = 1024
MAX_EXPERTS = 2**16
# Older names of `layer_types`, as transformers takes them.
_OLDER_TYPES = {
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "mamba": "linear_attention",
}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer")
_LAYER_TYPES = ("layer_types", "layers_block_type", "mlp_layer_types")


@cache
def all_families() -> tuple[Family, ...]:
    """Every family of `models/families/` and of the entry points `amalgam.families`."""
    found: list[Family] = []
    for module_info in sorted(pkgutil.iter_modules(families.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{families.__name__}.{module_info.name}")
        if hasattr(module, "FAMILY"):
            found.append(module.FAMILY)
    found += load_plugins("amalgam.families")
    return tuple(found)


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The family that serves a config's architecture.

    Raises:
        CheckpointError: the config names no architecture.
        UnsupportedError: no family serves it; the message lists those that there are.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointError(
            f"{where} has architectures = {describe(architectures)}.", remedy="Expected a list with the model's class."
        )
    for family in all_families():
        if architectures[0] in family.architectures:
            return family
    known = ", ".join(sorted(name for family in all_families() for name in family.architectures))
    raise UnsupportedError(
        f"Architecture {describe(architectures[0])} is not supported.", remedy=f"Supported: {known}."
    )


def fused_tensors(config: Mapping[str, Any]) -> tuple[FusedTensor, ...]:
    """The fused tensors of a config's family; none if no family serves it (`Source.open` takes this function)."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return next((family.fused for family in all_families() if name in family.architectures), ())


def read_spec(config: Mapping[str, Any], where: str) -> tuple[Family, ModelSpec]:
    """Family and spec of a config.json; `where` names the file in messages.

    Raises:
        CheckpointError: a key is missing.
        UnsupportedError: no family serves it, or a value is not supported. More layers or experts than any model has
            are refused before anything is made of them.
    """
    family = find_family(config, where)
    reader = ConfigReader(config, where)
    text = reader.object("text_config", default=None)
    parts = (reader,) if text is None else (reader, text)
    for fields in parts:
        for key in _LAYER_COUNTS:
            if isinstance(count := fields.values.get(key), int) and count > MAX_LAYERS:
                fields.refuse(key, count, f"at most {MAX_LAYERS} layers")
        for key in _LAYER_TYPES:
            types = fields.values.get(key)
            if isinstance(types, list) and not all(isinstance(kind, str) for kind in types):
                fields.refuse(key, types, "a list of names")
    spec = read_own_layers(family, reader)
    for fields in parts:
        _check_layer_types(fields, spec)
    num_experts = sum(layer.mlp.num_experts for layer in spec.layers)
    if num_experts > MAX_EXPERTS:
        raise UnsupportedError(
            f"{where} describes {describe(num_experts)} experts in {spec.num_layers} layers.",
            remedy=f"Supported: at most {MAX_EXPERTS} in all. Is the file damaged?",
        )
    return family, spec


def _layer_type(attention: AttentionBlock) -> str:
    if attention.state_shape is not None:
        return getattr(attention, "layer_type", "linear_attention")
    for kind, field in (("sliding", "window"), ("chunked", "chunk")):
        if getattr(attention, field, None) is not None:
            return f"{kind}_attention"
    return "indexed_attention" if getattr(attention, "is_indexed", False) else "full_attention"


def _check_layer_types(config: ConfigReader, spec: ModelSpec) -> None:
    """Fail if `layer_types` says of a layer's attention something else than its family reads, or can."""
    expected = [_layer_type(layer.attention) for layer in spec.layers]
    found = config.get("layer_types")
    if isinstance(found, list):
        found = [_OLDER_TYPES.get(kind, kind) if isinstance(kind, str) else kind for kind in found]
    if found is not None and found != expected:
        config.refuse("layer_types", found, f"{expected}, as the other keys describe this family's layers")
