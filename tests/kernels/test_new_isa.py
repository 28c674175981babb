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
    """Without optimisation, and only what products need: a full build takes minutes. The new instruction set compiles
    with every format, and what is run has those that it multiplies with alone."""
    tree = tmp_path / "csrc"
    shutil.copytree(CSRC, tree)
    for header in blocks("cpp"):
        name = header.removeprefix("// ").partition(":")[0]
        (tree / ("isa" if name == "toy.h" else "formats") / name).write_text(header, encoding="utf-8")
    table = dict(map(changed, blocks("diff")))["src/amalgam/kernels/csrc/formats/table.h"]
    (tree / "formats" / "table.h").write_text(table, encoding="utf-8")
    shutil.copy(Path(__file__).with_name("new_isa.cpp"), tree)

    def compiled(source: str, isa: str, part: int, name: str) -> str:
        definitions = (f"-DAMALGAM_ISA={isa}", f"-DAMALGAM_PART={part}")
        flags = ["-std=c++17", "-O0", "-ffp-contract=off", f"-I{tree}", *definitions]
        out = str(tmp_path / f"{name}.o")
        subprocess.run([str(COMPILER), *flags, "-c", str(tree / source), "-o", out], check=True)
        return out

    def units_of(isa: str) -> list[tuple[str, str, int]]:
        return [("isa/products.cpp", isa, 0), *(("isa/formats.cpp", isa, part) for part in range(3))]

    for number, unit in enumerate(units_of("toy")):
        compiled(*unit, f"every_format_{number}")
    start, end = table.index("FormatList<  //"), table.index(">;", table.index("FormatList<  //"))
    assert all(f" {name}" in table[start:end] for name in FORMATS)
    (tree / "formats" / "table.h").write_text(f"{table[:start]}FormatList<{', '.join(FORMATS)}{table[end:]}")
    units = [(source, "portable", 0) for source in (*BASELINE, "new_isa.cpp")]
    units += units_of("portable") + units_of("toy")
    objects = [compiled(*unit, str(number)) for number, unit in enumerate(units)]
    program = str(tmp_path / "main")
    subprocess.run([str(COMPILER), *objects, "-o", program, "-pthread"], check=True)
    run = subprocess.run([program], check=False, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("toy\n", 0)
