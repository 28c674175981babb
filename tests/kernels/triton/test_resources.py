"""What kernels take of each kind of card, as Triton and its ptxas compile them; no card is needed.

Nothing is compiled in a process in which Triton interprets: they run in one of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton")

from amalgam.kernels.backends.triton.resources import SHARED_LIMIT

SAMPLE = "^(gate and up int4, tokens=1|down bf16, tokens=512)$"  # codes, and floats
MOST_REGISTERS = 255
# What all kernels stay below. Those of prompts spill where the older instruction wants its operands in registers.
MOST_SPILLED, MOST_SPILLED_BY_PROMPTS = 64, 768
IS_ASKED_FOR = os.environ.get("AMALGAM_TEST_ALL_KERNELS") == "1"


def measured(*arguments: str) -> list[dict[str, object]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_kernels.py", "--json", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return list(json.loads(done.stdout))


def check(found: list[dict[str, object]]) -> None:
    for one in found:
        is_of_prompts = str(one["kernel"]).endswith("=512") and int(str(one["capability"])) < 90
        assert int(str(one["spills"])) <= (MOST_SPILLED_BY_PROMPTS if is_of_prompts else MOST_SPILLED), one
        assert 0 < int(str(one["registers"])) <= MOST_REGISTERS, one
        assert int(str(one["shared"])) <= SHARED_LIMIT[int(str(one["capability"]))], one


def test_a_sample() -> None:
    found = measured("--capability", "80", "--capability", "90", "--only", SAMPLE)
    check(found)
    assert len(found) == 4
    products = {(one["kernel"], one["capability"]): one["product"] for one in found}
    # Codes are multiplied by the instruction that reads 16 bytes of them at a time, floats by the card's own.
    assert products["gate and up int4, tokens=1", 90] == "mma.m16n8k16"
    assert str(products["down bf16, tokens=512", 90]).startswith("wgmma")


@pytest.mark.skipif(not IS_ASKED_FOR, reason="takes minutes; AMALGAM_TEST_ALL_KERNELS=1 asks for it")
@pytest.mark.timeout(3600)
def test_all() -> None:
    check(measured())
