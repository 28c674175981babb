"""`kv_b_proj` of multi-head latent attention as GGUF has it since 2025: keys and values apart, keys transposed.

    attn_k_b  [heads, latent, key]      attn_v_b  [heads, value, latent]      each in any GGUF type

llama.cpp multiplies queries with `attn_k_b` instead of expanding the keys (DeepSeek-V2, section 2.1.2). The published
weight is, for each head, the rows of its keys and then those of its values. Blocks run along the latent dimension in
one and along the key dimension in the other, so that the weight is expanded when it is loaded: exactly, in float32
unless both parts have one floating type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from amalgam.errors import CheckpointError
from amalgam.formats.contract import ModuleContext, Read, StoredWeight, WeightFormat
from amalgam.formats.fused import TensorPart
from amalgam.formats.gguf import blocks, k_quants
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import DENSE, dense
from amalgam.kernels.weights import PackedWeight

KEY_PART, VALUE_PART = "gguf_k_b", "gguf_v_b"
_FORMATS = {weight_format.type.name: weight_format for weight_format in (*blocks.FORMATS, *k_quants.FORMATS)}


class GgufLatent(WeightFormat):
    """Two GGUF tensors that are one weight."""

    layouts = (DENSE,)
    name = "gguf_latent"
    required = frozenset({KEY_PART, VALUE_PART})

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        key, value = parts[KEY_PART], parts[VALUE_PART]
        key_shape, value_shape = _logical_shape(key), _logical_shape(value)
        if (
            len(key_shape) != 3
            or len(value_shape) != 3
            or key_shape[0] != value_shape[0]
            or key_shape[1] != value_shape[2]
        ):
            raise CheckpointError(
                f"Weight {name!r} has the parts {key.name!r} {list(key_shape)} and {value.name!r} {list(value_shape)} "
                f"in {key.file.name}.",
                remedy="Expected [heads, latent, key] and [heads, value, latent].",
            )
        heads, latent, key_dim = key_shape
        return StoredWeight(name, self, (heads * (key_dim + value_shape[1]), latent), parts)

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        key, value = (
            _expand(stored.name, stored.parts[part], read(stored.parts[part])) for part in (KEY_PART, VALUE_PART)
        )
        if key.dtype != value.dtype:
            key, value = key.float(), value.float()
        rows: Tensor = torch.cat((key.transpose(1, 2), value), dim=1)
        return dense(rows.reshape(stored.shape).contiguous())

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        return math.prod(shape) * torch.float32.itemsize


def _logical_shape(entry: TensorPart) -> tuple[int, ...]:
    return entry.shape if entry.encoding is None else _FORMATS[entry.encoding].type.logical_shape(entry.shape)


def _expand(name: str, entry: TensorPart, raw: Tensor) -> Tensor:
    if entry.encoding is None:
        return raw
    weight_format = _FORMATS[entry.encoding]
    weight_format.check_finite(name, entry, raw)
    return weight_format.expand(raw)


FORMAT = GgufLatent()
