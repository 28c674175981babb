"""The compiled extension: whether it is there, its functions for this processor, its types.

Out: what the other modules of this room call. Must never know: tensors' meaning, plans, requests.

It is loaded at first use. It is absent where no C++ compiler was found at installation; then `why_unavailable` says
what to do, and the reference backend does the work.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from amalgam.config.environment import NATIVE_ISAS, native_isa_limit
from amalgam.errors import UnsupportedError

if TYPE_CHECKING:
    from amalgam import _native

FLOAT_TYPES = (torch.float32, torch.bfloat16)
# Of a KV cache.
CACHE_TYPES = (*FLOAT_TYPES, torch.float16, torch.int8, torch.float8_e4m3fn)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Of scales in panels.
SCALE_NAMES = {**NAMES, torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e8m0fnu: "float8_e8m0fnu"}
_REMEDY = (
    "Install a C++17 compiler (g++ or clang++) and Python's headers, then run `pip install -e .` in the project's "
    "folder again; until then PyTorch's operators do the work."
)


@functools.cache
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
    """Instruction set in use, one of `NATIVE_ISAS`. `AMALGAM_NATIVE_ISA` lowers it.

    Raises:
        UnsupportedError: the extension is not available.
        ConfigError: `AMALGAM_NATIVE_ISA` has a value that is not allowed.
    """
    return kernels().isa


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
    found = _native.supported_isas()  # slowest first
    if limit is not None:
        allowed = NATIVE_ISAS[: NATIVE_ISAS.index(limit) + 1]
        found = [isa for isa in found if isa in allowed]
    return _native.kernels(found[-1])


def gated_kernels() -> _native.GatedKernels:
    """The compiled functions of a gated delta net for the instruction set in use."""
    from amalgam import _native

    return _native.gated_kernels(isa())


@functools.cache
def native_dtype(dtype: torch.dtype) -> _native.DType:
    """A floating type as the extension calls it."""
    from amalgam import _native

    return _native.DType[SCALE_NAMES[dtype]]
