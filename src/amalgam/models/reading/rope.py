"""The rope settings of a config.json → `Rope`. A setting that is not understood is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NoReturn

from amalgam.models.rope import Linear, Llama3, LongRope, Proportional, Rope, Scaling, Yarn, yarn_scale
from amalgam.models.spec import ConfigReader

_LARGEST = 2.0**63
_LAYER_TYPES = ("full_attention", "sliding_attention")


class RopeSettings:
    """The rope settings of a config.json: `rope_parameters` (transformers 5) or `rope_scaling` (before).

    Args:
        layer_type: whose settings, where `rope_parameters` has some for each type; `rope_scaling` then is of the full
            layers alone. None: all layers have the same.
    """

    def __init__(self, config: ConfigReader, layer_type: str | None = None) -> None:
        new, old = config.object("rope_parameters", default=None), config.object("rope_scaling", default=None)
        if layer_type is not None:
            new = None if new is None else _of_layer_type(new, layer_type)
            old = old if layer_type == "full_attention" else None
        if new and old and new.values and old.values and new.values != old.values:
            config.refuse("rope_scaling", old.values, "either it or rope_parameters")
        found = new if new and new.values else old
        self._config = config
        self._values = ConfigReader({}, config.where, "rope_parameters.") if found is None else found
        self.kind = self._values.get("rope_type", default=self._values.get("type", default="default"))
        if not isinstance(self.kind, str) or self.kind not in _KINDS:
            self._values.refuse("rope_type", self.kind, ", ".join(_KINDS))

    def number(self, key: str, default: float | None = None, above: float = 0.0) -> float:
        """A number above `above`; required without a default."""
        value = self._values.float(key, default=default)
        if value is None or not above < value < _LARGEST:
            self._values.refuse(key, value, f"a number above {above:g} for rope type {self.kind}")
        return value

    def optional(self, key: str) -> float | None:
        """A number, None if absent; 0 counts as absent, as in the Hugging Face classes."""
        return self.number(key) if self._values.get(key) else None

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers above 0."""
        values = self._values.list(key, of=float, what="numbers", default=None)
        if values is None or not all(0 < value < _LARGEST for value in values):
            self._values.refuse(key, values, f"a list of numbers above 0 for rope type {self.kind}")
        return tuple(map(float, values))

    def bool(self, key: str, default: bool) -> bool:
        return self._values.bool(key, default=default)

    def original_max_positions(self) -> float:
        """The length before stretching; a key beside the settings counts before one in them."""
        key = "original_max_position_embeddings"
        value = self._config.int(key, default=0, low=0)
        return float(value) if value > 1 else self.number(key, default=self.max_positions, above=1)

    @property
    def max_positions(self) -> int:
        return self._config.int("max_position_embeddings")

    def rotary_dim(self, default: int) -> int:
        """How many dimensions of a head turn, where that is said in dimensions."""
        return int(self.number("rotary_dim", default=default))

    def refuse(self, key: str, value: float, allowed: str) -> NoReturn:
        self._values.refuse(key, value, allowed)

    def refuse_unknown(self, known: set[str]) -> None:
        """Fail on a setting that would otherwise be ignored."""
        self._values.pass_over(known)
        for fields, key, value in self._values.unread():
            if value is not None:
                fields.refuse(key, value, f"{', '.join(sorted(known))} for rope type {self.kind}")


def _of_layer_type(settings: ConfigReader, layer_type: str) -> ConfigReader | None:
    for key, value in settings.values.items():
        if key not in _LAYER_TYPES:
            settings.refuse(key, value, f"settings of {' and '.join(_LAYER_TYPES)}")
    return settings.object(layer_type, default=None)


def _read_dynamic(settings: RopeSettings) -> None:
    settings.number("factor")  # of no effect within max_position_embeddings: see `amalgam.models.rope`


def _read_linear(settings: RopeSettings) -> Linear:
    return Linear(settings.number("factor"))


def _read_llama3(settings: RopeSettings) -> Llama3:
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if high < low:  # equal: no passage between (Llama 4 Scout)
        settings.refuse("high_freq_factor", high, f"at least low_freq_factor {low:g}")
    return Llama3(
        factor=settings.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=settings.original_max_positions(),
    )


def _read_yarn(settings: RopeSettings) -> Yarn:
    factor = settings.number("factor")
    weight, weight_all = settings.optional("mscale"), settings.optional("mscale_all_dim")
    attention_factor = yarn_scale(factor)
    if weight is not None and weight_all is not None:
        attention_factor = yarn_scale(factor, weight) / yarn_scale(factor, weight_all)
    return Yarn(
        factor=factor,
        original_max_positions=settings.original_max_positions(),
        beta_fast=settings.optional("beta_fast") or 32.0,
        beta_slow=settings.optional("beta_slow") or 1.0,
        truncates=settings.bool("truncate", default=True),
        attention_factor=settings.number("attention_factor", default=attention_factor),
    )


def _read_longrope(settings: RopeSettings) -> LongRope:
    original = settings.original_max_positions()
    factor = settings.number("factor", default=settings.max_positions / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention_factor = settings.number("attention_factor", default=default)
    return LongRope(
        original_max_positions=original,
        short_factors=settings.numbers("short_factor"),
        long_factors=settings.numbers("long_factor"),
        short_attention_factor=settings.number("short_mscale", default=attention_factor),
        long_attention_factor=settings.number("long_mscale", default=attention_factor),
    )


def _read_proportional(config: ConfigReader, settings: RopeSettings, head_dim: int) -> Rope:
    """Pairs are halves of the head apart, whatever share of them turns."""
    share = settings.number("partial_rotary_factor", default=1.0)
    if share > 1 or head_dim % 2:
        config.refuse("rope_parameters.partial_rotary_factor", share, f"a share of head_dim {head_dim}, which is even")
    scaling = Proportional(int(share * head_dim // 2), settings.number("factor", default=1.0))
    return Rope(settings.number("rope_theta", above=1), head_dim, scaling)


# The last two say how the checkpoint came about.
_COMMON = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "rotary_dim"),
    *("original_max_position_embeddings", "finetuned"),
    # How the axes of images share the frequencies; a text's tokens have the same position on each.
    *("mrope_section", "mrope_interleaved"),
}
# Rope type → reader of its scaling, and the settings that it understands.
_KINDS: Mapping[str, tuple[Callable[[RopeSettings], Scaling | None], set[str]]] = {
    "default": (lambda settings: None, set()),
    "linear": (_read_linear, {"factor"}),
    "dynamic": (_read_dynamic, {"factor"}),
    "llama3": (_read_llama3, {"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": (
        _read_yarn,
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": (
        _read_longrope,
        {"factor", "attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"},
    ),
    "proportional": (lambda settings: None, {"factor"}),  # read with the head's size, see `read_rope`
}


def read_rope(
    config: ConfigReader,
    head_dim: int,
    default_theta: float = 10000.0,
    default_fraction: float | None = None,
    *,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    others: frozenset[str] = frozenset(),
) -> Rope:
    """The rotary embedding that a config.json describes.

    Args:
        head_dim: dimensions of a head, of which `rotary_dim` turn, which GGUF files say, else the share
            `partial_rotary_factor`, else `default_fraction`.
        default_fraction: None: the class turns whole heads, so that no `partial_rotary_factor` but 1 is taken.
        layer_type: see `RopeSettings`.
        theta_key: where the base is, if not in the settings.
        others: settings that the family reads itself.

    Raises:
        UnsupportedError: an unknown rope type or setting, a missing or impossible value.
    """
    settings = RopeSettings(config, layer_type)
    read_scaling, known = _KINDS[settings.kind]
    settings.refuse_unknown(_COMMON | known | others)
    if settings.kind == "proportional":
        return _read_proportional(config, settings, head_dim)
    fraction = settings.number(
        "partial_rotary_factor", default=config.float("partial_rotary_factor", default=default_fraction or 1.0)
    )
    if default_fraction is None and fraction != 1:
        config.refuse("partial_rotary_factor", fraction, "1 for this family")
    rotary_dim = settings.rotary_dim(int(head_dim * fraction))
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        config.refuse("partial_rotary_factor", fraction, f"an even share of head_dim {head_dim}")
    theta = settings.number("rope_theta", default=config.float(theta_key, default=default_theta), above=1)
    scaling = read_scaling(settings)
    if isinstance(scaling, LongRope):
        for key, factors in (("short_factor", scaling.short_factors), ("long_factor", scaling.long_factors)):
            if len(factors) != rotary_dim // 2:
                config.refuse(f"rope_parameters.{key}", factors, f"{rotary_dim // 2} numbers, one for each frequency")
    return Rope(theta, rotary_dim, scaling)
