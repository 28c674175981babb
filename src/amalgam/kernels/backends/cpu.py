"""Runs a program with the compiled CPU kernels, the whole step in one call where every instruction has one.

In: a `Program` whose weights are in panels. Out: `CpuProgram`, which gives, bit for bit, what the operators of
`amalgam.kernels.ops` give one by one wherever those are compiled. Must never know: names, plans, requests.

Between two products a layer's many small calls would fetch Python's code and data back into caches that the weights
have just filled: with one sequence that was a fifth of a step. An instruction that the extension cannot take, because a
weight is in a layout that it does not know or because it is a `Call`, goes through the interpreter, and the program
goes on in the extension behind it.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from amalgam.kernels import attention, native, panels
from amalgam.kernels.backends.base import Compiled, Tables
from amalgam.kernels.backends.interpreter import Frame, Interpreted, execute, latent_matrices, name_of
from amalgam.kernels.packed import PackedWeight
from amalgam.kernels.program import (
    Add,
    Attend,
    AttendLatent,
    Clamp,
    Embed,
    Gelu,
    Head,
    Instruction,
    Mix,
    Normalize,
    Program,
    Project,
    Route,
    Rows,
    ScaleBySigmoid,
    SwiGlu,
)
from amalgam.kernels.reference import unpack_dense
from amalgam.kernels.step import Cache, StepContext

if TYPE_CHECKING:
    from amalgam import _native

_ALIGNMENT = 64  # bytes, of every buffer
_Columns = tuple[int, int, int, int]
_LatentMatrices = tuple[list["_native.Matrix"], list["_native.Matrix"]]


@dataclass(eq=False)
class _Memory:
    """A KV cache as the extension sees it."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    block_size: int
    native: _native.StepMemory


@dataclass(eq=False)
class _Kept:
    """What steps of all programs write to, one step after the other; it grows to what the largest needs."""

    arena: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    logits: Tensor = field(default_factory=lambda: torch.empty((0, 0)))
    expert_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    gate_weights: Tensor = field(default_factory=lambda: torch.empty(0))
    shape: tuple[int, int] = (0, 0)  # of the logits: to ask a tensor takes 30 µs where nothing is in the caches
    routing: tuple[int, int, int] = (0, 0, 0)


class CpuBackend:
    """See `Backend`. What its programs write to is kept here, so that the first step of a new version finds it."""

    def __init__(self, dtype: torch.dtype, tables: Tables) -> None:
        """
        Raises:
            ValueError: tables of other types or shapes than `choose_backend` says.
        """
        for pair in tables:
            if any(t.dtype is not torch.float32 or t.dim() != 2 or t.shape != pair[0].shape for t in pair):
                raise ValueError(f"rotary tables of {[(t.dtype, tuple(t.shape)) for t in pair]}")
        self.dtype = dtype
        self.tables = [(cos.contiguous(), sin.contiguous()) for cos, sin in tables]
        self.kept = _Kept()
        self.num_threads = torch.get_num_threads
        self._memory: _Memory | None = None
        self._latent: WeakKeyDictionary[PackedWeight, _LatentMatrices] = WeakKeyDictionary()

    def compile(self, program: Program) -> Compiled:
        if len({route.k for route in program.routes}) > 1:
            return Interpreted(program, self.dtype, self.tables)
        return CpuProgram(self, program)

    def memory(self, kv: Cache) -> _Memory:
        """The cache as the extension sees it. It should be the same object in every step: another is looked at anew.

        Raises:
            ValueError: tensors of different lengths, of another type than the activations, or not dense.
        """
        known = self._memory
        if (
            known is None
            or known.keys is not kv.keys
            or known.values is not kv.values
            or known.block_size != kv.block_size
        ):
            known = self._memory = self._look_at(kv)
        return known

    def _look_at(self, kv: Cache) -> _Memory:
        from amalgam import _native

        tensors = (*kv.keys, *kv.values)
        num_slots = len(kv.keys[0])
        for cache in tensors:
            if not (cache.is_cpu and cache.dtype is self.dtype and cache.is_contiguous() and len(cache) == num_slots):
                raise ValueError(f"a cache of {cache.dtype} {tuple(cache.shape)} for activations of {self.dtype}")
        memory = _native.StepMemory(
            [(key.data_ptr(), value.data_ptr()) for key, value in zip(kv.keys, kv.values, strict=True)],
            num_slots,
            kv.block_size,
            [(cos.data_ptr(), sin.data_ptr(), cos.shape[1]) for cos, sin in self.tables],
            min((len(cos) for cos, _ in self.tables), default=sys.maxsize),
        )
        return _Memory(kv.keys, kv.values, kv.block_size, memory)

    def latent_matrices(self, one: AttendLatent) -> _LatentMatrices | None:
        """Each head's projections as panels, shared by the versions that share the weight; None where none fit."""
        found = self._latent.get(one.expand)
        if found is None:
            to_keys, to_values = latent_matrices(one, self.dtype)
            found = _in_panels(to_keys.transpose(1, 2)), _in_panels(to_values)
            if None in found[0] or None in found[1]:
                return None
            self._latent[one.expand] = found
        return found


class CpuProgram:
    """See `Compiled`. Keeps alive what it needs of the weights."""

    def __init__(self, backend: CpuBackend, program: Program) -> None:
        from amalgam import _native

        self._backend = backend
        self._program = program
        self._buffers = program.buffers
        self._index = {name: index for index, name in enumerate(self._buffers)}
        num_active = program.routes[0].k if program.routes else 1
        self._native = _native.Program(list(self._buffers.values()), num_active)
        self._kernels, self._attention = native.kernels(), attention.table(native.isa())
        self._num_active = num_active
        self._vocab_size = program.head.weight.shape[0]
        self._caches = {
            one.layer_id: _cache_shape(one) for one in program.instructions if isinstance(one, Attend | AttendLatent)
        }
        self._memory: _Memory | None = None  # that has been found to fit
        self._addresses: list[int] = []  # of the buffers, for so many tokens in this arena
        self._placed: tuple[int, Tensor | None] = (-1, None)
        # In order: instructions [first, end) of the native program, or one for the interpreter with its last route.
        self._parts: list[tuple[int, int] | tuple[Instruction, int]] = []
        self._natives: set[int] = set()
        self._num_routes = 0
        for number, instruction in enumerate(program.instructions):
            self._add(number, instruction)

    def _add(self, number: int, instruction: Instruction) -> None:
        first = self._native.num_instructions
        if isinstance(instruction, Route):
            self._num_routes += 1
        encode = _ENCODERS.get(type(instruction))
        if encode is None or not encode(self, instruction):
            self._parts.append((instruction, self._num_routes - 1))
            return
        self._natives.add(number)
        end = self._native.num_instructions
        last = self._parts[-1] if self._parts else None
        if last is not None and isinstance(last[0], int):
            self._parts[-1] = (last[0], end)
        else:
            self._parts.append((first, end))

    @property
    def is_one_call(self) -> bool:
        """Whether the extension runs the whole step."""
        return len(self._natives) == len(self._program.instructions)

    def describe(self) -> dict[str, str]:
        counts: dict[str, Counter[str]] = {}
        for number, instruction in enumerate(self._program.instructions):
            runs = f"native ({native.isa()})" if number in self._natives else "torch"
            counts.setdefault(name_of(instruction), Counter())[runs] += 1
        return {
            name: next(iter(found)) if len(found) == 1 else ", ".join(f"{who}: {n}" for who, n in found.items())
            for name, found in counts.items()
        }

    def run(self, step: StepContext) -> Tensor:
        backend, sequences, observer = self._backend, step.sequences, step.observer
        memory = backend.memory(step.kv)
        if memory is not self._memory:
            self._check(memory)
            self._memory = memory
        tokens = rows = 0
        for token_ids, _, _, num_logits in sequences:
            tokens += len(token_ids)
            rows += min(num_logits, len(token_ids))
        kept = backend.kept
        if kept.shape != (rows, self._vocab_size):
            kept.logits, kept.shape = torch.empty((rows, self._vocab_size)), (rows, self._vocab_size)
        logits = kept.logits
        if not tokens:
            return logits
        expert_ids, gate_weights = self._routing(tokens, is_kept=observer is None)
        arguments = (
            self._kernels,
            self._attention,
            memory.native,
            sequences,
            native.native_dtype(backend.dtype),
            self._place(tokens),
            expert_ids.data_ptr(),
            gate_weights.data_ptr(),
            logits.data_ptr(),
            rows,
            backend.num_threads(),
        )
        frame: _CpuFrame | None = None
        for part in self._parts:
            first, end = part
            if isinstance(first, int):
                self._native.run(first, end, *arguments)
                continue
            if frame is None:
                frame = _CpuFrame(step, self, expert_ids, gate_weights, tokens)
            frame.execute(first, end)
        if frame is not None and frame.logits is not None:
            logits = frame.logits
        if observer is not None and self._num_routes:
            observer.observe_all(expert_ids, gate_weights)
        return logits

    def view(self, rows: Rows, tokens: int) -> Tensor:
        """`[tokens, width]` of the arena as `run` has laid it out."""
        arena = self._backend.kept.arena
        start = self._addresses[self._index[rows.buffer]] - arena.data_ptr()
        dtype = torch.float32 if rows.is_wide else self._backend.dtype
        whole = arena[start : start + tokens * rows.stride * dtype.itemsize].view(dtype).view(tokens, rows.stride)
        return whole[:, rows.start : rows.start + rows.width]

    @property
    def tables(self) -> Tables:
        return self._backend.tables

    @property
    def dtype(self) -> torch.dtype:
        return self._backend.dtype

    def _routing(self, tokens: int, *, is_kept: bool) -> tuple[Tensor, Tensor]:
        """Room for ids and gate weights, `[routes, tokens, k]`: new for an observer, who keeps them."""
        kept, shape = self._backend.kept, (self._num_routes, tokens, self._num_active)
        if not is_kept:
            return torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        if kept.routing != shape:
            kept.expert_ids, kept.gate_weights = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
            kept.routing = shape
        return kept.expert_ids, kept.gate_weights

    def _place(self, tokens: int) -> list[int]:
        """Addresses of the buffers for so many tokens."""
        kept = self._backend.kept
        if self._placed[0] == tokens and self._placed[1] is kept.arena:
            return self._addresses
        starts, size = [], 0
        for width, is_wide in self._buffers.values():
            starts.append(size)
            nbytes = tokens * width * (4 if is_wide else self.dtype.itemsize)
            size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if kept.arena.nbytes < size + _ALIGNMENT:
            kept.arena = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        base = -(-kept.arena.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self._addresses = [base + start for start in starts]
        self._placed = tokens, kept.arena
        return self._addresses

    def _check(self, memory: _Memory) -> None:
        """
        Raises:
            ValueError: caches of other shapes than the layers need, or rotary tables that are missing or too wide.
        """
        for layer_id, (key_shape, value_shape, rope, rope_dim) in self._caches.items():
            if layer_id >= len(memory.keys):
                raise ValueError(f"{len(memory.keys)} caches, and layer {layer_id} needs one")
            found = memory.keys[layer_id].shape[1:], memory.values[layer_id].shape[1:]
            if found != (key_shape, value_shape):
                raise ValueError(f"caches of {found} where layer {layer_id} needs {(key_shape, value_shape)}")
            if rope is None:
                continue
            if rope >= len(self.tables) or not 0 < 2 * self.tables[rope][0].shape[1] <= rope_dim:
                raise ValueError(f"layer {layer_id} has no rotary table of at most {rope_dim // 2} columns")

    # --- One method per instruction: adds it to the native program, or says that it cannot ---

    def _columns(self, rows: Rows) -> _Columns:
        return self._index[rows.buffer], rows.stride, rows.start, rows.width

    def _embed(self, one: Embed) -> bool:
        weight = one.weight
        is_dense = weight.layout == "dense" and weight.dense.dtype in native.NAMES
        if weight.native is None and not is_dense:
            return False
        rows = weight.dense.contiguous() if is_dense else None
        self._native.add_embed(weight.native, rows, self._columns(one.out), one.by_position, one.adds)
        return True

    def _normalize(self, one: Normalize) -> bool:
        weight, bias = _vector(one.weight), _vector(one.bias)
        if bias is not None and bias.dtype is not weight.dtype:
            weight, bias = weight.float(), bias.float()
        delta = None if one.delta is None else self._columns(one.delta)
        x, out = self._columns(one.x), self._columns(one.out)
        self._native.add_normalize(x, weight, bias, delta, out, one.eps, one.rounds_last)
        return True

    def _project(self, one: Project) -> bool:
        if any(projection.weight.native is None for projection in one.projections):
            return False
        projections = [(p.weight.native, _vector(p.bias), self._columns(p.out)) for p in one.projections]
        self._native.add_project(self._columns(one.x), projections, one.widens)
        return True

    def _attend(self, one: Attend) -> bool:
        query_norm, key_norm = one.head_norms or (None, None)
        if query_norm is not None and key_norm is not None and query_norm.dtype is not key_norm.dtype:
            query_norm, key_norm = query_norm.float(), key_norm.float()
        self._native.add_attend(
            [self._columns(rows) for rows in (one.query, one.key, one.value, one.out)],
            one.layer_id,
            one.num_heads,
            one.num_kv_heads,
            one.head_dim,
            _vector(query_norm),
            _vector(key_norm),
            one.head_norm_eps,
            one.scale,
            one.window or 0,
            _wide(one.sinks),
            -1 if one.rope is None else one.rope,
        )
        return True

    def _attend_latent(self, one: AttendLatent) -> bool:
        matrices = self._backend.latent_matrices(one)
        if matrices is None:
            return False
        self._native.add_attend_latent(
            [self._columns(rows) for rows in (one.query, one.compressed, one.out)],
            one.layer_id,
            *matrices,
            _vector(one.norm),
            one.norm_eps,
            one.scale,
            one.rope_dim,
            one.rope,
            one.is_interleaved,
        )
        return True

    def _route(self, one: Route) -> bool:
        from amalgam import _native

        if one.weight.native is None:
            return False
        self._native.add_route(
            self._columns(one.x),
            one.weight.native,
            _vector(one.bias),
            _wide(one.correction),
            _native.Scoring[one.scoring],
            one.num_groups,
            one.num_kept,
            one.normalises,
            one.sum_eps,
            one.scaling,
            one.jitter,
            self._num_routes - 1,
        )
        return True

    def _mix(self, one: Mix) -> bool:
        if not panels.supports_moe(torch.empty(0), one.experts):
            return False
        activation = one.activation
        self._native.add_mix(
            self._columns(one.x),
            panels.native_experts(one.experts),
            self._columns(one.out),
            activation.alpha,
            activation.offset,
            math.inf if activation.limit is None else activation.limit,
            self._num_routes - 1,
        )
        return True

    def _swiglu(self, one: SwiGlu) -> bool:
        self._native.add_swiglu(*(self._columns(rows) for rows in (one.gate, one.up, one.out)))
        return True

    def _elementwise(self, one: Add | Clamp | Gelu) -> bool:
        from amalgam import _native

        y = self._columns(one.y) if isinstance(one, Add) else None
        limit = one.limit if isinstance(one, Clamp) else 0.0
        kind = _native.Elementwise[type(one).__name__.lower()]
        self._native.add_elementwise(kind, self._columns(one.x), y, limit)
        return True

    def _scale_by_sigmoid(self, one: ScaleBySigmoid) -> bool:
        self._native.add_scale(self._columns(one.x), self._columns(one.gate))
        return True

    def _head(self, one: Head) -> bool:
        if one.weight.native is None:
            return False
        self._native.add_head(self._columns(one.x), one.weight.native, _vector(one.bias))
        return True


_ENCODERS: dict[type[Instruction], Callable[[CpuProgram, Any], bool]] = {
    Add: CpuProgram._elementwise,
    Attend: CpuProgram._attend,
    AttendLatent: CpuProgram._attend_latent,
    Clamp: CpuProgram._elementwise,
    Embed: CpuProgram._embed,
    Gelu: CpuProgram._elementwise,
    Head: CpuProgram._head,
    Mix: CpuProgram._mix,
    Normalize: CpuProgram._normalize,
    Project: CpuProgram._project,
    Route: CpuProgram._route,
    ScaleBySigmoid: CpuProgram._scale_by_sigmoid,
    SwiGlu: CpuProgram._swiglu,
}


class _CpuFrame(Frame):
    """The interpreter's view of a step whose other instructions run in the extension: buffers are in its arena."""

    def __init__(
        self, step: StepContext, program: CpuProgram, expert_ids: Tensor, gate_weights: Tensor, tokens: int
    ) -> None:
        super().__init__(step, program.dtype, program.tables)
        self._program = program
        self._expert_ids, self._gate_weights = expert_ids, gate_weights
        self._tokens = tokens
        self._route_index = -1

    def execute(self, instruction: Instruction, route_index: int) -> None:
        """Run one instruction behind so many routes."""
        self._route_index = route_index
        if isinstance(instruction, Mix):
            self.routing = self._expert_ids[route_index], self._gate_weights[route_index]
        execute(instruction, self)

    def get(self, rows: Rows) -> Tensor:
        return self._program.view(rows, self._tokens)

    def put(self, rows: Rows, value: Tensor) -> None:
        view = self._program.view(rows, self._tokens)
        if view.data_ptr() != value.data_ptr():
            view.copy_(value)

    def route(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self._expert_ids[self._route_index].copy_(expert_ids)
        self._gate_weights[self._route_index].copy_(gate_weights)


def _cache_shape(one: Attend | AttendLatent) -> tuple[torch.Size, torch.Size, int | None, int]:
    """Of keys and values without the slots; which rope turns how many dimensions at most."""
    if isinstance(one, Attend):
        shape = torch.Size((one.num_kv_heads, one.head_dim))
        return shape, shape, one.rope, one.head_dim
    return torch.Size((1, one.latent_dim + one.rope_dim)), torch.Size((1, 0)), one.rope, one.rope_dim


def _in_panels(matrices: Tensor) -> list[Any]:
    """Each of `[heads, rows, columns]` as the extension knows it, None where it cannot be packed."""
    weights = (
        PackedWeight("dense", tuple(matrix.shape), {"weight": matrix.contiguous()}, unpack_dense) for matrix in matrices
    )
    return [panels.prepare(weight, codes=False).native for weight in weights]


def _vector(vector: Tensor | None) -> Any:
    """A bias or a norm in a type that the extension reads; widening a float16 is exact."""
    if vector is None:
        return None
    return (vector if vector.dtype in native.FLOAT_TYPES else vector.float()).contiguous()


def _wide(vector: Tensor | None) -> Any:
    return None if vector is None else vector.float().contiguous()
