"""A program's instructions as those of the extension.

In: instructions whose weights are in panels. Out: a native program. Must never know: names, plans, requests, steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension, panels
from amalgam.kernels.backends.cpu.elementwise import numbers_of
from amalgam.kernels.backends.cpu.panels import PanelWeight
from amalgam.kernels.backends.cpu.products import PanelExperts, matrix_of
from amalgam.kernels.backends.reference.latent import latent_matrices
from amalgam.kernels.layouts import DENSE
from amalgam.kernels.program import (
    Add,
    Attend,
    AttendLatent,
    Clamp,
    Convolve,
    DeltaRule,
    Embed,
    Gelu,
    Head,
    Instruction,
    KeepIndexKey,
    Mix,
    Normalize,
    Program,
    Project,
    Route,
    Rows,
    Scale,
    ScaleByPosition,
    ScaleBySigmoid,
    ScaleHeads,
    ScanStates,
    Split,
    SwiGlu,
    WeighInput,
)
from amalgam.kernels.weights import PackedWeight

if TYPE_CHECKING:
    from amalgam import _native

_Columns = tuple[int, int, int, int]
# Of each head: the projection of a query into the latent space, and the one of a result out of it.
LatentMatrices = tuple[list["_native.Matrix"], list["_native.Matrix"]]


class Encoder:
    """Adds instructions to a native program, which keeps alive what it needs of the weights.

    Attributes:
        program: whose buffers there are.
        native: what has been added.
        index: of each buffer in it.
        num_routes: how many `Route`s have been seen.
    """

    def __init__(
        self, program: Program, dtype: torch.dtype, latent: WeakKeyDictionary[PackedWeight, LatentMatrices]
    ) -> None:
        """
        Args:
            latent: the matrices of `AttendLatent`s that have been packed, to be looked up and added to.
        """
        from amalgam import _native

        self.program = program
        self.index: Mapping[str, int] = {name: index for index, name in enumerate(program.buffers)}
        self.num_routes = 0
        num_active = program.routes[0].k if program.routes else 1
        self.native = _native.Program(list(program.buffers.values()), num_active)
        self._dtype = dtype
        self._latent = latent

    def add(self, instruction: Instruction) -> bool:
        """Add one instruction, if the extension can take it; one that it cannot is for the interpreter.

        Raises:
            ValueError, KeyError: it does not fit together, or not with the program's buffers.
        """
        if isinstance(instruction, Route):
            self.num_routes += 1
        encode = _ENCODERS.get(type(instruction))
        return encode is not None and encode(self, instruction)

    def _columns(self, rows: Rows) -> _Columns:
        return self.index[rows.buffer], rows.stride, rows.start, rows.width

    def _embed(self, one: Embed) -> bool:
        weight, matrix, rows = one.weight, None, None
        if isinstance(weight, PanelWeight):
            matrix = weight.matrix
        elif weight.layout is DENSE and weight.dense.dtype in extension.NAMES:
            rows = weight.dense.contiguous()
        else:
            return False
        self.native.add_embed(matrix, rows, self._columns(one.out), one.by_position, one.adds)
        return True

    def _normalize(self, one: Normalize) -> bool:
        if one.x.width != one.out.width:
            raise ValueError(f"{one.x.width} elements of a row are normalized into {one.out.width}.")
        if not (one.x.is_whole and one.out.is_whole):
            return False
        weight, bias = _vector(one.weight), _vector(one.bias)
        if bias is not None and bias.dtype is not weight.dtype:
            weight, bias = weight.float(), bias.float()
        delta = None if one.delta is None else self._columns(one.delta)
        x, out = self._columns(one.x), self._columns(one.out)
        self.native.add_normalize(x, weight, bias, delta, out, one.eps, one.rounds_last)
        return True

    def _project(self, one: Project) -> bool:
        if not all(isinstance(projection.weight, PanelWeight) for projection in one.projections):
            return False
        projections = [(matrix_of(p.weight), _vector(p.bias), self._columns(p.out)) for p in one.projections]
        self.native.add_project(self._columns(one.x), projections, one.widens)
        return True

    def _attend(self, one: Attend) -> bool:
        query_norm, key_norm = one.head_norms or (None, None)
        if query_norm is not None and key_norm is not None and query_norm.dtype is not key_norm.dtype:
            query_norm, key_norm = query_norm.float(), key_norm.float()
        self.native.add_attend(
            [self._columns(rows) for rows in (one.query, one.key, one.value, one.out)],
            one.layer_id,
            one.num_heads,
            one.num_kv_heads,
            one.head_dim,
            _vector(query_norm),
            _vector(key_norm),
            one.head_norm_eps,
            one.scale,
            one.window,
            _wide(one.sinks),
            -1 if one.rope is None else one.rope,
            one.softcap,
            one.rounds_last,
            one.is_interleaved,
            one.norms_last,
            one.chunk,
        )
        return True

    def _attend_latent(self, one: AttendLatent) -> bool:
        if one.norm is None or (matrices := self._latent_matrices(one)) is None:
            return False
        self.native.add_attend_latent(
            [self._columns(rows) for rows in (one.query, one.compressed, one.out)],
            one.layer_id,
            *matrices,
            _vector(one.norm),
            one.norm_eps,
            one.scale,
            one.rope_dim,
            -1 if one.rope is None else one.rope,
            one.is_interleaved,
            one.is_indexed,
        )
        return True

    def _keep_index_key(self, one: KeepIndexKey) -> bool:
        rope = -1 if one.rope is None else one.rope
        self.native.add_keep_index_key(self._columns(one.key), one.layer_id, rope, one.is_interleaved)
        return True

    def _route(self, one: Route) -> bool:
        from amalgam import _native

        if not isinstance(one.weight, PanelWeight):
            return False
        self.native.add_route(
            self._columns(one.x),
            one.weight.matrix,
            _vector(one.bias),
            _wide(one.correction),
            _native.Scoring[one.scoring],
            one.num_groups,
            one.num_kept,
            one.normalises,
            one.sum_eps,
            one.scaling,
            one.jitter,
            self.num_routes - 1,
            _wide(one.factors),
        )
        return True

    def _mix(self, one: Mix) -> bool:
        if not isinstance(one.experts, PanelExperts):
            return False
        x, out, numbers = self._columns(one.x), self._columns(one.out), numbers_of(one.activation)
        self.native.add_mix(x, one.experts.native, out, *numbers, self.num_routes - 1, one.weighs)
        return True

    def _weigh_input(self, one: WeighInput) -> bool:
        self.native.add_weigh_input(self._columns(one.x), self._columns(one.out), self.num_routes - 1)
        return True

    def _swiglu(self, one: SwiGlu) -> bool:
        gate, up, out = (self._columns(rows) for rows in (one.gate, one.up, one.out))
        self.native.add_swiglu(gate, up, out, *numbers_of(one.activation))
        return True

    def _elementwise(self, one: Add | Clamp | Gelu | Scale) -> bool:
        from amalgam import _native

        y, number = None, 0.0
        match one:
            case Add():
                y = self._columns(one.y)
            case Clamp():
                number = one.limit
            case Scale():
                number = torch.tensor(one.factor, dtype=self._dtype).item() if one.rounds_factor else one.factor
        kind = _native.Elementwise[type(one).__name__.lower()]
        self.native.add_elementwise(kind, self._columns(one.x), y, number)
        return True

    def _scale_by_position(self, one: ScaleByPosition) -> bool:
        self.native.add_scale_by_position(self._columns(one.x), one.beta, one.length, one.offset)
        return True

    def _scale_heads(self, one: ScaleHeads) -> bool:
        slopes, biases = (part.float().contiguous() for part in (one.slopes, one.biases))
        self.native.add_scale_heads(self._columns(one.x), slopes, biases)
        return True

    def _scale_by_sigmoid(self, one: ScaleBySigmoid) -> bool:
        add = self.native.add_scale if one.gate.width == 1 else self.native.add_gate
        add(self._columns(one.x), self._columns(one.gate))
        return True

    def _split(self, one: Split) -> bool:
        self.native.add_split(self._columns(one.x), one.num_groups, [self._columns(out) for out in one.outs])
        return True

    def _convolve(self, one: Convolve) -> bool:
        weight = one.weight.float().t().contiguous()
        before, behind = (None if rows is None else self._columns(rows) for rows in (one.before, one.behind))
        x, out = self._columns(one.x), self._columns(one.out)
        self.native.add_convolve(x, weight, _wide(one.bias), before, behind, out, one.layer_id, one.activates)
        return True

    def _delta_rule(self, one: DeltaRule) -> bool:
        rows = (one.query, one.key, one.value, one.decay, one.strength, one.out)
        self.native.add_delta_rule(
            [self._columns(part) for part in rows],
            one.layer_id,
            one.num_key_heads,
            one.num_value_heads,
            one.log_rate.float().contiguous(),
            one.decay_bias.float().contiguous(),
            one.bound or 0.0,
        )
        return True

    def _scan_states(self, one: ScanStates) -> bool:
        self.native.add_state_space(
            [self._columns(part) for part in (one.read, one.write, one.x, one.step, one.out)],
            one.layer_id,
            one.num_groups,
            one.num_heads,
            one.log_rate.float().contiguous(),
            one.step_bias.float().contiguous(),
            one.skip.float().contiguous(),
            *one.limits,
        )
        return True

    def _head(self, one: Head) -> bool:
        if not isinstance(one.weight, PanelWeight):
            return False
        self.native.add_head(self._columns(one.x), one.weight.matrix, _vector(one.bias), one.scale, one.softcap)
        return True

    def _latent_matrices(self, one: AttendLatent) -> LatentMatrices | None:
        """Each head's projections as panels, shared by the versions that share the weight; None where none fit."""
        found = self._latent.get(one.expand)
        if found is None:
            to_keys, to_values = latent_matrices(one, self._dtype)
            keys, values = _in_panels(to_keys.transpose(1, 2)), _in_panels(to_values)
            if keys is None or values is None:
                return None
            found = self._latent[one.expand] = keys, values
        return found


_ENCODERS: dict[type[Instruction], Callable[[Encoder, Any], bool]] = {
    Add: Encoder._elementwise,
    Attend: Encoder._attend,
    AttendLatent: Encoder._attend_latent,
    Clamp: Encoder._elementwise,
    Convolve: Encoder._convolve,
    DeltaRule: Encoder._delta_rule,
    Embed: Encoder._embed,
    Gelu: Encoder._elementwise,
    Head: Encoder._head,
    KeepIndexKey: Encoder._keep_index_key,
    Mix: Encoder._mix,
    Normalize: Encoder._normalize,
    Project: Encoder._project,
    Route: Encoder._route,
    Scale: Encoder._elementwise,
    ScaleByPosition: Encoder._scale_by_position,
    ScaleBySigmoid: Encoder._scale_by_sigmoid,
    ScaleHeads: Encoder._scale_heads,
    ScanStates: Encoder._scan_states,
    Split: Encoder._split,
    SwiGlu: Encoder._swiglu,
    WeighInput: Encoder._weigh_input,
}


def _in_panels(matrices: Tensor) -> list[_native.Matrix] | None:
    """Each of `[heads, rows, columns]` as the extension knows it, None where one cannot be packed."""
    weights = (PackedWeight(DENSE, tuple(matrix.shape), {"weight": matrix.contiguous()}) for matrix in matrices)
    packed = [panels.prepare(weight, codes=False) for weight in weights]
    return [matrix_of(weight) for weight in packed] if all(isinstance(w, PanelWeight) for w in packed) else None


@overload
def _vector(vector: Tensor) -> Tensor: ...
@overload
def _vector(vector: Tensor | None) -> Tensor | None: ...
def _vector(vector: Tensor | None) -> Tensor | None:
    """A bias or a norm in a type that the extension reads; widening a float16 is exact."""
    if vector is None:
        return None
    return (vector if vector.dtype in extension.FLOAT_TYPES else vector.float()).contiguous()


def _wide(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float().contiguous()
