"""The instruction set of `docs/extending.md`: its header and its line of CMake, compiled and run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

CSRC = ROOT / "src" / "amalgam" / "kernels" / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
BASELINE = (
    "product/packing.cpp",
    "product/linear.cpp",
    "formats/bf16_coding.cpp",
    "runtime/arena.cpp",
    "runtime/placement.cpp",
    "runtime/pool.cpp",
)


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_list_of_instruction_sets_takes_one_more_line() -> None:
    (change,) = blocks("diff")
    lines = change.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    assert before in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert [line for line in lines if line.startswith("+")] == ["+add_isa(toy)"]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_one_header_is_an_instruction_set(tmp_path: Path) -> None:
    """Without optimisation, and only what products need: a full build takes minutes."""
    (header,) = blocks("cpp")
    tree = tmp_path / "csrc"
    shutil.copytree(CSRC, tree)
    (tree / "isa" / "toy.h").write_text(header, encoding="utf-8")
    shutil.copy(Path(__file__).with_name("new_isa.cpp"), tree)
    units = [(source, "portable") for source in (*BASELINE, "new_isa.cpp", "isa/products.cpp")]
    units.append(("isa/products.cpp", "toy"))
    objects = [str(tmp_path / f"{number}.o") for number in range(len(units))]
    for (source, isa), out in zip(units, objects, strict=True):
        flags = ["-std=c++17", "-O0", "-ffp-contract=off", f"-I{tree}", f"-DAMALGAM_ISA={isa}"]
        subprocess.run([str(COMPILER), *flags, "-c", str(tree / source), "-o", out], check=True)
    program = str(tmp_path / "main")
    subprocess.run([str(COMPILER), *objects, "-o", program, "-pthread"], check=True)
    run = subprocess.run([program], check=False, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("toy\n", 0)
