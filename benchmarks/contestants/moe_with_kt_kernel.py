"""kt-kernel's experts: `moe_with_kt_kernel.py FORMAT`: int4, int8 (a scale for each row), fp8 (for each block) or bf16.

As its wheel ships: `CPUInfer` with a pool of one node, as its own wrapper makes it. The calling thread then waits,
spinning, while the pool's threads compute; its option for a caller that computes too (`USE_NUMA_JOB_DIRECT_WORK`) is
one of the compiler's, and the wheel is built without it.
"""

from __future__ import annotations

import sys

import torch
from moe_block import (
    BLOCK,
    HIDDEN,
    MOST_ROWS,
    NUM_ACTIVE,
    NUM_EXPERTS,
    WIDTH,
    Experts,
    Layer,
    fp8_by_block,
    load,
    num_threads,
)
from protocol import Measure, answer
from torch import Tensor

# What its wrapper chooses from, the best first. They keep their names where they run on AVX-512.
CLASSES = {
    "int4": ("AMXInt4_MOE",),
    "int8": ("AMXInt8_MOE",),
    "fp8": ("AMXFP8_MOE", "AVX2FP8_MOE"),
    "bf16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
}


def load_with(name: str) -> Measure:
    import kt_kernel
    from kt_kernel import kt_kernel_ext as native

    maker = next((found for one in CLASSES[name] if (found := getattr(native.moe, one, None))), None)
    if maker is None:
        raise NotImplementedError(f"{' and '.join(CLASSES[name])} are not in the variant {kt_kernel.__cpu_variant__}")
    pool = native.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [num_threads()]
    infer = native.CPUInfer(pool)
    given: dict[str, Tensor] = {}  # the same for all layers, by what they are called in a layer's settings

    def make(experts: Experts) -> Layer:
        if not given:
            for part, values in zip(("gate", "up", "down"), experts, strict=True):
                given.update(fp8_settings(part, values) if name == "fp8" else {f"{part}_proj": values})
        config = native.moe.MOEConfig(NUM_EXPERTS, NUM_ACTIVE, HIDDEN, WIDTH, 0)
        config.max_len, config.pool = MOST_ROWS, infer.backend_
        if name == "fp8":
            config.quant_config.bits, config.quant_config.group_size = 8, BLOCK
        for key, tensor in given.items():
            setattr(config, key, tensor.data_ptr())
        block, numbers = maker(config), torch.arange(NUM_EXPERTS)
        infer.submit(block.load_weights_task(numbers.data_ptr()))
        infer.sync()

        def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out, rows = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
            places = [tensor.data_ptr() for tensor in (ids, weights, x, out)]
            infer.submit(block.forward_task(rows.data_ptr(), NUM_ACTIVE, *places, False))
            infer.sync()
            return out

        return layer

    return load(make)


def fp8_settings(part: str, values: Tensor) -> dict[str, Tensor]:
    codes, scale = fp8_by_block(values)
    return {f"{part}_proj": codes, f"{part}_scale": scale}


answer(lambda: load_with(sys.argv[1]))
