"""A function that does nothing but prefetch is not dropped by the compiler."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

CSRC = ROOT / "src" / "amalgam" / "kernels" / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
# GCC drops a call of what it takes for a function without effect.
SOURCE = """
#include "isa/x86_prefetch.h"
namespace amalgam {
namespace {
__attribute__((noinline)) void next(const uint8_t* line) { prefetch(line); prefetch_far(line + 8192); }
}
int64_t read(const uint8_t* lines, int64_t count) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) { next(lines + i * 64 + 4096); sum += lines[i * 64]; }
    return sum;
}
}
"""


@pytest.mark.skipif(COMPILER is None or platform.machine() not in ("x86_64", "AMD64"), reason="no C++ compiler for x86")
def test_a_function_that_only_prefetches_is_called() -> None:
    assert COMPILER is not None
    flags = ("-std=c++17", "-O3", f"-I{CSRC}", "-x", "c++", "-S", "-o", "-", "-")
    built = subprocess.run([COMPILER, *flags], input=SOURCE, capture_output=True, text=True, check=True)
    assert re.findall(r"\bprefetch\w+", built.stdout) == ["prefetcht0", "prefetcht1"]
    assert re.search(r"\bcallq?\b", built.stdout)
