"""What kernels take of a card, without one: compiled ahead of time for a kind of card, by Triton and its own ptxas.

In: variants. Out: registers, shared memory and spills. Must never know: weights, programs, whether there is a card.

Not in a process whose Triton interprets.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from amalgam.kernels.backends.triton.kinds import Kind, expands_e4m3
from amalgam.kernels.backends.triton.numbers import OPTIONS
from amalgam.kernels.backends.triton.variants import Variant

# Compute capabilities → one card of each, and the shared memory that one program of it may have, in bytes (CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability").
CARDS = {80: "A100", 89: "L40S, RTX 4090", 90: "H100, H200", 100: "B200"}
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """Of one program.

    Attributes:
        registers: of one thread.
        shared: bytes.
        spills: bytes that a thread stores and loads for want of registers.
        product: the instruction that multiplies tiles; empty if there is none.
    """

    registers: int
    shared: int
    spills: int
    product: str


def measure(variant: Variant, capability: int) -> Resources:
    """Compile a variant for a compute capability, 90 for 9.0.

    Raises:
        triton.CompilationError: the kernel cannot be compiled for it.
        RuntimeError: neither can what Triton made of it.
    """
    kernel = triton.compile(
        _source(variant, capability),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages, **OPTIONS},
    )
    ptx = str(kernel.asm["ptx"])
    log = _assembled(ptx, capability)
    used, spilled = _USED.search(log), _SPILLED.search(log)
    if used is None or spilled is None:
        raise RuntimeError(f"ptxas says nothing of what {variant.name} uses: {log!r}")
    product = re.search(r"(wgmma\.mma_async|tcgen05\.mma|mma)\S*\.(m\d+n\d+k\d+)|tcgen05\.mma", ptx)
    name = "" if product is None else ".".join(part for part in product.groups() if part) or product.group()
    return Resources(int(used[1]), int(kernel.metadata.shared), int(spilled[1]) + int(spilled[2]), name)


def _source(variant: Variant, capability: int) -> ASTSource:
    """As the launcher would describe it: pointers and sizes divisible by 16, where the kernel does not decline."""
    kernel = variant.kernel
    types = {name: variant.signature.get(name, "constexpr") for name in kernel.arg_names}
    declined = {
        parameter.name
        for parameter in kernel.params
        if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
    }
    places = [
        place
        for place, (name, kind) in enumerate(types.items())
        if name in variant.signature and name not in declined and kind[0] in "*i"
    ]
    constants = {name: _on_card(value, capability) for name, value in variant.constants.items()}
    return ASTSource(kernel, types, constants, {(place,): _DIVISIBLE for place in places})


def _on_card(value: object, capability: int) -> object:
    """A constant as it is on a card."""
    if isinstance(value, Kind) and value.values == "e4m3":
        return replace(value, is_native=expands_e4m3(capability))
    return value


def _assembled(ptx: str, capability: int) -> str:
    """What ptxas says about a kernel; the target is written in it."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None, ptx[:200]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [
                get_ptxas(capability).path,
                "-v",
                f"--gpu-name={target[1]}",
                str(source),
                "-o",
                str(source.with_suffix(".cubin")),
            ],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr}")
    return done.stderr
