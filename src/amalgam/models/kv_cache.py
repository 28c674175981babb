"""The KV cache: keys and values of every layer, index keys and recurrent states beside them, sized by a model's spec.

Must never know: whose blocks and states are whose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from amalgam.kernels.step import LayerCache, LayerState
from amalgam.models.spec import ModelSpec, StateShape

# As `engine.kv_dtype` calls them. The last two hold codes, each token's key and value of a head with a scale.
KV_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_CODES = (torch.int8, torch.float8_e4m3fn)
_SCALE_BYTES = torch.float32.itemsize


def kv_type(name: str, activations: torch.dtype) -> torch.dtype:
    """The type that `engine.kv_dtype` names; `auto` is that of the activations."""
    return activations if name == "auto" else KV_TYPES[name]


class KVCache:
    """Keys and values of all layers, as slots `[num_blocks × block_size, kv_heads, dim]`, and what layers have beside
    them: index keys in the same slots, states of sequences."""

    def __init__(
        self,
        layers: Sequence[LayerCache],
        block_size: int,
        states: Sequence[LayerState | None] | None = None,
        indexes: Sequence[LayerCache | None] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.states = (None,) * len(self.layers) if states is None else tuple(states)
        self.indexes = (None,) * len(self.layers) if indexes is None else tuple(indexes)
        self.block_size = block_size

    @property
    def device(self) -> torch.device:
        return self.layers[0].keys.device

    @property
    def nbytes(self) -> int:
        """Of keys and values, and of index keys."""
        layers = [layer for layer in (*self.layers, *self.indexes) if layer is not None]
        return sum(tensor.nbytes for layer in layers for tensor in layer if tensor is not None)

    @property
    def state_nbytes(self) -> int:
        """Of the states."""
        return sum(tensor.nbytes for layer in self.states if layer is not None for tensor in layer)

    @classmethod
    def allocate(
        cls,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_states: int = 1,
    ) -> KVCache:
        """Zeroed storage; on the CPU, pages cost no memory until they are used.

        Args:
            dtype: of keys and values, one of `KV_TYPES`.
            num_states: slots for the recurrent states of sequences, if the model has any.
        """
        slots = num_blocks * block_size

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            if device.type != "cpu" or not math.prod(shape):
                return torch.zeros(shape, dtype=dtype, device=device)
            # torch.zeros writes every page; numpy asks the system for pages that are zero already.
            raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
            return torch.from_numpy(raw).view(dtype).view(shape)

        def scales(heads: int) -> Tensor | None:
            return zeros(slots, heads, dtype=torch.float32) if dtype in _CODES else None

        def state(shape: StateShape) -> LayerState:
            return LayerState(*(zeros(num_states, *part, dtype=torch.float32) for part in shape))

        def layer(heads: int, key: int, value: int) -> LayerCache:
            return LayerCache(
                zeros(slots, heads, key), zeros(slots, heads, value), scales(heads), scales(heads if value else 0)
            )

        layers = [layer(*shape) for shape in spec.kv_shapes]
        states = [shape and state(shape) for shape in spec.state_shapes]
        indexes = [layer(1, dim, 0) if dim else None for dim in spec.index_dims]
        return cls(layers, block_size, states, indexes)

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, of a cache of this type."""
        scale = _SCALE_BYTES if dtype in _CODES else 0
        per_token = sum(
            heads * (dim * dtype.itemsize + (scale if dim else 0))
            for heads, key, value in spec.kv_shapes
            for dim in (key, value)
        )
        per_token += sum(dim * dtype.itemsize + scale for dim in spec.index_dims if dim)
        return per_token * block_size
