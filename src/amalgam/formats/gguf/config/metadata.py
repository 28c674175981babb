"""Typed access to what a GGUF file says of its architecture, and to the tensors that tell what it does not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from amalgam.base.fields import REQUIRED, Fields, Required
from amalgam.checkpoint.store import TensorStore
from amalgam.errors import CheckpointError, UnsupportedError

Config: TypeAlias = dict[str, Any]
# About the file, or written twice; none changes what is computed.
_HARMLESS = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"})
# Of the scaling `yarn`, which reads them; no other does.
_YARN_KEYS = frozenset(
    f"rope.scaling.{key}" for key in ("original_context_length", "yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor")
)
# What converters write for every architecture: understood where it changes nothing and the architecture has no own
# meaning for it. Any other key and value is refused.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "embedding_scale": (1.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def _shortest(number: float) -> float:
    """Stored as float32: the shortest decimal fraction that rounds to it is what config.json had."""
    return float(str(np.float32(number)))


class Metadata(Fields):
    """Typed access to the keys of an architecture, and to the tensors that tell what they do not."""

    cure = "Or put the file into a folder with the published config.json."

    def __init__(self, store: TensorStore, architecture: str) -> None:
        prefix = f"{architecture}."
        values = {key.removeprefix(prefix): value for key, value in store.metadata.items() if key.startswith(prefix)}
        super().__init__(values, str(store.files[0]), prefix)
        self._store = store
        self.pass_over(_HARMLESS | _YARN_KEYS)

    def has(self, key: str) -> bool:
        return key in self.values

    def get(self, *keys: str, default: Any = None) -> Any:
        """The value; of one value for each layer the one that they share."""
        value = super().get(*keys, default=default)
        if isinstance(value, Sequence) and not isinstance(value, str):
            distinct = set(value)
            if len(distinct) != 1:
                self.unsupported(keys[0], value, "the same value for every layer")
            return distinct.pop()
        return value

    def number(self, key: str, default: float | Required = REQUIRED) -> float:
        """What config.json had."""
        return _shortest(self.float(key, default=default))

    def expect_pattern(self, period: int, num_layers: int) -> None:
        """Refuse a choice of layers with a window other than all but every `period`th."""
        key = "attention.sliding_window_pattern"
        value = super().get(key)
        pattern = [(layer + 1) % period != 0 for layer in range(num_layers)]
        is_flags = isinstance(value, Sequence) and not isinstance(value, str) and list(map(bool, value)) == pattern
        if value is not None and value != period and not is_flags:
            self.unsupported(key, value, f"{period}, or the same for each layer")

    def layer_types(self, num_layers: int, default_period: int) -> list[str]:
        """Which layers have a window; where that is not said, all but every `default_period`th."""
        key = "attention.sliding_window_pattern"
        value = super().get(key, default=default_period)
        flags = [(layer + 1) % value != 0 for layer in range(num_layers)] if type(value) is int and value > 0 else value
        if not isinstance(flags, Sequence) or isinstance(flags, str) or len(flags) != num_layers:
            self.unsupported(key, value, f"a period, or true or false for each of {num_layers} layers")
        return ["sliding_attention" if flag else "full_attention" for flag in flags]

    def per_layer(self, key: str, num_layers: int) -> list[int]:
        """A whole number of each layer, which are written as one where they are the same; those of draft layers may
        follow."""
        value = super().get(key)
        values = [value] * num_layers if type(value) is int else value
        allowed = (num_layers, self.int("block_count"))
        if not isinstance(values, Sequence) or len(values) not in allowed or not all(type(v) is int for v in values):
            self.refuse(key, value, f"an integer, or one for each of {num_layers} layers")
        return list(values[:num_layers])

    def limits(self, key: str, num_layers: int) -> list[float]:
        """A limit of each layer, 0 where there is none; those of draft layers may follow."""
        value = super().get(key, default=0.0)
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * num_layers
        are_limits = all(type(v) in (int, float) and 0 <= v < math.inf for v in values)
        if len(values) not in (num_layers, self.int("block_count")) or not are_limits:
            self.refuse(key, value, f"a number of at least 0, or one for each of {num_layers} layers")
        return [_shortest(limit) for limit in values[:num_layers]]

    def flags(self, key: str, num_layers: int, *, default: bool) -> list[bool]:
        """Yes or no for each layer."""
        value = super().get(key, default=[default] * num_layers)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_list or len(value) < num_layers or not set(value) <= {False, True}:
            self.unsupported(key, value, f"true or false for each of {num_layers} layers")
        return [bool(flag) for flag in value[:num_layers]]

    def has_tensor(self, name: str) -> bool:
        return name in self._store

    def has_tensor_like(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in self._store)

    def num_rows(self, name: str) -> int:
        if name not in self._store:
            raise CheckpointError(f"{self._store.files[0]} has no tensor {name!r}.", remedy="Download it again.")
        return self._store[name].shape[0]

    def num_layers(self) -> int:
        """Layers of the decoder; believed only if the file has as many tensors."""
        num_blocks, num_drafts = self.int("block_count"), self.int("nextn_predict_layers", default=0)
        if not num_drafts < num_blocks <= len(self._store):
            self.refuse("block_count", num_blocks, f"at most the {len(self._store)} tensors of the file, and not 0")
        return num_blocks - num_drafts

    def num_groups(self, default: tuple[int, int] | None) -> tuple[int, int]:
        """Groups of experts and how many of them may be used; `default` where neither is written."""
        keys = ("expert_group_count", "expert_group_used_count")
        if default is None or any(map(self.has, keys)):
            for key in keys:
                if not self.has(key):
                    raise UnsupportedError(
                        f"{self.where} has no {self.path}{key}.",
                        remedy="Converters from autumn 2025 on write it. Put the file into a folder with the published "
                        "config.json, which says it; or convert the model again.",
                    )
            return self.int(keys[0]), self.int(keys[1])
        return default

    def width(self, key: str, tensor: str) -> int:
        """Outputs of a projection of the experts, which the oldest files do not write; told from the stack."""
        pattern = re.compile(rf"blk\.\d+\.{tensor}(\.0)?\.weight")
        shape = next((entry.shape for name, entry in self._store.items() if pattern.fullmatch(name)), None)
        return self.int(key, default=REQUIRED if shape is None or len(shape) < 2 else shape[-2])

    def num_experts(self) -> int:
        """Experts of a layer; believed only if its router has as many rows."""
        count = self.int("expert_count")
        routers = (name for name in self._store if name.endswith(".ffn_gate_inp.weight"))
        num_rows = self.num_rows(next(routers, "blk.0.ffn_gate_inp.weight"))
        if count != num_rows:
            self.refuse("expert_count", count, f"the {num_rows} rows of a router")
        return count

    def small_tensor(self, name: str) -> list[float]:
        """A small tensor of float32 numbers."""
        tensor = self._store.read(name)
        if not tensor.is_floating_point() or tensor.dim() != 1:
            raise CheckpointError(f"Tensor {name!r} in {self._store.files[0]} is no list of numbers.")
        return [float(value) for value in tensor]

    def check_all_read(self) -> None:
        """Refuse what may change the model, and what nobody knows."""
        for _, key, value in self.unread():
            neutral = _NEUTRAL.get(key, ())
            if type(value) not in (bool, int, float) or value not in neutral:
                self.unsupported(key, value, " or ".join(map(repr, neutral)) or "nothing under this key")


Builder: TypeAlias = Callable[[Metadata], Config]  # what an architecture is read by
