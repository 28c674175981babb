"""The KV cache: keys and values of every layer, sized by a model's spec. Must never know: whose blocks are whose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from amalgam.models.spec import ModelSpec


class KVCache:
    """Keys and values of all layers, as slots `[num_blocks × block_size, kv_heads, dim]`."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], block_size: int) -> None:
        self.keys = tuple(keys)
        self.values = tuple(values)
        self.block_size = block_size

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @classmethod
    def allocate(
        cls, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Zeroed storage; on the CPU, pages cost no memory until they are used."""
        slots = num_blocks * block_size

        def zeros(heads: int, dim: int) -> Tensor:
            if device.type != "cpu" or not heads * dim:
                return torch.zeros((slots, heads, dim), dtype=dtype, device=device)
            # torch.zeros writes every page; numpy asks the system for pages that are zero already.
            raw = np.zeros(slots * heads * dim * dtype.itemsize, dtype=np.uint8)
            return torch.from_numpy(raw).view(dtype).view(slots, heads, dim)

        keys = [zeros(heads, key_dim) for heads, key_dim, _ in spec.kv_shapes]
        values = [zeros(heads, value_dim) for heads, _, value_dim in spec.kv_shapes]
        return cls(keys, values, block_size)

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return sum(heads * (key + value) for heads, key, value in spec.kv_shapes) * block_size * dtype.itemsize
