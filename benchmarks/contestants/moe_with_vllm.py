"""vLLM's experts on the CPU: `moe_with_vllm.py FORMAT`: int4 (groups of 128), int8, fp8 (blocks) or bf16.

Its kernels are called as its experts' classes call them, packed by its own functions, and only where the class says
that it supports this processor. int4 and int8 multiply activations in 8 bits, fp8 in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from moe_block import BLOCK, Experts, Layer, fp8_by_block, load
from protocol import Measure, answer
from torch import Tensor

GROUP = 128  # inputs of int4 that share a scale


def grouped_int4(values: Tensor) -> tuple[Tensor, Tensor]:
    """[experts, rows, columns] → GPTQ's int32 [experts, columns / 8, rows], bfloat16 [experts, groups, rows]."""
    experts, rows, columns = values.shape
    groups = values.float().view(experts, rows, columns // GROUP, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
    codes = (groups / scale.float()).round().clamp(-8, 7).add(8).int().view(experts, rows, columns // 8, 8)
    packed = sum(codes[..., place] << (4 * place) for place in range(8))
    assert isinstance(packed, Tensor)
    return packed.transpose(1, 2).contiguous(), scale.squeeze(-1).transpose(1, 2).contiguous()


def int8_by_row(values: Tensor) -> tuple[Tensor, Tensor]:
    wide = values.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    return (wide / scale).round().to(torch.int8), scale


def quantized(
    vllm: Any, name: str, encode: Callable[[Tensor], tuple[Tensor, Tensor]], pack: Callable[..., tuple[Any, ...]]
) -> Callable[[Experts], Layer]:
    """
    Args:
        pack: both weights and their scales → those packed, and zero points or None.
    """
    from vllm._custom_ops import CPUQuantMethod, fused_experts_cpu

    experts_class, method = {
        "int4": (vllm.CPUExpertsInt4, CPUQuantMethod.INT4_W4A8),
        "int8": (vllm.CPUExpertsInt8, CPUQuantMethod.INT8_W8A8),
        "fp8": (vllm.CPUExpertsFp8, CPUQuantMethod.FP8_W8A16),
    }[name]
    if not experts_class._supports_current_device():
        raise NotImplementedError(f"vLLM's {experts_class.__name__} does not support this processor")
    block = [BLOCK, BLOCK] if name == "fp8" else None
    encoded: list[tuple[Tensor, Tensor]] = []  # the same for all layers

    def make(experts: Experts) -> Layer:
        gate, up, down = experts
        if not encoded:
            encoded.extend(encode(values) for values in (torch.cat((gate, up), 1), down))
        (first, first_scale), (last, last_scale) = encoded
        first, last, first_scale, last_scale, *zeros = pack(first, last, first_scale, last_scale)

        def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out = torch.empty_like(x)
            fused_experts_cpu(
                out, x, first, last, weights, ids.int(), method, first_scale, last_scale, *zeros, block, is_vnni=True
            )
            return out

        return layer

    return make


def wide(vllm: Any) -> Callable[[Experts], Layer]:
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    chosen = vllm.X86CPUUnquantizedExperts
    isa = chosen.isa if chosen._supports_current_device() else vllm.CPUUnquantizedExperts.isa

    def make(experts: Experts) -> Layer:
        gate, up, down = experts
        first, last = (cpu_prepack_moe_weight(values, isa) for values in (torch.cat((gate, up), 1), down))

        def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out = torch.empty_like(x)
            cpu_fused_moe(out, x, first, last, None, None, weights, ids.int(), "silu", isa)
            return out

        return layer

    return make


def load_with(name: str) -> Measure:
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    if name == "bf16":
        return load(wide(cpu_moe))
    encode = {"int4": grouped_int4, "int8": int8_by_row, "fp8": fp8_by_block}[name]

    def pack_lines(first: Tensor, last: Tensor, *scales: Tensor) -> tuple[Any, ...]:
        return *cpu_moe.prepare_fp8_moe_layer_for_cpu(first, last), *scales, None, None

    return load(
        quantized(cpu_moe, name, encode, cpu_moe.prepare_int4_moe_layer_for_cpu if name == "int4" else pack_lines)
    )


if __name__ == "__main__":
    answer(lambda: load_with(sys.argv[1]))
