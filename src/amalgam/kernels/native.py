"""The compiled CPU kernels, on torch tensors.

In: CPU tensors. Out: new CPU tensors with the meaning that `amalgam.kernels.reference` gives; a row's bits do not
depend on the other rows. Must never know: packed layouts' names in checkpoints, plans, requests.

The extension is loaded at first use. It is absent where no C++ compiler was found at installation; then
`why_unavailable` says what to do, and `amalgam.kernels.ops` takes the torch path.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amalgam.config.settings import NATIVE_ISAS, native_isa_limit
from amalgam.errors import UnsupportedError

if TYPE_CHECKING:
    from amalgam import _native

FLOAT_TYPES = (torch.float32, torch.bfloat16)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_REMEDY = (
    "Install a C++17 compiler (g++ or clang++) and Python's headers, then run `pip install -e .` in the project's "
    "folder again; until then PyTorch's operators do the work."
)


def is_available() -> bool:
    """Whether the extension is there and loads."""
    return why_unavailable() is None


@functools.cache
def why_unavailable() -> str | None:
    """What keeps the extension from loading and what to do about it; None if it loads."""
    try:
        import amalgam._native  # noqa: F401
    except ModuleNotFoundError:
        problem = "The native kernels are not built: amalgam was installed without a compiler, or is not installed."
    except ImportError as error:
        problem = f"The native kernels do not load: {error}."
    else:
        return None
    return f"{problem} {_REMEDY}"


def isa() -> str:
    """Instruction set in use: avx512, avx2 or portable. `AMALGAM_NATIVE_ISA` lowers it.

    Raises:
        UnsupportedError: the extension is not available.
        ConfigError: `AMALGAM_NATIVE_ISA` has a value that is not allowed.
    """
    return kernels().isa


def supports_rms_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes these tensors; depends on types, devices and the last dimension only."""
    return (
        is_available()
        and x.dtype in FLOAT_TYPES
        and weight.dtype in FLOAT_TYPES
        and x.is_cpu
        and weight.is_cpu
        and x.dim() > 0
        and weight.shape == x.shape[-1:]
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), as Llama computes it.

    float32 inside, rounded to x's type before the multiplication with the weight in x's type.

    Args:
        x: float32 or bfloat16 `[..., hidden]`.
        weight: float32 or bfloat16 `[hidden]`.

    Raises:
        UnsupportedError: the extension is not available.
        ValueError: other types, devices or shapes.
    """
    if not supports_rms_norm(x, weight):
        raise ValueError(_unfit_for_norm(x, weight))
    x = x.contiguous()
    out = torch.empty_like(x)
    _rms_norm(x, 0, 0, weight, out, eps)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + delta`, and that after `rms_norm`; x and delta of one shape and type.

    Raises:
        UnsupportedError, ValueError: as `rms_norm`.
    """
    if not supports_rms_norm(x, weight) or delta.shape != x.shape or delta.dtype != x.dtype or not delta.is_cpu:
        raise ValueError(f"{_unfit_for_norm(x, weight)}, after adding {delta.dtype} {tuple(delta.shape)}")
    x, delta = x.contiguous(), delta.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _rms_norm(x, delta.data_ptr(), total.data_ptr(), weight, out, eps)
    return total, out


def _unfit_for_norm(x: Tensor, weight: Tensor) -> str:
    return (
        f"rms_norm of {x.dtype} {tuple(x.shape)} on {x.device} with a weight of {weight.dtype} "
        f"{tuple(weight.shape)} on {weight.device}; expected float32 or bfloat16 [..., hidden] and [hidden] on cpu"
    )


def _rms_norm(x: Tensor, delta: int, total: int, weight: Tensor, out: Tensor, eps: float) -> None:
    weight = weight.contiguous()
    hidden = weight.numel()
    if out.numel():
        kernels().rms_norm(
            x.data_ptr(),
            delta,
            total,
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // hidden,
            hidden,
            eps,
            native_dtype(x.dtype),
            native_dtype(weight.dtype),
            torch.get_num_threads(),
        )


def supports_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these tensors."""
    return (
        is_available()
        and x.dtype in FLOAT_TYPES
        and cos.dtype == sin.dtype == torch.float32
        and x.device.type == cos.device.type == sin.device.type == "cpu"
        and x.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[0] == x.shape[0]
        and 2 * cos.shape[1] <= x.shape[2]
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; see `reference.rotate`."""
    if not supports_rotate(x, cos, sin):
        raise ValueError(f"rotate of {x.dtype} {tuple(x.shape)} by {cos.dtype} {tuple(cos.shape)} on {x.device}")
    tokens, heads, head_dim = x.shape
    if x.stride()[1:] != (head_dim, 1):
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        kernels().rotate(
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            tokens,
            x.stride(0),
            heads,
            head_dim,
            cos.shape[1],
            native_dtype(x.dtype),
            torch.get_num_threads(),
        )
    return out


def supports_swiglu(gate: Tensor, up: Tensor) -> bool:
    """Whether `swiglu` takes these tensors."""
    return (
        is_available()
        and gate.dtype == up.dtype
        and gate.dtype in FLOAT_TYPES
        and gate.device.type == up.device.type == "cpu"
        and gate.shape == up.shape
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) × up`; see `reference.swiglu`."""
    if not supports_swiglu(gate, up):
        raise ValueError(f"swiglu of {gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}")
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        kernels().swiglu(
            gate=gate.data_ptr(),
            up=up.data_ptr(),
            out=out.data_ptr(),
            elements=out.numel(),
            dtype=native_dtype(out.dtype),
            threads=torch.get_num_threads(),
        )
    return out


# How `draw` chooses a row's next token: ((top_k, temperature, top_p, min_p), seed, place).
#     top_k: 0, or as many as the vocabulary has or more: no limit
#     temperature: 0 takes the first of the largest logits, and the rest is not used
#     top_p, min_p: shares, as in `SamplingParams`
#     seed, place: of the number that decides; 0 to 2^64 - 1 each
DrawParams = tuple[tuple[int, float, float, float], int, int]


def draw(logits: Tensor, rows: Sequence[DrawParams]) -> list[int]:
    """The next token of each row of logits, float32 `[rows, vocabulary]`; -1 where one of them is not finite.

    Raises:
        ValueError: types, shapes or a `top_k` that do not fit.
    """
    from amalgam import _native

    shape = logits.shape
    if (
        len(shape) != 2
        or shape[0] != len(rows)
        or not shape[1]
        or logits.dtype is not torch.float32
        or not logits.is_cpu
    ):
        raise ValueError(f"draw {len(rows)} rows from {logits.dtype} {tuple(shape)} on {logits.device}")
    logits = logits.contiguous()
    return _native.draw(kernels(), logits.data_ptr(), shape[1], rows, torch.get_num_threads())


@functools.cache
def kernels() -> _native.Kernels:
    """The table of compiled functions for this processor.

    Raises:
        UnsupportedError: the extension is not available.
    """
    reason = why_unavailable()
    if reason is not None:
        raise UnsupportedError(reason)
    from amalgam import _native

    limit = native_isa_limit()
    allowed = NATIVE_ISAS if limit is None else NATIVE_ISAS[: NATIVE_ISAS.index(limit) + 1]
    return _native.kernels([isa for isa in _native.supported_isas() if isa in allowed][-1])


@functools.cache
def native_dtype(dtype: torch.dtype) -> _native.DType:
    """A floating type as the extension calls it."""
    from amalgam import _native

    return _native.DType[NAMES[dtype]]
