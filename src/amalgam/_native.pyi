"""What the compiled extension offers; used by amalgam.kernels and its benchmarks only.

Tensors are on the CPU and without gaps, where nothing else is said. They are looked at in place, and checked once:
a TypeError names the argument that is no tensor, a ValueError the one of another type or shape than it must have.
Every call that computes releases the GIL. Arguments go by position where names would cost time.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import final

from torch import Tensor

class DType(Enum):
    float32 = 0
    bfloat16 = 1
    float16 = 2
    float8_e4m3fn = 4
    float8_e8m0fnu = 5

class Offset(Enum):
    none = 0
    zero = 1
    minimum = 2

class Format(Enum):
    int4 = 0
    int8 = 1
    fp8 = 2
    bf16 = 3
    fp16 = 4
    fp32 = 5
    bf16_coded = 6
    int1 = 7
    int2 = 8
    int3 = 9
    int5 = 10
    k2 = 11
    k3 = 12
    k4 = 13
    k5 = 14
    k6 = 15
    table4 = 16
    k_table4 = 17
    float_table4 = 18
    codebooks = 19

@final
class Matrix:
    @property
    def memory(self) -> Tensor: ...
    @property
    def format(self) -> Format: ...
    @property
    def scale_lanes(self) -> int: ...
    @property
    def begins(self) -> tuple[int, int, int, int, int, int]:
        """Bytes of `memory` before scales, zero points, offsets, integer scales of parts, table or books; and all."""

@final
class Experts:
    def add(
        self,
        gate: Matrix,
        up: Matrix,
        down: Matrix,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        /,
    ) -> None:
        """Biases are float32 and kept alive."""

@final
class MatrixUnit:
    int8_rows: int
    scales_weights: bool
    def run(self, format: Format, rounds: int, threads: int, /) -> int: ...

class Kernels:
    @property
    def isa(self) -> str: ...
    @property
    def unit(self) -> MatrixUnit | None: ...
    def rms_norm(
        self,
        x: Tensor,
        delta: Tensor | None,
        total: Tensor | None,
        weight: Tensor,
        out: Tensor,
        eps: float,
        threads: int,
        /,
    ) -> None:
        """x, delta, total, out: `[..., hidden]`; with a delta, x + delta goes to total first."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, threads: int, /) -> None:
        """x: `[tokens, heads, dim]`, gaps between tokens allowed; cos, sin: `[tokens, half]`."""

    def swiglu(
        self,
        gate: Tensor,
        up: Tensor,
        out: Tensor,
        alpha: float,
        offset: float,
        limit: float,
        is_gelu: bool,
        limits_last: bool,
        threads: int,
        /,
    ) -> None: ...
    def unpack(self, weight: Matrix, out: Tensor, threads: int, /) -> None: ...
    def embedding(self, weight: Matrix, row_ids: Tensor, out: Tensor, threads: int, /) -> None: ...
    def linear(self, x: Tensor, outputs: Sequence[tuple[Matrix, Tensor | None, Tensor]], threads: int, /) -> None:
        """`outputs`: weight, bias, where the product goes."""

    def route(
        self,
        weight: Matrix,
        x: Tensor,
        normalises: bool,
        sum_eps: float,
        ids: Tensor,
        gate_weights: Tensor,
        threads: int,
        /,
    ) -> None:
        """ids, gate_weights: `[rows, k]`, the results."""

    def moe(
        self,
        experts: Experts,
        x: Tensor,
        expert_ids: Tensor,
        gate_weights: Tensor,
        out: Tensor,
        alpha: float,
        offset: float,
        limit: float,
        is_gelu: bool,
        limits_last: bool,
        threads: int,
        /,
    ) -> None: ...
    def expert_outputs(
        self,
        experts: Experts,
        x: Tensor,
        expert_ids: Tensor,
        out: Tensor,
        alpha: float,
        offset: float,
        limit: float,
        is_gelu: bool,
        limits_last: bool,
        threads: int,
        /,
    ) -> None:
        """out: float32 `[rows, k, hidden]`, left alone where an id is -1."""

    def weighted_sum(
        self, outputs: Tensor, expert_ids: Tensor, gate_weights: Tensor, out: Tensor, threads: int, /
    ) -> None:
        """Outputs whose id is -1 add nothing, nor do those of `moe`."""

def pack(
    kernels: Kernels,
    format: Format,
    columns: int,
    weight: Tensor,
    scale: Tensor | None,
    scale_dtype: DType,
    block: tuple[int, int],
    zero: Tensor | None,
    offset: Tensor | None,
    offset_kind: Offset,
    part_scale: Tensor | None,
    part_minimum: Tensor | None,
    table: Tensor | None,
    order: Tensor | None,
    quantizes: bool,
    codes: bool,
    books: Tensor | None = None,
) -> Matrix | None:
    """Scales of 8 bits are given as uint8. `books`: `[codebooks, vectors, inputs]`; then `weight` has codes' bytes."""

def most_coded_bytes(rows: int, columns: int) -> int: ...

class Placement(Enum):
    anywhere = 0
    interleaved = 1
    local = 2

def place_weights(placement: Placement, nodes: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Of weights that are packed from now on. `nodes`: numbers and processors. RuntimeError: the system refuses."""

def bind_threads(processors: Sequence[Sequence[int]]) -> None:
    """The processors that each compute thread may use; thread 0 is whoever runs steps. RuntimeError: refused."""

def limit_threads(most: int) -> None:
    """The most threads that compute at the same time; 0: as many as there are processors."""

def record(work: Callable[[], object]) -> list[tuple[str, list[tuple[float, float, float, float, float]]]]:
    """What this thread's calls within `work` are cut into, when they run with `kernels("counting")`, which compute
    nothing: the kernel of each round, and of each of its items the bytes, the operations in int8, bfloat16 and
    float32, and the elements of activations."""

def draw(
    kernels: Kernels,
    logits: Tensor,
    rows: Sequence[tuple[tuple[int, float, float, float], int, int]],
    threads: int,
    /,
) -> list[int]: ...
def view(
    format: Format,
    rows: int,
    columns: int,
    memory: Tensor,
    scale_dtype: DType,
    num_groups: int,
    group: int,
    scale_lanes: int,
    has_zero: bool,
    offset_kind: Offset,
    order: Tensor | None,
    quantizes: bool,
    books: tuple[int, int, int] = (0, 0, 0),
    book_dtype: DType = ...,
) -> Matrix:
    """Keeps `memory` alive. `books`: codebooks, their vectors, inputs of a vector, where the format has them."""

layout_version: int

def checksum(weights: Sequence[Matrix], threads: int, /) -> int: ...

@final
class AttentionPlan:
    def __init__(
        self, query_starts: Tensor, context_lengths: Tensor, block_tables: Tensor, block_size: int, /
    ) -> None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_slots(self) -> int: ...

# Keys or values, and the scales of codes.
_Cache = tuple[Tensor, Tensor | None]
# Both or neither.
_Pair = tuple[Tensor, Tensor] | tuple[Tensor | None, Tensor | None]

@final
class AttentionKernels:
    @property
    def isa(self) -> str: ...
    def attend(
        self,
        plan: AttentionPlan,
        query: Tensor,
        keys: _Cache,
        values: _Cache,
        out: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
        softcap: float | None,
        chunk: int | None,
        threads: int,
        /,
    ) -> None:
        """query, keys, values: any strides, but none in the last dimension."""

    def attend_cached(
        self,
        kernels: Kernels,
        plan: AttentionPlan,
        rows: tuple[Tensor, Tensor, Tensor],
        keys: _Cache,
        values: _Cache,
        slot_ids: Tensor,
        norms: _Pair,
        eps: float,
        rounds_last: bool,
        rotary: _Pair,
        is_interleaved: bool,
        norms_last: bool,
        out: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
        softcap: float | None,
        chunk: int | None,
        threads: int,
        /,
    ) -> None:
        """`rows`: query, key and value, `[tokens, heads × dim]`, gaps between tokens allowed."""

    def score_keys(
        self, plan: AttentionPlan, query: Tensor, keys: _Cache, weights: Tensor, out: Tensor, threads: int, /
    ) -> None:
        """`out`: `[tokens, positions]`, a multiple of `score_tile`."""

score_tile: int

class Scoring(Enum):
    softmax = 0
    sigmoid = 1
    chosen = 2
    apart = 3
    mixer = 4

class Elementwise(Enum):
    add = 0
    clamp = 1
    gelu = 2
    scale = 3
    softcap = 4

@final
class GatedKernels:
    @property
    def isa(self) -> str: ...

# The slot that a state is in, if there is one, the one that it goes to, and others after so many tokens.
_StateSlots = tuple[int | None, int, Sequence[tuple[int, int]]]

@final
class StepMemory:
    """Caches and states of all layers and rotary tables, kept alive."""

    def __init__(
        self,
        caches: Sequence[tuple[_Cache, _Cache]],
        block_size: int,
        ropes: Sequence[tuple[Tensor, Tensor]],
        num_positions: int,
        states: Sequence[tuple[Tensor, Tensor] | None],
        indexes: Sequence[_Cache | None],
        /,
    ) -> None: ...

# Index of a buffer, stride, first column, columns.
_Columns = tuple[int, int, int, int]

@final
class Program:
    """Instructions over buffers. Tensors are kept alive; a ValueError says what does not fit together."""

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
        window: int | None,
        sinks: Tensor | None,
        rope: int,
        softcap: float | None,
        rounds_last: bool,
        is_interleaved: bool,
        norms_last: bool,
        chunk: int | None,
        /,
    ) -> None:
        """`rows`: query, key, value, out."""

    def add_attend_latent(
        self,
        rows: Sequence[_Columns],
        layer: int,
        to_keys: Sequence[Matrix],
        to_values: Sequence[Matrix],
        norm: Tensor | None,
        eps: float,
        scale: float,
        rope_dim: int,
        rope: int,
        is_interleaved: bool,
        is_indexed: bool,
        /,
    ) -> None:
        """`rows`: query, compressed, out."""

    def add_keep_index_key(self, key: _Columns, layer: int, rope: int, is_interleaved: bool, /) -> None: ...
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
        factors: Tensor | None = None,
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
        is_gelu: bool,
        limits_last: bool,
        route: int,
        weighs: bool,
        /,
    ) -> None: ...
    def add_weigh_input(self, x: _Columns, out: _Columns, route: int, /) -> None: ...
    def add_swiglu(
        self,
        gate: _Columns,
        up: _Columns,
        out: _Columns,
        alpha: float,
        offset: float,
        limit: float,
        is_gelu: bool,
        limits_last: bool,
        /,
    ) -> None: ...
    def add_elementwise(self, kind: Elementwise, x: _Columns, y: _Columns | None, number: float, /) -> None: ...
    def add_scale(self, x: _Columns, gate: _Columns, /) -> None: ...
    def add_scale_heads(self, x: _Columns, slopes: Tensor, biases: Tensor, /) -> None: ...
    def add_scale_by_position(self, x: _Columns, beta: float, length: float, offset: float, /) -> None: ...
    def add_gate(self, x: _Columns, gate: _Columns, /) -> None: ...
    def add_split(self, x: _Columns, num_groups: int, outs: Sequence[_Columns], /) -> None: ...
    def add_convolve(
        self,
        x: _Columns,
        weight: Tensor,
        bias: Tensor | None,
        before: _Columns | None,
        behind: _Columns | None,
        out: _Columns,
        layer: int,
        activates: bool,
        /,
    ) -> None:
        """`weight`: float32 `[n, channels]`."""

    def add_delta_rule(
        self,
        rows: Sequence[_Columns],
        layer: int,
        num_key_heads: int,
        num_value_heads: int,
        log_rate: Tensor,
        decay_bias: Tensor,
        bound: float,
        /,
    ) -> None:
        """`rows`: query, key, value, decay, strength, out; `bound` 0: none."""

    def add_state_space(
        self,
        rows: Sequence[_Columns],
        layer: int,
        num_groups: int,
        num_heads: int,
        log_rate: Tensor,
        step_bias: Tensor,
        skip: Tensor,
        least: float,
        most: float,
        /,
    ) -> None:
        """`rows`: read, write, x, step, out."""

    def add_head(
        self, x: _Columns, matrix: object, bias: Tensor | None, scale: float, softcap: float | None, /
    ) -> None: ...
    def run(
        self,
        first: int,
        end: int,
        kernels: Kernels,
        attention: AttentionKernels,
        gated: GatedKernels,
        memory: StepMemory,
        sequences: Sequence[tuple[Sequence[int], int, Sequence[int], int, _StateSlots | None]],
        dtype: DType,
        arena: Tensor,
        starts: Sequence[int],
        expert_ids: Tensor,
        gate_weights: Tensor,
        logits: Tensor,
        chosen: AttentionPlan | None,
        threads: int,
        /,
    ) -> None:
        """Run instructions `[first, end)`.

        Args:
            sequences: token ids, first position, block ids, how many of the last tokens' logits are wanted, and the
                slots of `SequenceState`.
            starts: bytes of the arena where the buffers are, each at 64 bytes of the address space.
            expert_ids, gate_weights: `[routes, tokens, k]`.
            logits: `[wanted, vocabulary]`.
        """

def attention_kernels(isa: str) -> AttentionKernels: ...
def gated_kernels(isa: str) -> GatedKernels: ...
def read_memory(memory: Tensor, threads: int, /) -> int: ...
def write_kv(keys: _Cache, values: _Cache, key: Tensor, value: Tensor, slot_ids: Tensor, threads: int, /) -> None: ...
def supported_isas() -> list[str]: ...
def kernels(isa: str) -> Kernels: ...
