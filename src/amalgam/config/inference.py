"""Settings of how the model runs: section `inference`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from amalgam.config.devices import DeviceName, MemorySize, device_name
from amalgam.config.fields import Section, UserPath


class InferenceSettings(Section):
    """How the model runs."""

    max_seq_length: int = Field(default=4096, ge=1, le=2**24)
    """Most tokens in one sequence, prompt and answer together."""
    max_batch_size: int = Field(default=32, ge=1, le=4096)
    """Most sequences in one step."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of activations, and of the KV cache unless engine.kv_dtype names another one."""
    activation: Literal["auto", "int8", "bf16"] = "auto"
    """What bfloat16 activations become for integer weights on the CPU. auto: int8, bf16 for small dense models."""
    bf16_coding: bool = True
    """Whether a CPU with AVX2 or AVX-512 keeps bf16 weights in 12 bits, without loss: less to read, longer to load."""
    device_map: str = "auto"
    """auto | cpu | cuda | cuda:N, and cpu:N, which stands in for a card: the device that computes all but experts which
    rules place elsewhere."""
    devices: dict[DeviceName, MemorySize | None] = Field(default_factory=dict)
    """Device → memory that weights may take there, such as `cuda: 24GB`; empty: what is free. A stand-in for a card
    (`cpu:1`) is there only if it is named here or in device_map."""
    load_in_8bit: bool = False
    """Quantize wide linear weights that no rule names to int8 while loading."""
    load_in_4bit: bool = False
    """The same to int4 in groups of 128."""
    packed_cache: UserPath = ""
    """Folder that keeps packed weights, so that later starts map them and need not read and pack. Empty: none."""

    @field_validator("device_map")
    @classmethod
    def _check_device_map(cls, value: str) -> str:
        return value if value == "auto" else device_name(value)

    @model_validator(mode="after")
    def _check_one_width(self) -> InferenceSettings:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit are both true: choose one")
        return self
