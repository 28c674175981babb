"""The instruction set and the compiled format of `docs/extending.md`: their headers and tables, compiled and run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

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
# All parts of the formats in one unit: what is included takes longer to compile than a part.
PARTS = """
#include "isa/formats.cpp"
namespace amalgam {
inline namespace AMALGAM_ISA {
template const FormatKernels* kernels_in_part<1>(Format format);
template const FormatKernels* kernels_in_part<2>(Format format);
}  // namespace AMALGAM_ISA
}  // namespace amalgam
"""
FORMATS = ("Int8", "Bf16", "Fp32", "CodedBf16", "FloatTable4", "Codebooks", "Fp8E5m2")  # what the sources above name


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def changed(change: str) -> tuple[str, str]:
    """A file's name, and its text after a change: `--- NAME`, and hunks that each begin with `@@`."""
    head, *hunks = re.split(r"^@@\n", change, flags=re.MULTILINE)
    name = head.removeprefix("--- ").strip()
    text = (ROOT / name).read_text(encoding="utf-8")
    for hunk in hunks:
        before, after = (
            "".join(line[1:] for line in hunk.splitlines(keepends=True) if not line.startswith(added))
            for added in ("+", "-")
        )
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return name, text


def test_the_list_of_instruction_sets_takes_one_more_line() -> None:
    [change] = [change for change in blocks("diff") if "CMakeLists.txt" in change]
    name, text = changed(change)
    assert text.replace("add_isa(toy)\n", "") == (ROOT / name).read_text(encoding="utf-8")


def test_weights_of_a_new_compiled_format_are_told_by_their_layout_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = dict(map(changed, blocks("diff")))
    layouts = types.ModuleType("layouts")
    monkeypatch.setitem(sys.modules, "layouts", layouts)  # where a dataclass looks its module up
    exec(compile(texts["src/amalgam/kernels/layouts.py"], "layouts", "exec"), layouts.__dict__)  # noqa: S102 - our own
    panels = layouts.LAYOUTS["panels_fp8_e5m2"]
    assert layouts.SCALED8.panels[torch.float8_e5m2] is panels
    listed = re.search(r"FormatList<  //(.*?)>;", texts["src/amalgam/kernels/csrc/formats/table.h"], re.DOTALL)
    assert listed is not None
    number = listed[1].count(",")  # how many stand before the last one
    assert f"    fp8_e5m2 = {number}\n" in texts["src/amalgam/_native.pyi"]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_one_header_is_an_instruction_set_and_one_a_format(tmp_path: Path) -> None:
    """Without optimisation, and only what products need: a full build takes minutes. With every format the new
    instruction set is checked as far as errors go, and what is run has those that it multiplies with alone."""
    tree = tmp_path / "csrc"
    shutil.copytree(CSRC, tree)
    for header in blocks("cpp"):
        name = header.removeprefix("// ").partition(":")[0]
        (tree / ("isa" if name == "toy.h" else "formats") / name).write_text(header, encoding="utf-8")
    table = dict(map(changed, blocks("diff")))["src/amalgam/kernels/csrc/formats/table.h"]
    (tree / "formats" / "table.h").write_text(table, encoding="utf-8")
    (tree / "parts.cpp").write_text(PARTS, encoding="utf-8")
    shutil.copy(Path(__file__).with_name("new_isa.cpp"), tree)

    def compile_unit(source: str, isa: str, *flags: str) -> None:
        definitions = (f"-DAMALGAM_ISA={isa}", "-DAMALGAM_PART=0")
        command = [str(COMPILER), "-std=c++17", "-O0", "-ffp-contract=off", f"-I{tree}", *definitions, *flags]
        subprocess.run([*command, str(tree / source)], check=True)

    compile_unit("parts.cpp", "toy", "-fsyntax-only")  # which instantiates all templates
    start, end = table.index("FormatList<  //"), table.index(">;", table.index("FormatList<  //"))
    assert all(f" {name}" in table[start:end] for name in FORMATS)
    (tree / "formats" / "table.h").write_text(f"{table[:start]}FormatList<{', '.join(FORMATS)}{table[end:]}")
    units = [(source, "portable") for source in (*BASELINE, "new_isa.cpp")]
    units += [(source, isa) for isa in ("portable", "toy") for source in ("isa/products.cpp", "parts.cpp")]
    objects = [str(tmp_path / f"{number}.o") for number in range(len(units))]
    for unit, file in zip(units, objects, strict=True):
        compile_unit(*unit, "-c", "-o", file)
    program = str(tmp_path / "main")
    subprocess.run([str(COMPILER), *objects, "-o", program, "-pthread"], check=True)
    run = subprocess.run([program], check=False, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("toy\n", 0)
