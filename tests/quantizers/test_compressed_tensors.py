"""Rounding to nearest, and what is written of it, are to the bit those of the library that publishes the layouts."""

from __future__ import annotations

import pytest
import torch

from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest

CASES = [
    ("int8", QuantizeOptions()),
    ("int8", QuantizeOptions(scale="tensor")),
    ("int8", QuantizeOptions(group_size=32)),
    ("int8", QuantizeOptions(has_zero_points=True)),
    ("int8-packed", QuantizeOptions(group_size=32, has_zero_points=True)),
    ("fp8", QuantizeOptions(scale="tensor")),
    ("fp8", QuantizeOptions(scale="channel")),
    ("mxfp4", QuantizeOptions()),
    *(
        (f"int{bits}", options)
        for bits in (2, 3, 4)
        for options in (
            QuantizeOptions(group_size=32),
            QuantizeOptions(group_size=64, has_zero_points=True),
            QuantizeOptions(scale="channel"),
            QuantizeOptions(scale="channel", has_zero_points=True),
        )
    ),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_tensors_are_those_of_the_library(name: str, options: QuantizeOptions) -> None:
    from compressed_tensors.compressors import BaseCompressor  # takes seconds, in each process that reads this file
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(3)
    weight = torch.randn(40, 192) * torch.rand(40, 1) + torch.rand(40, 1) / 4
    weight[5] = weight[5].abs()
    target = writable_format(name)
    encoded = quantize(weight, target, round_to_nearest, options)
    scheme = target.scheme(encoded.grid)
    arguments = QuantizationArgs(**scheme.arguments)
    blocks = encoded.grid.blocks(weight)
    scale, zero = calculate_qparams(blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3)), arguments)
    if encoded.grid.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state = {"weight": weight, "weight_scale": scale}
    if options.has_zero_points:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(scheme.layout)
    expected = compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=arguments))
    assert set(encoded.tensors) == set(expected)
    for suffix, tensor in expected.items():
        assert torch.equal(encoded.tensors[suffix].view(tensor.dtype), tensor), suffix
