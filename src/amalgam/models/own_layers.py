"""Layers that are not like the others: `per_layer_config` of a config.json, as transformers writes it since 5.23.

In: a config.json and its family. Out: a spec in which these layers have their own sizes. Must never know: what has made
them differ.

The key maps a layer's number to the keys that it has other values of: `{"3": {"num_experts": 12}}`. Such a layer is the
one of a model in which all layers have these values, so that every family reads it in its own way, and nothing else of
the model may depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from amalgam.errors import AmalgamError
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

KEY = "per_layer_config"
TEXT = "text_config"
# Names of one number: a layer says it by one of them, and the model may have said it by another.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SKIP = "skip"


def read_own_layers(family: Family, reader: ConfigReader) -> ModelSpec:
    """The spec of a config.json.

    Raises:
        CheckpointError: a layer that there is not, or values that cannot be.
        UnsupportedError: parts of a layer are left out; a value that this family does not have by layer.
    """
    spec = family.read_spec(reader)
    text = reader.object(TEXT, default=None)
    place = reader if text is None or text.get(KEY) is None else text
    if family.reads_own_layers or not place.get(KEY):
        return spec
    layers = list(spec.layers)
    of_values: dict[str, LayerSpec] = {}
    seen: set[int] = set()
    for name, own in place.objects(KEY).items():
        if not (name.isascii() and name.isdecimal()) or int(name) >= len(layers) or int(name) in seen:
            place.refuse(KEY, name, f"numbers of layers from 0 to {len(layers) - 1}, each once")
        layer_id = int(name)
        seen.add(layer_id)
        if own.get(_SKIP):
            own.unsupported(_SKIP, own.get(_SKIP), "layers with all of their parts")
        values = {key: value for key, value in own.values.items() if key != _SKIP}
        key = json.dumps([values, _kind(spec, layer_id)], sort_keys=True, default=repr)
        if key not in of_values:
            of_values[key] = _layer(family, reader, place, spec, layer_id, values)
        layers[layer_id] = of_values[key]
    return replace(spec, layers=tuple(layers))


def own_layers_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of such layers, beside the decoder's description or in it."""
    text = config.get(TEXT)
    inside = text.get(KEY) if isinstance(text, Mapping) else None
    return config.get(KEY) if inside is None else inside


def _kind(spec: ModelSpec, layer_id: int) -> int:
    """The first layer that is like this one where no layer has values of its own."""
    return spec.layers.index(spec.layers[layer_id])


def _layer(
    family: Family, reader: ConfigReader, place: ConfigReader, spec: ModelSpec, layer_id: int, values: Mapping[str, Any]
) -> LayerSpec:
    """A layer of the model in which all have these values, each of which has to make a difference."""

    def read(chosen: Mapping[str, Any]) -> ModelSpec:
        return family.read_spec(ConfigReader(with_values(reader.values, chosen), reader.where))

    found = read(values)
    own = f"{KEY}.{layer_id}"
    if replace(found, layers=spec.layers) != spec or len(found.layers) != len(spec.layers):
        place.unsupported(own, values, "values that concern the layer alone")
    if found.num_active_experts != spec.num_active_experts:  # routing is kept as one array for all layers
        place.unsupported(own, values, f"the model's num_experts_per_tok, {spec.num_active_experts}")
    for key, value in values.items():
        if place.values.get(key) == value:
            continue
        try:
            is_read = read({name: each for name, each in values.items() if name != key}) != found
        except AmalgamError:  # the others cannot be without it
            is_read = True
        if not is_read:
            place.unsupported(f"{own}.{key}", value, f"keys that {family.name} reads of a layer")
    return found.layers[layer_id]


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with other values for all layers, in the part that describes the decoder; without `KEY`."""
    text = config.get(TEXT)
    is_inside = isinstance(text, Mapping)
    part: dict[str, Any] = dict(text) if isinstance(text, Mapping) else dict(config)
    part.pop(KEY, None)
    if any(key in values for key in EXPERT_COUNTS):
        for key in EXPERT_COUNTS:
            part.pop(key, None)
    part |= values
    if not is_inside:
        return part
    return {**{key: value for key, value in config.items() if key != KEY}, TEXT: part}
