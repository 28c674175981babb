"""What the extension says of arguments that it cannot read; it never reads or writes outside of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension
from tests.errors import raises

pytestmark = pytest.mark.skipif(not extension.is_available(), reason="the native kernels are not built")

TOKENS, HEADS, KV_HEADS, DIM, SLOTS, HIDDEN, WIDTH, EXPERTS = 3, 4, 2, 16, 64, 32, 48, 5
Call = tuple[Callable[..., Any], list[Any]]


def floats(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


def packed(rows: int, columns: int) -> Any:
    from amalgam import _native

    weight = floats(rows, columns)
    return _native.pack(
        kernels=extension.kernels(),
        format=_native.Format.fp32,
        columns=columns,
        weight=weight,
        scale=None,
        scale_dtype=_native.DType.float32,
        block=(rows, columns),
        zero=None,
        offset=None,
        offset_kind=_native.Offset.none,
        part_scale=None,
        part_minimum=None,
        table=None,
        order=None,
        quantizes=True,
        codes=False,
    )


def calls() -> dict[str, Call]:
    """Every function that takes tensors, with arguments that fit."""
    from amalgam import _native

    kernels, attention = extension.kernels(), _native.attention_kernels(extension.isa())
    half = floats(TOKENS, DIM // 2)
    batch = (torch.tensor([0, TOKENS]), torch.tensor([TOKENS]), torch.tensor([[1]]), 16)
    plan = _native.AttentionPlan(*batch)
    scales = floats(SLOTS, KV_HEADS)
    caches = (floats(SLOTS, KV_HEADS, DIM).char(), scales), (floats(SLOTS, KV_HEADS, DIM).char(), scales + 1)
    rows = floats(TOKENS, HEADS * DIM), floats(TOKENS, KV_HEADS * DIM), floats(TOKENS, KV_HEADS * DIM)
    slot_ids = torch.arange(16, 16 + TOKENS)
    new = floats(TOKENS, KV_HEADS, DIM)
    attended = [floats(TOKENS, HEADS * DIM), 0.25, None, floats(HEADS), 2.0, None, 1]
    experts = _native.Experts()
    for _ in range(EXPERTS):
        gate, up, down = packed(WIDTH, HIDDEN), packed(WIDTH, HIDDEN), packed(HIDDEN, WIDTH)
        experts.add(gate, up, down, floats(WIDTH), None, floats(HIDDEN))
    ids, gates = torch.zeros(TOKENS, 2, dtype=torch.int64), floats(TOKENS, 2)
    draws = [((0, 1.0, 1.0, 0.0), 1, row) for row in range(TOKENS)]
    x = floats(TOKENS, HIDDEN)
    return {
        "rms_norm": (kernels.rms_norm, [x, x + 1, x + 2, floats(HIDDEN), x + 3, 1e-6, 1]),
        "rotate": (kernels.rotate, [floats(TOKENS, HEADS, DIM), half, half + 1, floats(TOKENS, HEADS, DIM), 1]),
        "swiglu": (kernels.swiglu, [x, x + 1, x + 2, 1.0, 0.0, 1e9, False, False, 1]),
        "unpack": (kernels.unpack, [packed(5, 8), floats(5, 8) + 1, 1]),
        "embedding": (kernels.embedding, [packed(5, 8), torch.tensor([4, 0, 2]), floats(3, 8), 1]),
        "linear": (kernels.linear, [x, [(packed(WIDTH, HIDDEN), floats(WIDTH), floats(TOKENS, WIDTH))], 1]),
        "route": (kernels.route, [packed(EXPERTS, HIDDEN), x, True, 0.0, ids.clone(), gates, 1]),
        "moe": (kernels.moe, [experts, x, ids, gates, x + 1, 1.0, 0.0, 1e9, False, False, 1]),
        "Experts.add": (
            _native.Experts().add,
            [*(packed(WIDTH, HIDDEN) for _ in range(2)), packed(HIDDEN, WIDTH), *map(floats, (WIDTH, WIDTH, HIDDEN))],
        ),
        "pack": (
            _native.pack,
            [
                kernels,
                _native.Format.int4,
                8,
                torch.zeros(16, 4, dtype=torch.uint8),
                floats(16, 1),
                _native.DType.float32,
                (1, 8),
                torch.zeros(16, 1, dtype=torch.uint8),
                None,
                _native.Offset.none,
                None,
                None,
                None,
                torch.arange(8, dtype=torch.int32),
                True,
                True,
            ],
        ),
        "pack with parts": (
            _native.pack,
            [
                kernels,
                _native.Format.k4,
                256,
                torch.zeros(16, 256, dtype=torch.uint8),
                floats(16, 1),
                _native.DType.float32,
                (1, 256),
                None,
                floats(16, 1),
                _native.Offset.minimum,
                floats(16, 8).char(),
                floats(16, 8).char(),
                None,
                None,
                True,
                True,
            ],
        ),
        "pack with a table": (
            _native.pack,
            [
                kernels,
                _native.Format.table4,
                32,
                torch.zeros(16, 32, dtype=torch.uint8),
                floats(16, 1),
                _native.DType.float32,
                (1, 32),
                None,
                None,
                _native.Offset.none,
                None,
                None,
                torch.ones(18),
                None,
                True,
                True,
            ],
        ),
        "pack with codebooks": (
            _native.pack,
            [
                kernels,
                _native.Format.codebooks,
                16,
                torch.zeros(16, 4, dtype=torch.uint8),
                floats(16, 1),
                _native.DType.float32,
                (1, 16),
                None,
                None,
                _native.Offset.none,
                None,
                None,
                None,
                None,
                True,
                True,
                floats(2, 4, 8),
            ],
        ),
        "view": (
            _native.view,
            [
                _native.Format.fp32,
                16,
                8,
                packed(16, 8).memory,
                _native.DType.float32,
                0,
                0,
                16,
                False,
                _native.Offset.none,
                None,
                True,
            ],
        ),
        "draw": (_native.draw, [kernels, floats(TOKENS, 9), draws, 1]),
        "AttentionPlan": (_native.AttentionPlan, list(batch)),
        "attend": (
            attention.attend,
            [
                plan,
                floats(TOKENS, HEADS, DIM),
                *caches,
                floats(TOKENS, HEADS, DIM),
                0.25,
                None,
                floats(HEADS),
                2.0,
                None,
                1,
            ],
        ),
        "attend_cached": (
            attention.attend_cached,
            [
                kernels,
                plan,
                rows,
                *caches,
                slot_ids,
                (floats(DIM), floats(DIM)),
                1e-6,
                True,
                (half, half + 1),
                True,
                False,
                *attended,
            ],
        ),
        "write_kv": (_native.write_kv, [*caches, new, new + 1, slot_ids, 1]),
        "StepMemory": (
            _native.StepMemory,
            [
                [caches, caches],
                16,
                [(floats(9, 8), floats(9, 8))],
                9,
                [(floats(3, 2, 8), floats(3, 2, 4, 4))],
                [(floats(SLOTS, 1, DIM).char(), floats(SLOTS, 1))],
            ],
        ),
    }


NAMES = sorted(calls()) if extension.is_available() else []


def places(arguments: Any, path: tuple[int, ...] = ()) -> list[tuple[tuple[int, ...], Tensor]]:
    """Where tensors stand in nested arguments."""
    if isinstance(arguments, Tensor):
        return [(path, arguments)]
    if not isinstance(arguments, list | tuple):
        return []
    return list(itertools.chain(*(places(one, (*path, index)) for index, one in enumerate(arguments))))


def with_one(arguments: Any, path: Sequence[int], other: object) -> Any:
    if not path:
        return other
    changed = [with_one(one, path[1:], other) if i == path[0] else one for i, one in enumerate(arguments)]
    return type(arguments)(changed)


# Where each function leaves its results; others return what they make. Of what is cached, codes and scales.
WRITTEN: dict[str, list[tuple[int, ...]]] = {
    "attend": [(4,)],
    "attend_cached": [(3, 0), (3, 1), (4, 0), (4, 1), (12,)],
    "embedding": [(2,)],
    "linear": [(1, 0, 2)],
    "moe": [(4,)],
    "rms_norm": [(2,), (4,)],
    "rotate": [(3,)],
    "route": [(4,), (5,)],
    "swiglu": [(2,)],
    "unpack": [(1,)],
    "write_kv": [(0, 0), (0, 1), (1, 0), (1, 1)],
}


@pytest.mark.parametrize("name", NAMES)
def test_what_fits_is_taken_and_results_are_written_alone(name: str) -> None:
    function, arguments = calls()[name]
    before = [(path, tensor.clone()) for path, tensor in places(arguments)]
    made = function(*arguments)
    after = dict(places(arguments))
    assert [path for path, tensor in before if not torch.equal(after[path], tensor)] == WRITTEN.get(name, [])
    assert (made is None) == (name in WRITTEN or name == "Experts.add")


@pytest.mark.parametrize("name", NAMES)
def test_one_tensor_that_does_not_fit_is_refused(name: str) -> None:
    """Other types, one column less, one dimension more, gaps, no memory: each for each tensor of each function."""
    function, arguments = calls()[name]
    found = places(arguments)
    assert found
    for path, tensor in found:
        for wrong in (
            tensor.to(torch.complex64),
            tensor.to(torch.bool if tensor.dtype is torch.uint8 else torch.uint8),
            tensor[..., :-1].contiguous(),
            tensor.unsqueeze(0),
            torch.stack((tensor, tensor), -1)[..., 0],
            tensor.to("meta"),
            tensor.to_sparse(),
        ):
            if fits_too(name, path, wrong, tensor):
                continue
            with raises(ValueError):
                function(*with_one(arguments, path, wrong))
                pytest.fail(f"{name} at {path} took {wrong.dtype} {tuple(wrong.shape)} {wrong.stride()}")
        for nothing in (3, "x", object(), [1.0]):
            with raises(TypeError):
                function(*with_one(arguments, path, nothing))


def fits_too(name: str, path: tuple[int, ...], wrong: Tensor, tensor: Tensor) -> bool:
    """Where a function takes other shapes as well."""
    if wrong.is_meta or wrong.layout is not torch.strided or not wrong.is_contiguous():
        return False
    if name.startswith("pack") and path == (3,):  # bytes are bytes
        return wrong.element_size() == tensor.element_size() and wrong.shape == tensor.shape
    if wrong.dtype is not tensor.dtype:
        return False
    if wrong.shape == tensor.shape:  # one row has no gaps
        return True
    if name == "embedding" and path != (0,):
        return wrong.numel() == tensor.numel()
    # A smaller vocabulary; caches and states of other shapes, which are looked at together with the program.
    is_cache = name == "StepMemory" and ((path[0] in (0, 5) and path[-1] == 0) or path[0] == 4)
    return (name == "draw" or is_cache) and wrong.dim() == tensor.dim()


def test_errors_name_the_argument_and_what_it_must_be() -> None:
    kernels = extension.kernels()
    x, weight = floats(2, 8), floats(8)
    with raises(TypeError, "weight", "int"):
        kernels.rms_norm(x, None, None, 3, x, 1e-6, 1)  # type: ignore[arg-type]
    with raises(ValueError, "weight", "float64", "float32", "bfloat16", "(8,)"):
        kernels.rms_norm(x, None, None, weight.double(), x, 1e-6, 1)
    with raises(ValueError, "out", (8, 2), (2, 8)):
        kernels.rms_norm(x, None, None, weight, floats(8, 2), 1e-6, 1)
    with raises(ValueError, "x", "strides", (1, 8)):
        kernels.rms_norm(floats(8, 8).t(), None, None, weight, floats(8, 8), 1e-6, 1)


def test_parameters_and_other_subclasses_are_tensors() -> None:
    kernels = extension.kernels()
    x, weight, out = floats(2, 8), torch.nn.Parameter(floats(8)), torch.empty(2, 8)
    for _ in range(3):
        kernels.rms_norm(x, None, None, weight, out, 1e-6, 1)
    expected = torch.empty(2, 8)
    kernels.rms_norm(x, None, None, weight.detach(), expected, 1e-6, 1)
    assert torch.equal(out, expected)
