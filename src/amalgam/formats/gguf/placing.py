"""The logical names of a published checkpoint → GGUF's tensors: what `names` undoes, done.

In: an architecture, a config.json's sizes, logical names. Out: the tensor that each weight goes to, the order of its
rows, what becomes of its values. Must never know: how weights are stored, families, plans.

Rows and whole blocks of columns can be put in order in any type, so both are told as indices. Values change only where
GGUF has float32: norms, and what a recurrent state decays by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from amalgam.errors import UnsupportedError, describe
from amalgam.formats.gguf import undoing
from amalgam.formats.gguf.names import NAMINGS, Naming

Change = Callable[[Tensor], Tensor]

_NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.)")
_EACH_EXPERT = re.compile(r"blk\.\{\}\.ffn_(gate|up|down)\.\{\}")
_SHARED = ("blk.{}.ffn_gate_shexp", "blk.{}.ffn_up_shexp", "blk.{}.ffn_down_shexp")


@dataclass(frozen=True, eq=False)
class Place:
    """Where a weight, or a part of it, goes.

    Attributes:
        tensor: name in the file.
        expert: which of the tensor's equal parts it is; None: all of it.
        rows: of the weight, in the file's order; None: as they are.
        columns: likewise.
        change: float32 values in the published shape → those that the file has; None: they are the same, in any type.
        is_wide: the file has float32, whatever the weight has.
        is_transposed: `rows` give a matrix for each head, which is transposed (`attn_k_b`): `heads` of them.
        shape: of the tensor, where it is not the weight's.
    """

    tensor: str
    expert: int | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    change: Change | None = None
    is_wide: bool = False
    heads: int | None = None
    is_transposed: bool = False
    shape: tuple[int, ...] | None = None


class Placing:
    """The places of one model's weights.

    Args:
        sizes: of its config.json, as far as the order of rows depends on them: heads of attention and of delta nets.

    Raises:
        UnsupportedError: an architecture that has no table.
    """

    def __init__(self, architecture: str, sizes: Mapping[str, Any]) -> None:
        naming = NAMINGS.get(architecture)
        if naming is None:
            raise UnsupportedError(
                f"The names of tensors of architecture {describe(architecture)} are not known.",
                remedy=f"Known: {', '.join(sorted(NAMINGS))}.",
            )
        self._architecture = architecture
        self._naming = naming
        self._sizes = sizes
        self._has_experts = bool(sizes.get("num_experts"))

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[Place, ...]:
        """Where a weight goes.

        Raises:
            UnsupportedError: the architecture has no tensor for it.
        """
        numbers = _NUMBER.findall(name)
        pattern = _NUMBER.sub("{}", name)
        if pattern.endswith("kv_b_proj.weight"):
            return self._latent(f"blk.{numbers[0]}.", shape)
        if pattern.endswith("in_proj_qkvz.weight"):
            return self._grouped(f"blk.{numbers[0]}.", shape)
        if pattern.endswith("attention.g_proj.weight") and shape[0] == self._sizes["num_attention_heads"]:
            return (Place(f"blk.{numbers[0]}.attn_gate.weight"),)  # latent attention's, one number for each head
        found = _written(self._architecture, self._has_experts).get(pattern)
        stem, suffix = pattern, ""
        if found is None:
            stem, _, suffix = pattern.rpartition(".")
            found = _written(self._architecture, self._has_experts).get(stem)
            found = None if found is None or suffix not in ("weight", "bias") else f"{found}.{suffix}"
        if found is None:
            raise UnsupportedError(
                f"Architecture {self._architecture!r} of GGUF has no tensor for weight {name!r}.",
                remedy="Export to another target: `--to hf`.",
            )
        expert = int(numbers[-1]) if len(numbers) > found.count("{}") else None
        tensor = found.format(*numbers)
        if expert is not None:
            return (Place(tensor, expert, is_wide=suffix == "bias"),)
        return (self._whole(Place(tensor), found.removeprefix("blk.{}."), shape),)

    def _whole(self, place: Place, local: str, shape: tuple[int, ...]) -> Place:
        stem, _, suffix = local.rpartition(".")
        stem = stem if suffix in ("weight", "bias") else local
        undo = self._naming.values.get(stem)
        if undo is not None and suffix != "bias":
            change, target = self._change(undo, stem, shape)
            place = replace(place, change=change, is_wide=True, shape=target)
        elif self._naming.has_raised_norms and stem.endswith("_norm"):
            place = replace(place, change=_with_one, is_wide=True)
        elif stem == "ffn_gate_inp_shexp" or (len(shape) == 2 and shape[0] == 1 and stem.startswith("exp_probs_b")):
            place = replace(place, is_wide=True, shape=shape[1:])
        if self._naming.has_pairs and stem in ("attn_q", "attn_k"):
            heads = self._sizes["num_attention_heads" if stem == "attn_q" else "num_key_value_heads"]
            place = replace(place, rows=_to_pairs(shape[0], heads))
        if self._is_tiled:
            place = self._tiled(place, stem, shape)
        return place

    def _change(self, undo: Change, stem: str, shape: tuple[int, ...]) -> tuple[Change, tuple[int, ...]]:
        """What `undo` undoes, and the shape that comes of it."""
        is_column = "ssm_d" in self._naming.values and stem in ("ssm_a", "ssm_d")
        if is_column or undo is undoing.logarithm_of_rate:
            target: tuple[int, ...] = (*shape, 1)
        elif undo is undoing.apart:
            target = (shape[0], prod(shape[1:]))
        elif undo is undoing.of_channels:
            target = (1, *shape)
        elif undo is undoing.flat:
            groups = self._sizes["state_groups"]
            target = (groups, prod(shape) // groups)
        else:
            target = shape
        return _CHANGES.get(undo, _same), target

    # --- Latent attention ---

    def _latent(self, prefix: str, shape: tuple[int, ...]) -> tuple[Place, ...]:
        """Keys, transposed, and values of each head (`latent`)."""
        heads, latent = self._sizes["num_attention_heads"], shape[1]
        key_dim = self._sizes["qk_nope_head_dim"]
        rows = torch.arange(shape[0]).view(heads, -1)
        keys, values = rows[:, :key_dim].flatten(), rows[:, key_dim:].flatten()
        return (
            Place(
                f"{prefix}attn_k_b.weight", rows=keys, heads=heads, is_transposed=True, shape=(heads, latent, key_dim)
            ),
            Place(f"{prefix}attn_v_b.weight", rows=values, heads=heads, shape=(heads, len(values) // heads, latent)),
        )

    # --- Delta nets ---

    @property
    def _is_tiled(self) -> bool:
        """Whether value heads are put in another order: llama.cpp repeats all key heads, not each of them."""
        keys, values = (self._sizes.get(f"linear_num_{kind}_heads", 0) for kind in ("key", "value"))
        return self._architecture in ("qwen35", "qwen35moe") and keys != values and not self._sizes["is_tiled"]

    def _tiled(self, place: Place, stem: str, shape: tuple[int, ...]) -> Place:
        keys, values = self._sizes["linear_num_key_heads"], self._sizes["linear_num_value_heads"]
        key_rows = 2 * keys * self._sizes["linear_key_head_dim"]
        if stem == "ssm_out":
            return replace(place, columns=_tiled(torch.arange(shape[1]), keys, values))
        if stem in ("attn_qkv", "ssm_conv1d"):
            rows = torch.arange(shape[0])
            return replace(place, rows=torch.cat((rows[:key_rows], _tiled(rows[key_rows:], keys, values))))
        if stem in ("attn_gate", "ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"):
            return replace(place, rows=_tiled(torch.arange(shape[0]), keys, values))
        return place

    def _grouped(self, prefix: str, shape: tuple[int, ...]) -> tuple[Place, ...]:
        """Queries, keys and values of all heads one after the other, and the gates, out of groups by key head."""
        keys, values = self._sizes["linear_num_key_heads"], self._sizes["linear_num_value_heads"]
        key_dim, value_dim = self._sizes["linear_key_head_dim"], self._sizes["linear_value_head_dim"]
        shared = values // keys * value_dim
        parts = torch.arange(shape[0]).view(keys, -1).split([key_dim, key_dim, shared, shared], dim=1)
        query, key, value, gate = (part.flatten() for part in parts)
        together = torch.cat((query, key, value))
        return (
            Place(f"{prefix}attn_qkv.weight", rows=together, shape=(len(together), shape[1])),
            Place(f"{prefix}attn_gate.weight", rows=gate, shape=(len(gate), shape[1])),
        )


@cache
def _written(architecture: str, has_experts: bool) -> dict[str, str]:
    """Pattern of a logical name → that of the tensor, each without a suffix unless it changes."""
    naming: Naming = NAMINGS[architecture]
    found: dict[str, str] = {}
    for pattern, target in naming.names.items():
        if not isinstance(target, str) or _EACH_EXPERT.fullmatch(pattern):
            continue
        if target not in found or (has_experts and pattern in _SHARED):
            found[target] = pattern
    return found


def _to_pairs(rows: int, heads: int) -> Tensor:
    """Rows of each head from two halves to pairs, (0, half), (1, half + 1) …"""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _tiled(index: Tensor, keys: int, values: int) -> Tensor:
    """Value heads from key head by key head to the first of each, the second of each …"""
    return index.view(keys, values // keys, -1).transpose(0, 1).flatten()


def _with_one(published: Tensor) -> Tensor:
    return published + 1.0


def _decay(published: Tensor) -> Tensor:
    return -torch.exp(published)


def _same(published: Tensor) -> Tensor:
    return published


_CHANGES: Mapping[Change, Change] = {
    undoing.without_one: _with_one,
    undoing.logarithm: _decay,
    undoing.logarithm_of_rate: torch.exp,
}
