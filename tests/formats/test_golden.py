"""Every layout as the tool that publishes it packed it: the same weights, bit for bit (tests/data/formats/README.md).

A tool that computes in half precision rounds the same exact products that we keep in float32: its result is ours,
rounded once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from amalgam.checkpoint.writer import write_checkpoint
from amalgam.composition.source import Source
from amalgam.formats.fused import FusedTensor
from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.layouts import dense

FOLDER = Path(__file__).parents[1] / "data" / "formats"
CASES = sorted(file.stem for file in FOLDER.glob("*.safetensors"))
# The runtime layouts that the native kernels know; everything that fits them losslessly must arrive in them.
LAYOUTS = {
    "affine4": {*(f"hqq-int{bits}-axis1" for bits in (1, 2, 3, 4)), "hqq-int4-axis1-ragged"},
    "affine8": {
        *("autoround-int8", "ct-int8-asymmetric", "ct-int8-zero-point", "gptq-int8-asymmetric"),
        *("gptq-v2-int8-asymmetric", "hqq-int8-axis1"),
    },
    "codebooks": {case for case in CASES if case.startswith("aqlm-")},
    "cyclic4": {"hqq-int2-axis0", "hqq-int4-axis0"},
    "table4": {
        *("bnb-fp4", "bnb-fp4-nested", "bnb-nf4", "bnb-nf4-nested", "bnb-nf4-nested-ragged"),
        *("ct-mxfp4", "ct-nvfp4", "modelopt-nvfp4"),
    },
    "int4_columns": {"modelopt-int4"},
}


def golden(case: str, folder: Path) -> tuple[Source, torch.Tensor]:
    """The case as a checkpoint, and what the tool makes of it."""
    with safe_open(FOLDER / f"{case}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        quantization = json.loads(file.metadata()["quantization_config"])
    expected = tensors.pop("expected")
    write_checkpoint(folder, tensors.items())
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return Source.open("golden", str(folder)), expected


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("gpt-oss")])
def test_equals_the_tools_own_weights(case: str, tmp_path: Path) -> None:
    source, expected = golden(case, tmp_path)
    (stored,) = source.weights.values()
    assert stored.name == "x.weight"
    assert stored.shape == tuple(expected.shape)
    packed = source.load(stored)
    assert packed.shape == stored.shape
    assert all(part.is_contiguous() for part in packed.parts.values())
    restored = packed.dequantize()
    assert restored.dtype == torch.float32
    if case == "bnb-int8":  # the tool multiplies in another order: one unit in the last place
        torch.testing.assert_close(restored, expected, rtol=2**-23, atol=0)
    else:
        assert torch.equal(restored.to(expected.dtype), expected)
    known = next((layout for layout, cases in LAYOUTS.items() if case in cases), None)
    assert packed.layout.name == known or (known is None and packed.layout.name in {"scaled8", "int4"})
    x = torch.randn(3, stored.shape[1])
    assert torch.equal(reference.linear(x, packed), reference.linear(x, dense(restored)))


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("gpt-oss")])
def test_a_few_rows_are_those_of_the_whole(case: str, tmp_path: Path) -> None:
    source, _ = golden(case, tmp_path)
    (stored,) = source.weights.values()
    whole = source.values(stored.name)
    assert whole is not None
    for start in range(0, stored.shape[0], 8):
        run = range(start, min(start + 8, stored.shape[0]))
        torch.testing.assert_close(source.rows(stored, [run]), whole[start : run.stop], rtol=0, atol=0)
    runs = [range(stored.shape[0] - 8, stored.shape[0]), range(8)]
    assert torch.equal(source.rows(stored, runs), torch.cat([whole[-8:], whole[:8]]))


def test_gpt_oss_blocks_become_experts(tmp_path: Path) -> None:
    """`[experts, 2 out, in / 32, 16]` with gate and up alternating; the tool's result is `[experts, in, 2 out]`."""
    with safe_open(FOLDER / "gpt-oss-mxfp4.safetensors", "pt") as file:
        blocks, scales, expected = (file.get_tensor(name) for name in ("x.blocks", "x.scales", "expected"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write_checkpoint(tmp_path, [(f"{name}_blocks", blocks), (f"{name}_scales", scales)])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    modules = tuple(f"model.layers.{{}}.mlp.experts.{{}}.{part}_proj" for part in ("gate", "up"))
    table = FusedTensor("model.layers.{}.mlp.experts.gate_up_proj", modules, is_transposed=True, is_interleaved=True)
    source = Source.open("golden", str(tmp_path), lambda config: (table,))
    assert len(source.weights) == 4
    for expert in range(2):
        for position, part in enumerate(("gate", "up")):
            stored = source.weights[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"]
            restored = source.load(stored).dequantize()
            assert torch.equal(restored, expected[expert].t()[position::2])
