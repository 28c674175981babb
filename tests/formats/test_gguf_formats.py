"""Every GGUF type against the `gguf` package's own dequantization, to the bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from amalgam.checkpoint.gguf import BLOCK_TYPES
from amalgam.checkpoint.safetensors_header import TensorEntry
from amalgam.errors import CheckpointError
from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.weights import PackedWeight
from tests.errors import raises
from tests.formats.layouts import get_format

TYPES = {block.name: block for block in BLOCK_TYPES.values()}
# Byte offsets of the f16 fields, which random bytes would make infinite now and then.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
ROWS = 24


def random_blocks(name: str, rows: int = ROWS, blocks_each: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 `[rows, row_bytes]` of any bits, scales finite: subnormal, negative and zero ones included."""
    rng = np.random.default_rng(seed)
    size = TYPES[name].num_bytes
    blocks = rng.integers(0, 256, (rows * blocks_each, size), dtype=np.uint8)
    for offset in HALVES[name]:
        scales = rng.integers(0, 2**16, len(blocks), dtype=np.uint16)
        scales[(scales & 0x7C00) == 0x7C00] &= 0xBFFF
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":
        blocks[:, 0] %= 255
    return blocks.reshape(rows, -1)


def plausible_blocks(name: str, rows: int, blocks_each: int, seed: int) -> np.ndarray:
    """The same with scales as a model has them, so that its layers compute nothing infinite."""
    blocks = random_blocks(name, rows, blocks_each, seed).reshape(-1, TYPES[name].num_bytes)
    for offset in HALVES[name]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = 118
    return blocks.reshape(rows, -1)


def load(name: str, raw: np.ndarray) -> PackedWeight:
    entry = TensorEntry("w", torch.uint8, raw.shape, Path("model.gguf"), 0, name)
    weight_format = get_format(f"gguf_{name.lower()}")
    stored = weight_format.recognise("w", {"weight": entry}, {})
    assert stored is not None
    assert weight_format.nbytes(stored.shape) == weight_format.load(stored, lambda _: torch.from_numpy(raw)).nbytes
    return weight_format.load(stored, lambda _: torch.from_numpy(raw))


def expected(name: str, raw: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]))


def test_every_type_is_here() -> None:
    assert set(HALVES) == set(TYPES)
    for name, block in TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (block.num_elements, block.num_bytes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TYPES)
def test_dequantizes_to_the_same_bits(name: str, seed: int) -> None:
    raw = random_blocks(name, seed=seed)
    packed = load(name, raw)
    wide = packed.dequantize()
    assert wide.dtype == torch.float32
    assert wide.shape == packed.shape == (ROWS, 3 * TYPES[name].num_elements)
    assert torch.equal(wide, expected(name, raw))


@pytest.mark.parametrize("name", TYPES)
def test_an_embedding_expands_only_its_rows(name: str) -> None:
    raw = random_blocks(name)
    token_ids = torch.tensor([5, 0, 5, ROWS - 1])
    packed = load(name, raw)
    assert torch.equal(reference.embedding(token_ids, packed, torch.float32), expected(name, raw)[token_ids])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_what_the_tool_quantized(name: str) -> None:
    weight = np.random.default_rng(1).standard_normal((16, 96)).astype(np.float32)
    raw = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name])
    assert torch.equal(load(name, raw).dequantize(), expected(name, raw))


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01])
@pytest.mark.parametrize("name", [name for name in TYPES if HALVES[name]])
def test_infinite_scales_are_refused(name: str, bits: int) -> None:
    for offset in HALVES[name]:
        raw = random_blocks(name)
        raw[3, offset : offset + 2] = np.array([bits], np.uint16).view(np.uint8)
        with raises(CheckpointError, "w"):
            load(name, raw)


def test_a_nan_exponent_is_refused() -> None:
    raw = random_blocks("MXFP4")
    raw[0, 17] = 255
    with raises(CheckpointError, "w"):
        load("MXFP4", raw)


@pytest.mark.parametrize("shape", [(18,), (2, 4, 18)])
def test_only_matrices(shape: tuple[int, ...]) -> None:
    entry = TensorEntry("w", torch.uint8, shape, Path("model.gguf"), 0, "Q4_0")
    with raises(CheckpointError, "w", "Q4_0"):
        get_format("gguf_q4_0").recognise("w", {"weight": entry}, {})
