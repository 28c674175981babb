"""What the compiled extension offers; amalgam.kernels.native is its only user."""

from enum import Enum
from typing import final

class DType(Enum):
    float32 = 0
    bfloat16 = 1

@final
class Kernels:
    @property
    def isa(self) -> str: ...
    def rms_norm(
        self,
        x: int,
        weight: int,
        out: int,
        rows: int,
        hidden: int,
        eps: float,
        x_dtype: DType,
        weight_dtype: DType,
    ) -> None: ...

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
