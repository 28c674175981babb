"""Parts of latent attention, and the rotation that indexers have as well."""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.backends.reference.operators import part_pairs
from amalgam.kernels.program import AttendLatent
from amalgam.kernels.step import AttentionBatch


def normed_latent(one: AttendLatent, frame: Frame) -> Tensor:
    """`[tokens, latent]`, what the projections to keys and values read."""
    latent = frame.get(one.compressed)[:, : one.latent_dim]
    if one.norm is None:
        return latent
    return frame.operators.rms_norm(latent.contiguous(), one.norm, one.norm_eps)


def shared_key(one: AttendLatent, frame: Frame) -> Tensor:
    """`[tokens, 1, rope]`, the rotated key beside the latent vectors."""
    return rotated(frame.get(one.compressed)[:, None, one.latent_dim :], one.rope, one.is_interleaved, frame)


def latent_query(one: AttendLatent, frame: Frame) -> tuple[Tensor, Tensor]:
    """`[tokens, heads, nope]` and, rotated, `[tokens, heads, rope]`."""
    query = frame.get(one.query).unflatten(1, (one.num_heads, -1))
    return query[..., : one.nope_dim], rotated(query[..., one.nope_dim :], one.rope, one.is_interleaved, frame)


def attention_of(one: AttendLatent, frame: Frame) -> AttentionBatch:
    """Over the positions that an indexer chose, or over all."""
    return frame.chosen if one.is_indexed and frame.chosen is not None else frame.step.attention


def rotated(x: Tensor, rope: int | None, is_interleaved: bool, frame: Frame, rows: Tensor | None = None) -> Tensor:
    """Heads `[tokens, heads, dim]`, whose first dimensions are turned; of some `rows` of the step, or of all."""
    if rope is None:
        return x
    cos, sin = frame.rotary(rope)
    if rows is not None:
        cos, sin = cos[rows], sin[rows]
    return frame.operators.rotate(part_pairs(x, 2 * cos.shape[1]) if is_interleaved else x, cos, sin)


def latent_matrices(one: AttendLatent, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Wₖ `[heads, nope, latent]` and Wᵥ `[heads, value, latent]`: floating weights as they are, others in `dtype`."""
    expand = one.expand
    matrices = expand.dequantize(None if expand.is_floating else dtype)
    matrices = matrices.view(one.num_heads, one.nope_dim + one.value_dim, one.latent_dim)
    return matrices[:, : one.nope_dim], matrices[:, one.nope_dim :]
