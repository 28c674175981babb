"""What a card is to be measured with: the parts of it that need no card."""

from __future__ import annotations

import sys

import pytest
import torch

from amalgam.kernels.backends import choose_backend
from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import gpu

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scale() -> gpu.Scale:
    return gpu.scale_of(True, 0)


@pytest.mark.parametrize("plan", ["bf16", "int8", "mixed"])
def test_weights_of_every_plan_are_small_numbers(scale: gpu.Scale, plan: str) -> None:
    version = gpu.version_of(scale.spec, plan, choose_backend(torch.float32, CPU), CPU)
    for slot in scale.spec.slots:
        weight = version[slot.name]
        if weight.layout.unpack is not None and len(slot.shape) == 2:
            assert 0.005 < float(weight.dequantize(torch.float32).std()) < 0.08, slot.name


def test_a_layer_is_compared_with_float32(scale: gpu.Scale) -> None:
    figure = gpu.check(scale, gpu.Place(CPU, None, None), "mixed")
    assert figure.is_met and figure.value is not None and figure.value > 0


def test_operations_of_a_prompt(scale: gpu.Scale) -> None:
    spec, length = scale.spec, 100
    attention = 2 * 256 * (128 + 64 + 64) + 2 * 128 * 256
    experts = 2 * 2 * 3 * 128 * 256  # two of them for a token
    assert gpu.prompt_operations(spec, length) == pytest.approx(
        length * (attention + experts + 2 * 8 * 256) + 4 * 128 * length * (length + 1) / 2
    )


def test_mixed_is_held_against_its_parts_by_their_bytes(scale: gpu.Scale) -> None:
    high, low, mixed = (gpu.step_bytes(scale, plan, 2) for plan in ("fp8", "int4", "mixed"))
    assert low < mixed < high
    steps = {"fp8": {2: high}, "int4": {2: low}, "mixed": {2: 1.2 * mixed}}  # as fast as memory, but for the mixed one
    report = gpu.Report(8.0)
    gpu.compare_mixed(scale, gpu.Place(torch.device("cuda"), None, None), steps, report)
    (figure,) = report.figures
    assert figure.value == pytest.approx(1.2) and figure.is_met is False


def test_what_there_is_no_time_for_is_said(scale: gpu.Scale) -> None:
    report = gpu.Report(0.0)
    assert not report.has_time_for("decode", 1.0)
    assert report.figures[0].value is None and report.figures[0].note
