"""amalgam's experts: `moe_with_amalgam.py FORMAT`: int4 (groups of 128), int8, fp8 or bf16."""

from __future__ import annotations

import sys

from moe_block import Experts, Layer, load
from protocol import answer
from torch import Tensor

from amalgam.formats.registry import writable_format
from amalgam.kernels.backends.cpu import panels
from amalgam.kernels.backends.cpu.products import moe, prepare_experts, supports_moe
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import Expert, ExpertTable, PackedWeight
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest


def source(values: Tensor, name: str) -> PackedWeight:
    if name == "bf16":
        return dense(values)
    form = writable_format(name)
    return form.pack(quantize(values, form, round_to_nearest))


def main(name: str) -> None:
    made: list[tuple[PackedWeight, ...]] = []  # of each expert, before it is packed: the same for all layers

    def make(experts: Experts) -> Layer:
        if not made:
            made.extend(tuple(source(values, name) for values in parts) for parts in zip(*experts, strict=True))
        table = prepare_experts(ExpertTable(tuple(Expert(*map(panels.prepare, parts)) for parts in made)))

        def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            assert supports_moe(x, table)  # or PyTorch would be timed
            return moe(x, ids, weights, table)

        return layer

    answer(lambda: load(make))


main(sys.argv[1])
