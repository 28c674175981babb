"""The mixture of experts, each projection of each expert in whatever it is stored.

In: activations, a routing, experts whose weights kernels read. Out: activations. Must never know: names, plans.

    expert ids ─ sort ─┬─ order of (token, choice) by expert
                       └─ tiles of each launch: expert, rows      gate and up ─ inner ─ down ─ outer ─ sum of choices

Experts whose gate and up projections are of the same kinds share a launch, and so do those whose down projections are.
A launch finds out on the device which tiles are its own. Its grid has room for as many as there could be, whatever the
routing, and where the weights lie stands in a table on the device: which experts are of which kind, and where they are,
changes with the table alone. A captured graph stays valid as long as no kind comes that it has no launch for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
import triton.language as tl
from torch import Tensor

from amalgam.kernels.backends.triton.grouped import down_kernel, sort_kernel, sum_kernel, up_kernel
from amalgam.kernels.backends.triton.kinds import (
    COMMON,
    PUBLISHED,
    Kind,
    Tile,
    TritonWeight,
    compute_type,
    in_steps,
    pointers_of,
    step_of,
    tile_for,
    wide_biases,
)
from amalgam.kernels.backends.triton.launching import FLOAT_TYPES, on_device_of, power_of_two, runs_on
from amalgam.kernels.backends.triton.numbers import OPTIONS
from amalgam.kernels.backends.triton.variants import Variant
from amalgam.kernels.weights import SWIGLU, Expert, ExpertTable, GatedActivation, PackedWeight

_SORT_BLOCK = 1024
_MOST_ROWS = 64  # of a tile


@dataclass(frozen=True)
class Launch:
    """Experts that are multiplied together: gate and up of these kinds, or down of this kind."""

    kinds: tuple[Kind, ...]

    @property
    def is_first(self) -> bool:
        return len(self.kinds) == 2


@dataclass(frozen=True, eq=False)
class TritonExperts(ExpertTable):
    """Experts that kernels read.

    Attributes:
        launches: those of gate and up, then those of down. Some may have no expert.
        has_bias: whether every expert has biases.
        hidden, width: what an expert reads and makes, and what is between its projections.
        table: int64 `[TABLE_ROWS, experts]` of `grouped.py`, on the device.
        kept: what it points to.
    """

    launches: tuple[Launch, ...] = field(kw_only=True)
    has_bias: bool = field(kw_only=True)
    hidden: int = field(kw_only=True)
    width: int = field(kw_only=True)
    table: Tensor = field(kw_only=True)
    kept: tuple[Tensor, ...] = field(kw_only=True)

    def anywhere(self, table: Tensor) -> TritonExperts:
        """Experts launched alike, wherever another table says that they are. Nothing here keeps their weights."""
        return replace(self, experts=(), devices=(), table=table, kept=())


def launches_of(experts: ExpertTable, others: Sequence[Launch] = ()) -> tuple[Launch, ...] | None:
    """What `prepare_experts` needs at least; None: kernels do not take these experts.

    Args:
        others: launches to have as well, first: those of versions with whose graphs this one is to run.
    """
    if not len(experts) or not all(_is_read(expert, experts[0]) for expert in experts.experts):
        return None
    found = dict.fromkeys(others)
    for expert in experts.experts:
        for weights in ((expert.gate, expert.up), (expert.down,)):
            found.setdefault(_launch_of(*weights))
    return tuple(sorted(found, key=lambda launch: not launch.is_first))


def prepare_experts(experts: ExpertTable, launches: tuple[Launch, ...]) -> TritonExperts:
    """Experts with their table."""
    numbers, columns = {launch: number for number, launch in enumerate(launches)}, []
    kept: list[Tensor] = []
    for expert in experts.experts:
        weights = [expert.gate, expert.up, expert.down]
        biases = wide_biases(weights, [expert.gate_bias, expert.up_bias, expert.down_bias])
        column: list[int] = []
        for weight, bias in zip(weights, biases, strict=True):
            assert isinstance(weight, TritonWeight)
            column += pointers_of(weight, bias)
            kept += weight.parts.values()
        kept += [bias for bias in biases if bias is not None]
        columns.append([*column, numbers[_launch_of(expert.gate, expert.up)], numbers[_launch_of(expert.down)]])
    table = torch.tensor(columns, dtype=torch.int64).t().contiguous().to(kept[0].device)
    hidden, width = experts[0].down.shape
    return TritonExperts(
        experts.experts,
        launches=launches,
        has_bias=_has_bias(experts[0]),
        hidden=hidden,
        width=width,
        table=table,
        kept=tuple(kept),
    )


def _launch_of(*weights: PackedWeight) -> Launch:
    kinds = [weight.kind for weight in weights if isinstance(weight, TritonWeight)]
    step = step_of(kinds)
    return Launch(tuple(in_steps(kind, step) for kind in kinds))


def _is_read(expert: Expert, first: Expert) -> bool:
    weights, like = (expert.gate, expert.up, expert.down), (first.gate, first.up, first.down)
    return _has_bias(expert) == _has_bias(first) and all(
        isinstance(one, TritonWeight) and one.shape == other.shape for one, other in zip(weights, like, strict=True)
    )


def _has_bias(expert: Expert) -> bool:
    return any(bias is not None for bias in (expert.gate_bias, expert.up_bias, expert.down_bias))


def supports_moe(x: Tensor, experts: ExpertTable) -> bool:
    """Whether `moe` and `expert_outputs` take these."""
    return isinstance(experts, TritonExperts) and x.dim() == 2 and x.dtype in FLOAT_TYPES and runs_on(x, experts.table)


def supports_sum(outputs: Tensor, gate_weights: Tensor, dtype: torch.dtype) -> bool:
    """Whether `weighted_sum` takes these."""
    return outputs.dtype in FLOAT_TYPES and dtype in FLOAT_TYPES and runs_on(outputs, gate_weights)


@dataclass(frozen=True)
class Sizes:
    """Of the launches of so many tokens; the same for every routing of them.

    Attributes:
        is_wide: something of the layer is multiplied in float32.
        num_tiles: that there could be in a launch: each expert leaves one tile unfilled at most.
    """

    tokens: int
    choices: int
    experts: int
    is_wide: bool = False

    @property
    def slots(self) -> int:
        return self.tokens * self.choices

    @property
    def rows(self) -> int:
        """Of a tile, whatever is multiplied: twice those that an expert has on average."""
        return tile_for(min(_MOST_ROWS, -(-2 * self.slots // self.experts)), is_wide=self.is_wide).rows

    @property
    def num_tiles(self) -> int:
        return (self.slots + min(self.slots, self.experts) * (self.rows - 1)) // self.rows


def moe(
    x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: GatedActivation = SWIGLU
) -> Tensor:
    """See `operators.moe`. Gate and up meet in float32; what down reads, and each expert's result, has x's type."""
    assert isinstance(experts, TritonExperts), type(experts)
    outer = torch.empty((*expert_ids.shape, experts.hidden), dtype=x.dtype, device=x.device)
    expert_outputs(x, expert_ids, experts, activation, outer)
    return weighted_sum(outer, expert_ids, gate_weights, x.dtype)


def expert_outputs(
    x: Tensor, expert_ids: Tensor, experts: ExpertTable, activation: GatedActivation, out: Tensor
) -> None:
    """See `operators.expert_outputs`. out: contiguous, of x's type or float32."""
    assert isinstance(experts, TritonExperts), type(experts)
    x = x if x.stride(1) == 1 else x.contiguous()
    is_wide = any(compute_type(x.dtype, *launch.kinds) == tl.float32 for launch in experts.launches)
    tokens, choices = expert_ids.shape
    sizes = Sizes(tokens, choices, experts.table.shape[1], is_wide)
    if sizes.slots:
        with on_device_of(x):
            order, tiles, counts = _sort(expert_ids, experts, sizes)
            _multiply(x, experts, sizes, activation, order, tiles, counts, out)


def weighted_sum(outputs: Tensor, expert_ids: Tensor, gate_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """See `operators.weighted_sum`. outputs: contiguous, of any floating type."""
    tokens, choices, hidden = outputs.shape
    out = torch.empty((tokens, hidden), dtype=dtype, device=outputs.device)
    if tokens:
        block = min(1024, power_of_two(hidden))
        ids, weights = expert_ids.contiguous(), gate_weights.float().contiguous()
        with on_device_of(outputs):
            grid = (tokens, -(-hidden // block))
            sum_kernel[grid](outputs, ids, weights, out, hidden, CHOICES=choices, BLOCK=block, **OPTIONS)
    return out


def _sort(expert_ids: Tensor, experts: TritonExperts, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    launches = len(experts.launches)
    order = torch.empty(sizes.slots, dtype=torch.int32, device=expert_ids.device)
    tiles = torch.empty((launches, sizes.num_tiles, 3), dtype=torch.int32, device=expert_ids.device)
    counts = torch.empty(launches, dtype=torch.int32, device=expert_ids.device)
    sort_kernel[(sizes.experts,)](
        expert_ids.contiguous(),
        experts.table,
        order,
        tiles,
        counts,
        sizes.slots,
        sizes.num_tiles,
        NUM=sizes.experts,
        WIDTH=max(32, power_of_two(sizes.experts)),
        LAUNCHES=launches,
        FIRSTS=sum(launch.is_first for launch in experts.launches),
        TILE_ROWS=sizes.rows,
        BLOCK=_SORT_BLOCK,
        **OPTIONS,
    )
    return order, tiles, counts


def _multiply(
    x: Tensor,
    experts: TritonExperts,
    sizes: Sizes,
    activation: GatedActivation,
    order: Tensor,
    tiles: Tensor,
    counts: Tensor,
    outer: Tensor,
) -> None:
    """outer: `[tokens, k, hidden]`, each choice's expert of its token."""
    inner = torch.empty((sizes.slots, experts.width), dtype=x.dtype, device=x.device)
    for number, launch in enumerate(experts.launches):
        compute = compute_type(x.dtype, *launch.kinds)
        tile = tile_for(sizes.rows, *launch.kinds, is_wide=compute == tl.float32)
        common = {
            "LAUNCH": number,
            "NUM": sizes.experts,
            "COMPUTE": compute,
            "HAS_BIAS": experts.has_bias,
            "TILE_ROWS": tile.rows,
            "TILE_OUTPUTS": tile.outputs,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            **OPTIONS,
        }
        outputs = experts.width if launch.is_first else experts.hidden
        grid = (sizes.num_tiles, -(-outputs // tile.outputs))
        if launch.is_first:
            up_kernel[grid](
                x,
                experts.table,
                order,
                tiles,
                counts,
                inner,
                sizes.num_tiles,
                x.stride(0),
                outputs,
                CHOICES=sizes.choices,
                GATE=launch.kinds[0],
                UP=launch.kinds[1],
                ALPHA=activation.alpha,
                OFFSET=activation.offset,
                LIMIT=activation.limit,
                IS_GELU=activation.is_gelu,
                LIMITS_LAST=activation.limits_last,
                **common,
            )
        else:
            (kind,) = launch.kinds
            down_kernel[grid](
                inner, experts.table, order, tiles, counts, outer, sizes.num_tiles, outputs, KIND=kind, **common
            )


def _variants() -> Iterator[Variant]:
    """What a layer of Qwen3-30B-A3B launches: 128 experts of 768 × 2048, 8 for each token."""
    for tokens in (1, 512):
        sizes = Sizes(tokens, 8, 128)
        constants = {
            "NUM": 128,
            "WIDTH": 128,
            "LAUNCHES": 4,
            "FIRSTS": 2,
            "TILE_ROWS": sizes.rows,
            "BLOCK": _SORT_BLOCK,
        }
        signature = {"ids": "*i64", "table": "*i64", "order": "*i32", "tiles": "*i32", "counts": "*i32"}
        signature |= {"num_slots": "i32", "num_tiles": "i32"}
        yield Variant(f"sort, tokens={tokens}", sort_kernel, signature, constants)
    signature = {"outer": "*bf16", "ids": "*i64", "gate_weights": "*fp32", "out": "*bf16", "width": "i32"}
    yield Variant("sum of experts", sum_kernel, signature, {"CHOICES": 8, "BLOCK": 1024})
    for name, kind in PUBLISHED.items():
        for tokens in (1, 16, 64, 512) if name in COMMON else (1, 512):
            yield _up_variant(f"gate and up {name}, tokens={tokens}", (kind, kind), Sizes(tokens, 8, 128))
            yield _down_variant(f"down {name}, tokens={tokens}", kind, Sizes(tokens, 8, 128))
    yield _up_variant("gate int4 and up bf16, tokens=1", (PUBLISHED["int4"], PUBLISHED["bf16"]), Sizes(1, 8, 128))
    of_gpt_oss = {"HAS_BIAS": True, "ALPHA": 1.702, "OFFSET": 1.0, "LIMIT": 7.0}
    for name, change in (("biases, limits", of_gpt_oss), ("GELU", {"IS_GELU": True})):
        kinds = (PUBLISHED["MXFP4"], PUBLISHED["MXFP4"])
        yield _up_variant(f"gate and up MXFP4, {name}, tokens=1", kinds, Sizes(1, 8, 128), change)


_COMMON = {"table": "*i64", "order": "*i32", "tiles": "*i32", "counts": "*i32", "num_tiles": "i32", "outputs": "i32"}


def _up_variant(
    name: str, kinds: tuple[Kind, Kind], sizes: Sizes, change: Mapping[str, object] = MappingProxyType({})
) -> Variant:
    kinds = (kinds[0].of(2048), kinds[1].of(2048))
    gate, up = (in_steps(kind, step_of(kinds)) for kind in kinds)
    tile = tile_for(sizes.rows, gate, up)
    constants = _constants(tile) | {"CHOICES": sizes.choices, "GATE": gate, "UP": up}
    constants |= {"ALPHA": 1.0, "OFFSET": 0.0, "LIMIT": None, "IS_GELU": False, "LIMITS_LAST": False}
    signature = _COMMON | {"x": "*bf16", "inner": "*bf16", "stride": "i32"}
    return Variant(name, up_kernel, signature, {**constants, **change}, tile.num_warps, tile.num_stages)


def _down_variant(name: str, kind: Kind, sizes: Sizes) -> Variant:
    kind = in_steps(kind.of(768), step_of([kind.of(768)]))
    tile = tile_for(sizes.rows, kind)
    signature = _COMMON | {"inner": "*bf16", "outer": "*bf16"}
    constants = _constants(tile) | {"KIND": kind}
    return Variant(name, down_kernel, signature, constants, tile.num_warps, tile.num_stages)


def _constants(tile: Tile) -> dict[str, object]:
    kept = {"TILE_ROWS": tile.rows, "TILE_OUTPUTS": tile.outputs, "COMPUTE": tl.bfloat16}
    return kept | {"LAUNCH": 0, "NUM": 128, "HAS_BIAS": False}


VARIANTS = tuple(_variants())
