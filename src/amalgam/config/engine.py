"""Settings of the step loop and the KV cache: section `engine`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from amalgam.base.processors import usable_threads
from amalgam.config.fields import Section


class EngineSettings(Section):
    """The step loop and the KV cache."""

    max_step_tokens: int = Field(default=512, ge=1, le=2**20)
    """Most tokens in one step; longer prompts are computed in chunks."""
    max_slowdown: float = Field(default=2.0, gt=1, le=1000)
    """How many times as long a step may take that computes prompts beside streams. Fewer prompt tokens keep it so."""
    block_size: int = Field(default=16, ge=1, le=1024)
    """Tokens in one KV block."""
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"] = "auto"
    """Type of the KV cache. auto: inference.dtype. int8, fp8 (E4M3): with a scale for each token and head."""
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    """Size of the KV cache. None: room for max_batch_size sequences of max_seq_length, within a quarter of memory."""
    state_cache_bytes: int | None = Field(default=None, ge=1)
    """Size of recurrent states (see support.md). None: two for each of max_batch_size, within an eighth of memory."""
    prefix_cache: bool = True
    """Whether a request uses keys and values that are there already for its beginning. Changes no answer."""
    max_queue: int = Field(default=1024, ge=1, le=2**20)
    """Most requests that wait beside the inference.max_batch_size that may run; more are refused with 503."""
    rollback_answers: int = Field(default=8, ge=0, le=2**20)
    """New weights that fail (NaN, an exception) before so many answers are left for those before. 0: they stay."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """Compute threads. None: one for each core that affinity and the cgroup's quota allow, at most OMP_NUM_THREADS."""
    pin_threads: bool = False
    """Whether each compute thread stays on a core of its own. For machines that compute nothing else."""
    numa: Literal["off", "interleaved", "local"] = "off"
    """Packed weights on several memory nodes: off (anywhere), interleaved by pages, local to the threads that read."""
    load_threads: int | None = Field(default=None, ge=1, le=256)
    """Threads that read and pack weights. None: as many as cores are allowed, from 4 to 32."""

    @property
    def num_load_threads(self) -> int:
        return self.load_threads or min(max(usable_threads(), 4), 32)
