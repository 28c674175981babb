"""What the compiled extension offers; used by amalgam.kernels and its benchmarks only.

Arrays are addresses; 0 means none. Every call that computes releases the GIL.
"""

from collections.abc import Sequence
from enum import Enum
from typing import final

from torch import Tensor

class DType(Enum):
    float32 = 0
    bfloat16 = 1
    float16 = 2

class Format(Enum):
    int4 = 0
    int8 = 1
    fp8 = 2
    bf16 = 3
    fp16 = 4
    fp32 = 5
    bf16_coded = 6

@final
class Matrix:
    @property
    def memory(self) -> Tensor: ...
    @property
    def format(self) -> Format: ...
    @property
    def scale_lanes(self) -> int: ...
    @property
    def scale_offset(self) -> int: ...
    @property
    def zero_offset(self) -> int: ...

@final
class Experts:
    def add(self, gate: Matrix, up: Matrix, down: Matrix, gate_bias: int, up_bias: int, down_bias: int) -> None: ...

@final
class Kernels:
    @property
    def isa(self) -> str: ...
    # By position: matching names costs time in every layer of every step.
    def rms_norm(
        self,
        x: int,
        delta: int,
        total: int,
        weight: int,
        out: int,
        rows: int,
        hidden: int,
        eps: float,
        x_dtype: DType,
        weight_dtype: DType,
        threads: int,
    ) -> None: ...
    def rotate(
        self,
        x: int,
        cos: int,
        sin: int,
        out: int,
        tokens: int,
        token_stride: int,
        heads: int,
        head_dim: int,
        half: int,
        dtype: DType,
        threads: int,
    ) -> None: ...
    def swiglu(self, gate: int, up: int, out: int, elements: int, dtype: DType, threads: int) -> None: ...
    def unpack(self, weight: Matrix, out: int, threads: int) -> None: ...
    def embedding(
        self, weight: Matrix, row_ids: int, num_ids: int, out: int, out_dtype: DType, threads: int
    ) -> None: ...
    def linear(
        self,
        x: int,
        rows: int,
        x_dtype: DType,
        outputs: Sequence[tuple[object, int, DType, int]],
        out_dtype: DType,
        threads: int,
    ) -> None:
        """`outputs`: weight, bias, type of the bias, where the product goes."""

    def route(
        self,
        weight: Matrix,
        x: int,
        rows: int,
        x_dtype: DType,
        k: int,
        normalises: bool,
        sum_eps: float,
        ids: int,
        gate_weights: int,
        threads: int,
    ) -> None: ...
    def moe(
        self,
        experts: Experts,
        x: int,
        expert_ids: int,
        gate_weights: int,
        out: int,
        tokens: int,
        num_active: int,
        alpha: float,
        offset: float,
        limit: float,
        x_dtype: DType,
        threads: int,
    ) -> None: ...

def pack(
    format: Format,
    rows: int,
    columns: int,
    weight: int,
    scale: int,
    scale_dtype: DType,
    scale_rows: int,
    scale_columns: int,
    block_rows: int,
    block_columns: int,
    zero: int,
    order: int,
    quantizes: bool,
    codes: bool,
) -> Matrix | None: ...
def most_coded_bytes(rows: int, columns: int) -> int: ...
def draw(
    kernels: Kernels,
    logits: int,
    vocabulary: int,
    rows: Sequence[tuple[tuple[int, float, float, float], int, int]],
    threads: int,
) -> list[int]: ...
def view(
    format: Format,
    rows: int,
    columns: int,
    memory: int,
    nbytes: int,
    scale_dtype: DType,
    num_groups: int,
    group: int,
    scale_lanes: int,
    has_zero: bool,
    order: int,
    quantizes: bool,
    owner: object,
) -> Matrix: ...

layout_version: int

def checksum(weights: list[Matrix], threads: int) -> int: ...

@final
class AttentionPlan:
    def __init__(
        self,
        query_starts: int,
        context_lengths: int,
        num_sequences: int,
        block_tables: int,
        table_stride: int,
        num_blocks: int,
        block_size: int,
        /,
    ) -> None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_slots(self) -> int: ...

@final
class AttentionKernels:
    @property
    def isa(self) -> str: ...
    def attend(
        self,
        plan: AttentionPlan,
        query: int,
        query_is_bfloat16: bool,
        query_token_stride: int,
        query_head_stride: int,
        heads: int,
        keys: int,
        keys_are_bfloat16: bool,
        key_slot_stride: int,
        key_head_stride: int,
        key_dim: int,
        values: int,
        values_are_bfloat16: bool,
        value_slot_stride: int,
        value_head_stride: int,
        value_dim: int,
        kv_heads: int,
        out: int,
        scale: float,
        window: int,
        sinks: int,
        threads: int,
        /,
    ) -> None: ...
    def attend_cached(
        self,
        kernels: Kernels,
        plan: AttentionPlan,
        query: int,
        query_stride: int,
        key: int,
        key_stride: int,
        value: int,
        value_stride: int,
        is_bfloat16: bool,
        heads: int,
        kv_heads: int,
        dim: int,
        value_dim: int,
        query_norm: int,
        key_norm: int,
        norm_is_bfloat16: bool,
        eps: float,
        cos: int,
        sin: int,
        half: int,
        keys: int,
        values: int,
        slot_ids: int,
        num_slots: int,
        out: int,
        scale: float,
        window: int,
        sinks: int,
        threads: int,
        /,
    ) -> None: ...

class Scoring(Enum):
    softmax = 0
    sigmoid = 1
    chosen = 2
    mixer = 3

class Elementwise(Enum):
    add = 0
    clamp = 1
    gelu = 2

@final
class StepMemory:
    def __init__(
        self,
        caches: Sequence[tuple[int, int]],
        num_slots: int,
        block_size: int,
        ropes: Sequence[tuple[int, int, int]],
        num_positions: int,
        /,
    ) -> None: ...

# Index of a buffer, stride, first column, columns.
_Columns = tuple[int, int, int, int]

@final
class Program:
    """Instructions over buffers. Arrays are kept alive; a ValueError says what does not fit together."""

    def __init__(self, buffers: Sequence[tuple[int, bool]], num_active: int, /) -> None:
        """`buffers`: elements per token, and whether they are always float32."""

    @property
    def num_instructions(self) -> int: ...
    def add_embed(
        self, matrix: object, rows: Tensor | None, out: _Columns, by_position: bool, adds: bool, /
    ) -> None: ...
    def add_normalize(
        self,
        x: _Columns,
        weight: Tensor,
        bias: Tensor | None,
        delta: _Columns | None,
        out: _Columns,
        eps: float,
        rounds_last: bool,
        /,
    ) -> None: ...
    def add_project(
        self, x: _Columns, projections: Sequence[tuple[object, Tensor | None, _Columns]], widens: bool, /
    ) -> None: ...
    def add_attend(
        self,
        rows: Sequence[_Columns],
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        head_norm_eps: float,
        scale: float,
        window: int,
        sinks: Tensor | None,
        rope: int,
        /,
    ) -> None:
        """`rows`: query, key, value, out."""

    def add_attend_latent(
        self,
        rows: Sequence[_Columns],
        layer: int,
        to_keys: Sequence[Matrix],
        to_values: Sequence[Matrix],
        norm: Tensor,
        eps: float,
        scale: float,
        rope_dim: int,
        rope: int,
        is_interleaved: bool,
        /,
    ) -> None:
        """`rows`: query, compressed, out."""

    def add_route(
        self,
        x: _Columns,
        matrix: object,
        bias: Tensor | None,
        correction: Tensor | None,
        scoring: Scoring,
        num_groups: int,
        num_kept: int,
        normalises: bool,
        sum_eps: float,
        scaling: float,
        jitter: float,
        index: int,
        /,
    ) -> None: ...
    def add_mix(
        self,
        x: _Columns,
        experts: Experts,
        out: _Columns,
        alpha: float,
        offset: float,
        limit: float,
        route: int,
        /,
    ) -> None: ...
    def add_swiglu(self, gate: _Columns, up: _Columns, out: _Columns, /) -> None: ...
    def add_elementwise(self, kind: Elementwise, x: _Columns, y: _Columns | None, limit: float, /) -> None: ...
    def add_scale(self, x: _Columns, gate: _Columns, /) -> None: ...
    def add_head(self, x: _Columns, matrix: object, bias: Tensor | None, /) -> None: ...
    def run(
        self,
        first: int,
        end: int,
        kernels: Kernels,
        attention: AttentionKernels,
        memory: StepMemory,
        sequences: Sequence[tuple[Sequence[int], int, Sequence[int], int]],
        dtype: DType,
        buffers: Sequence[int],
        expert_ids: int,
        gate_weights: int,
        logits: int,
        num_logits: int,
        threads: int,
        /,
    ) -> None:
        """`sequences`: token ids, first position, block ids, how many of the last tokens' logits are wanted."""

def attention_kernels(isa: str, /) -> AttentionKernels: ...
def read_memory(address: int, nbytes: int, threads: int, /) -> int: ...
def write_kv(
    key: int,
    key_stride: int,
    keys: int,
    keys_stride: int,
    key_bytes: int,
    value: int,
    value_stride: int,
    values: int,
    values_stride: int,
    value_bytes: int,
    slot_ids: int,
    num_tokens: int,
    num_slots: int,
    threads: int,
    /,
) -> None: ...
def supported_isas() -> list[str]: ...
def kernels(isa: str) -> Kernels: ...
