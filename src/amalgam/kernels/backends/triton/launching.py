"""What every kernel of the room needs around its launch, and what all of them compute alike.

In: tensors. Out: the device they are launched on; functions for use inside kernels. Must never know: weights, programs.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whether kernels run in Triton's interpreter, on a CPU.
IS_INTERPRETED: bool = triton.knobs.runtime.interpret
_WIDENS = tl.constexpr(IS_INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)


def runs_on(*tensors: Tensor) -> bool:
    """Whether kernels can read these tensors: all on one CUDA device, or under the interpreter on the CPU."""
    kind = "cpu" if IS_INTERPRETED else "cuda"
    return all(tensor.device.type == kind and tensor.device == tensors[0].device for tensor in tensors)


@functools.cache
def why_no_launch() -> str | None:
    """Why Triton cannot launch anything in this environment; None if it can, or interprets.

    What reads a launch's arguments is C, which is compiled where it runs, once: that wants a compiler, and Python's
    headers. Better known before a step needs it.
    """
    if IS_INTERPRETED:
        return None
    try:
        triton.runtime.driver.active.utils  # noqa: B018, which builds it
    except Exception as error:  # of whatever was missing: a compiler, a header, the driver's library
        return f"Triton takes a C compiler and Python's headers, and failed with {type(error).__name__}: {error}"
    return None


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 if n <= 1 else 1 << (n - 1).bit_length()


@triton.jit
def product(a, b, total):
    """total + a @ b, summed in float32: tensor cores for 16-bit operands, no rounding of float32 ones.

    The interpreter keeps bfloat16 as integers and would multiply those; widened, the products are the same.
    """
    if _WIDENS:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def nearest_even(x):
    """x rounded to integers, halves to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def rounded(x, to):
    """float32 x in another floating type, rounded to nearest even. The interpreter's own cast to bfloat16 cuts off."""
    if _WIDENS and to == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        up = tl.where(x == x, 0x7FFF + ((bits >> 16) & 1), 0)  # a NaN stays one
        return ((bits + up) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(to)
