"""Hostile and damaged safetensors files end in one kind of error that names the value, quickly."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.errors import raises

from amalgam.checkpoint.safetensors_header import MAX_HEADER_BYTES, read_header
from amalgam.checkpoint.shards import SafetensorsShard
from amalgam.errors import CheckpointError


def layout(header: Any, data: bytes = bytes(8), header_bytes: int | None = None) -> bytes:
    """A safetensors file, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if header_bytes is None else header_bytes) + raw + data


def one(**changes: Any) -> dict[str, Any]:
    """A header with the one tensor `w` of two float32."""
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@cache
def a_million_empty() -> bytes:
    entry = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % i for i in range(1_000_000)) + b"}"


MALFORMED: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "empty file": (b"", "0 bytes"),
    "shorter than the prefix": (b"\x08\0\0", "3 bytes"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "header length 2^64-1": (layout(b"{}", header_bytes=2**64 - 1), str(2**64 - 1)),
    "header above the limit": (layout(b"{}", header_bytes=MAX_HEADER_BYTES + 1), str(MAX_HEADER_BYTES + 1)),
    "header past the end": (layout(b"{}", b"", header_bytes=100), "108"),
    "a million empty tensors": (lambda: layout(a_million_empty()), "8 bytes"),
    "a million empty tensors and data": (
        lambda: layout(a_million_empty(), bytes(len(a_million_empty()))),
        "commas",
    ),
    "large metadata": (layout({"__metadata__": {"k": "v" * 2**21}, **one()}), "8 bytes"),
    "empty header": (layout(b""), "b''"),
    "header is a list": (layout(b"[]"), "b'[]'"),
    "header begins with a space": (layout(b" {}"), "b' {}'"),
    "invalid json": (layout(b'{"w":'), "line 1"),
    "text after the object": (layout(b"{}{}"), "line 1"),
    "not utf-8": (layout(b'{"\xff":1}'), "utf-8"),
    "nested deeply": (layout(b'{"w":' + b"[" * 100_000), "nested"),
    "repeated tensor": (layout(json.dumps(one())[:-1].encode() + b"," + json.dumps(one())[1:].encode()), "'w'"),
    "repeated key": (
        layout(b'{"w":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'),
        "'dtype'",
    ),
    "nan": (layout(one(shape=[float("nan")])), "NaN"),
    "infinite number": (layout(b'{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'), "1e999"),
    "a number of 9000 digits": (layout(b'{"w":{"dtype":"F32","shape":[' + b"9" * 9000 + b"]}}"), "4300"),
    "metadata is a list": (layout({"__metadata__": [], **one()}), "__metadata__ []"),
    "metadata value is a number": (layout({"__metadata__": {"k": 17}, **one()}), "17"),
    "tensor is a list": (layout({"w": [3]}), "[3]"),
    "tensor without shape": (layout({"w": {"dtype": "F32", "data_offsets": [0, 8]}}), "'w'"),
    "unknown key": (layout(one(strides=[1])), "strides"),
    "empty name": (layout({"": one()["w"]}), "''"),
    "line break in the name": (layout({"a\nb": one()["w"]}), r"'a\nb'"),
    "lone surrogate in the name": (layout(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), r"\ud800"),
    "unknown dtype": (layout(one(dtype="F4")), "'F4'"),
    "dtype is a list": (layout(one(dtype=["F32"])), "['F32']"),
    "shape is a number": (layout(one(shape=2)), "shape 2"),
    "negative size": (layout(one(shape=[-2])), "[-2]"),
    "boolean size": (layout(one(shape=[True, 2])), "[True, 2]"),
    "fractional size": (layout(one(shape=[2.0])), "[2.0]"),
    "rank 9": (layout(one(shape=[1] * 9)), "9 dimensions"),
    "product past 2^63": (layout(one(shape=[2**40, 2**40])), str(2**40)),
    "empty but huge": (layout(one(shape=[0, 2**60, 2**20], data_offsets=[0, 0])), str(2**60)),
    "offsets are three": (layout(one(data_offsets=[0, 8, 8])), "[0, 8, 8]"),
    "offsets are text": (layout(one(data_offsets=["0", "8"])), "['0', '8']"),
    "offsets are booleans": (layout(one(data_offsets=[False, True])), "[False, True]"),
    "negative offset": (layout(one(data_offsets=[-8, 0])), "[-8, 0]"),
    "offsets fall": (layout(one(data_offsets=[8, 0])), "[8, 0]"),
    "size does not fit the shape": (layout(one(data_offsets=[0, 4])), "8"),
    "offset far past the end": (layout(one(data_offsets=[2**62, 2**62 + 8])), "'w'"),
    "truncated data": (layout(one(), bytes(7)), "'w'"),
    "overlap": (layout(one() | {"v": {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]}}), "'w'"),
    "the same bytes twice": (layout(one() | {"v": one()["w"]}), "'w'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_by_value(case: str, tmp_path: Path) -> None:
    content, value = MALFORMED[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content() if callable(content) else content)
    started = time.process_time()
    with raises(CheckpointError, value, file) as caught:
        read_header(file)
    assert time.process_time() - started < 10
    assert caught.value.remedy
    assert len(str(caught.value)) < 1000


def test_truncated_file_names_both_sizes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content = layout(one())
    file.write_bytes(content[:-1])
    with raises(CheckpointError, file, len(content), len(content) - 1):
        read_header(file)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with raises(CheckpointError, tmp_path / "gone.safetensors"):
        read_header(tmp_path / "gone.safetensors")


def test_legal_oddities_are_read(tmp_path: Path) -> None:
    """Padding, holes, trailing bytes, scalars, empty tensors and metadata are all legal or harmless."""
    header = {
        "__metadata__": {"format": "pt"},
        "late": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
        "early": {"dtype": "U8", "shape": [3, 1], "data_offsets": [0, 3]},
        "none": {"dtype": "BF16", "shape": [4, 0], "data_offsets": [3, 3]},
    }
    file = tmp_path / "model.safetensors"
    file.write_bytes(layout(json.dumps(header).encode() + b"   ", bytes(32)))
    entries = read_header(file)
    assert [(entry.name, entry.dtype, entry.shape, entry.nbytes) for entry in entries] == [
        ("early", torch.uint8, (3, 1), 3),
        ("none", torch.bfloat16, (4, 0), 0),
        ("late", torch.float32, (), 4),
    ]


def test_damaged_files_raise_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(20)
    header = one() | {"v": {"dtype": "F16", "shape": [2, 2], "data_offsets": [8, 16]}, "__metadata__": {"format": "pt"}}
    valid = layout(header, bytes(range(16)))
    num_refused = 0
    for attempt in range(300):
        content = bytearray(valid)
        for _ in range(rng.choice([1, 1, 2, 6])):
            content[rng.randrange(len(content))] = rng.choice([*b'"{}[],:019-e', 0, 255, rng.randrange(256)])
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        file = tmp_path / f"{attempt}.safetensors"
        file.write_bytes(content)
        try:
            shard = SafetensorsShard(file)
            for entry in shard.entries:
                shard.read(entry).clone()
        except CheckpointError:
            num_refused += 1
    assert 100 < num_refused < 300
