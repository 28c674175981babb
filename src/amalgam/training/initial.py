"""A smaller model of a teacher's kind: its config.json, and the weights that it begins with.

In: a teacher's config.json and weights, how wide and how deep the student is to be. Out: a config, weights by slot.
Must never know: files.

A slice of a weight has its leading rows and columns: of the stream the first channels, of attention the first heads, of
experts the first ones, alike in every weight, so that slices fit each other. Layers are taken evenly from the first to
the last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from amalgam.errors import ConfigError
from amalgam.models.own_layers import KEY
from amalgam.models.spec import ModelSpec, Slot

Start = Literal["slices", "random"]
STARTS: tuple[Start, ...] = get_args(Start)
_SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_embd",
          "n_inner")  # fmt: skip
_HEADS, _KV_HEADS = ("num_attention_heads", "n_head"), "num_key_value_heads"
_LAYERS = ("num_hidden_layers", "n_layer")
_FUSED = ("qkv", "qkvz", "gate_up", "bcx", "in")  # several parts one below the other: the leading rows are the first's
_LAYER = re.compile(r"layers\.(\d+)\.")
_STD = 0.02  # where a config says nothing


@dataclass(frozen=True)
class Shape:
    """How much smaller a student is.

    Attributes:
        width: share of the teacher's channels, heads and inner sizes.
        layers: None: as many as the teacher has.

    Raises:
        ConfigError: a share that is none.
    """

    width: float = 1.0
    layers: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise ConfigError(f"width is {self.width}.", remedy="Allowed: above 0, at most 1.")


def smaller_config(config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """A teacher's config.json with smaller sizes; sizes are multiples of 32, groups of heads stay as large.

    Raises:
        ConfigError: the teacher has fewer layers; one of them has heads of its own, which are not narrowed.
    """
    found = {key: value for key, value in config.items() if key != "quantization_config"}
    text = found.get("text_config")
    if isinstance(text, Mapping):
        return {**found, "text_config": smaller_config(text, shape)}
    if shape.width < 1:
        found |= _narrower(found, shape.width)
    if shape.layers is not None:
        key = next(key for key in _LAYERS if key in found)
        found |= _of_layers(found, layers_taken(found[key], shape.layers)) | {key: shape.layers}
    return found


def _narrower(config: Mapping[str, Any], width: float) -> dict[str, Any]:
    made = _narrower_sizes(config, width)
    if config.get(KEY):
        made[KEY] = {layer: _narrower_layer(layer, own, width) for layer, own in config[KEY].items()}
    heads = next(key for key in _HEADS if key in config)
    kv_heads = config.get(_KV_HEADS) or config[heads]
    shared = max(1, config[heads] // kv_heads)
    new_kv_heads = max(1, round(kv_heads * width))
    made[heads] = new_kv_heads * shared
    if _KV_HEADS in config:
        made[_KV_HEADS] = new_kv_heads
    stream = next(key for key in ("hidden_size", "n_embd") if key in config)
    if config.get("head_dim") is None:  # heads share the stream
        made[stream] = config[stream] // config[heads] * made[heads]
    return made


def _narrower_sizes(config: Mapping[str, Any], width: float) -> dict[str, Any]:
    sizes = {key: config[key] for key in _SIZES if isinstance(config.get(key), int)}
    return {key: max(32, round(size * width / 32) * 32) for key, size in sizes.items()}


def _narrower_layer(layer: str, own: Mapping[str, Any], width: float) -> dict[str, Any]:
    """Values that one layer has of its own."""
    if heads := [key for key in (*_HEADS, _KV_HEADS, "head_dim") if key in own]:
        raise ConfigError(
            f"Layer {layer} of the teacher has a {heads[0]} of its own, {own[heads[0]]} ({KEY}).",
            remedy="Leave --width out, or give a config.json with --student.",
        )
    return {**own, **_narrower_sizes(own, width)}


def _of_layers(config: Mapping[str, Any], taken: Sequence[int]) -> dict[str, Any]:
    """Lists that have an entry for each layer, and what single layers have of their own."""
    count = next(config[key] for key in _LAYERS if key in config)
    lists = {key: value for key, value in config.items() if isinstance(value, list) and len(value) == count}
    made: dict[str, Any] = {key: [value[index] for index in taken] for key, value in lists.items()}
    if own := config.get(KEY):
        made[KEY] = {str(new): own[str(old)] for new, old in enumerate(taken) if str(old) in own}
    return made


def layers_taken(count: int, wanted: int) -> list[int]:
    """Which layers of a teacher stand for those of a student.

    Raises:
        ConfigError: the teacher has fewer.
    """
    if not 0 < wanted <= count:
        raise ConfigError(f"{wanted} layers are asked for.", remedy=f"The teacher has {count}.")
    if wanted == 1:
        return [0]
    return [round(index * (count - 1) / (wanted - 1)) for index in range(wanted)]


def initial_weights(
    spec: ModelSpec,
    teacher: ModelSpec,
    value_of: Callable[[str], Tensor],
    start: Start,
    std: float | None,
    seed: int,
) -> Iterator[tuple[Slot, Tensor]]:
    """What a student begins with, float32, slot by slot.

    Args:
        value_of: a teacher's slot → its weight, float32.
        start: slices: of the teacher's weights. random: matrices are drawn with a standard deviation of `std`, norms
            do nothing; what is neither is a slice all the same. What the teacher has no slice of is drawn, or 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for slot, source in _sources(spec, teacher):
        is_matrix = len(slot.shape) == 2
        if source is not None and (start == "slices" or not (is_matrix or slot.role == "norm")):
            yield slot, value_of(source)[tuple(slice(size) for size in slot.shape)].clone()
        elif is_matrix:
            yield slot, torch.randn(slot.shape, generator=generator) * (_STD if std is None else std)
        else:
            is_factor = slot.role == "norm" and not slot.name.endswith("_bias")
            adds_one = getattr(spec.norm, "adds_one", False)
            yield slot, torch.ones(slot.shape) if is_factor and not adds_one else torch.zeros(slot.shape)


def drawn_matrices(spec: ModelSpec, teacher: ModelSpec) -> list[str]:
    """Slots of a student that begins with slices, and of which the teacher has none: they are drawn."""
    return [slot.name for slot, source in _sources(spec, teacher) if source is None and len(slot.shape) == 2]


def _sources(spec: ModelSpec, teacher: ModelSpec) -> Iterator[tuple[Slot, str | None]]:
    """Each slot of a student, and the teacher's that it is a slice of."""
    shapes = {slot.name: slot.shape for slot in teacher.slots}
    taken = layers_taken(teacher.num_layers, min(spec.num_layers, teacher.num_layers))
    for slot in spec.slots:
        source = _source(slot.name, taken)
        shape = shapes.get(source or "")
        yield slot, source if shape is not None and _has_slice(slot, shape) else None


def _source(name: str, taken: Sequence[int]) -> str | None:
    """The teacher's slot that stands for a student's."""
    found = _LAYER.match(name)
    if found is None:
        return name
    index = int(found[1])
    return f"layers.{taken[index]}.{name[found.end() :]}" if index < len(taken) else None


def _has_slice(slot: Slot, shape: tuple[int, ...]) -> bool:
    if len(shape) != len(slot.shape) or any(mine > theirs for mine, theirs in zip(slot.shape, shape, strict=True)):
        return False
    is_fused = slot.name.rpartition(".")[2].removesuffix("_bias") in _FUSED
    return not is_fused or slot.shape[0] == shape[0]
