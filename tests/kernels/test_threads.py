"""Any number of threads gives the same bits; where they run and where weights lie changes nothing else."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from amalgam import _native
from amalgam.base.processors import Core, usable_cores
from amalgam.kernels.backends.cpu import panels
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.cpu.threads import arrange, processors_of
from tests.conftest import ROOT
from tests.kernels.test_moe import HIDDEN, mixed_experts, packed, random, routing
from tests.kernels.test_panels import activations
from tests.kernels.weights import coded, every_layout

linear, moe = CpuOperators.linear, CpuOperators.moe
COMPILER = shutil.which("g++") or shutil.which("clang++")
TWO_NODES = (Core((0, 4), 0), Core((1, 5), 0), Core((2, 6), 1), Core((3, 7), 1))


@pytest.fixture(params=[0, 64], ids=["as many as processors", "all"])
def most_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """No more threads than there are processors, and as many as are asked for."""
    _native.limit_threads(request.param)
    yield request.param
    _native.limit_threads(0)


@pytest.fixture
def two_nodes() -> Iterator[list[tuple[int, list[int]]]]:
    """This machine's processors as those of two nodes; everything is as before at the end."""
    cpus = [cpu for core in usable_cores() for cpu in core.cpus]
    half = max(1, len(cpus) // 2)
    yield [(0, cpus[:half]), (1, cpus[half:] or cpus)]
    _native.place_weights(_native.Placement.anywhere, [])
    _native.bind_threads([])


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_pool_does_every_item_once(tmp_path: Path) -> None:
    csrc, program = ROOT / "src" / "amalgam" / "kernels" / "csrc", str(tmp_path / "pool")
    sources = [str(Path(__file__).with_name("pool.cpp")), str(csrc / "runtime" / "pool.cpp")]
    subprocess.run([str(COMPILER), "-std=c++17", "-O1", f"-I{csrc}", *sources, "-o", program, "-pthread"], check=True)
    run = subprocess.run([program], check=False, capture_output=True, text=True, timeout=300)
    assert (run.stdout, run.returncode) == ("", 0)


@pytest.mark.usefixtures("most_threads")
def test_products_have_the_same_bits_on_any_number_of_threads(use_threads: Callable[[int], None]) -> None:
    table = packed(mixed_experts(7, has_bias=True))
    ids, weights = routing(60, 7, 3)
    layouts = {name: panels.prepare(weight) for name, weight in every_layout((130, 264)).items()}
    x, y = random(60, HIDDEN).bfloat16(), activations(150, 264, torch.bfloat16)
    use_threads(1)
    mixed = [moe(x[:rows], ids[:rows], weights[:rows], table) for rows in (1, 16, 60)]
    products = {name: [linear(y[:rows], weight) for rows in (1, 150)] for name, weight in layouts.items()}
    for threads in (2, 8, 16, 64):
        use_threads(threads)
        for expected, rows in zip(mixed, (1, 16, 60), strict=True):
            assert torch.equal(moe(x[:rows], ids[:rows], weights[:rows], table), expected), threads
        for name, weight in layouts.items():
            for expected, rows in zip(products[name], (1, 150), strict=True):
                assert torch.equal(linear(y[:rows], weight), expected), (name, threads)


@pytest.mark.parametrize("placement", list(_native.Placement), ids=lambda placement: placement.name)
def test_weights_are_the_same_wherever_they_lie(
    placement: _native.Placement,
    two_nodes: list[tuple[int, list[int]]],
    use_threads: Callable[[int], None],
) -> None:
    layouts = {**every_layout((130, 264)), "coded": coded((4096, 520))}
    expected = {name: panels.prepare(weight) for name, weight in layouts.items()}
    nodes = two_nodes if placement is _native.Placement.local else two_nodes[:1]
    try:
        _native.place_weights(placement, nodes)
    except RuntimeError as refused:
        pytest.skip(str(refused))
    for _ in range(2):  # the second time in memory that others had before
        placed = {name: panels.prepare(weight) for name, weight in layouts.items()}
        for name, weight in placed.items():
            one, other = (torch.cat([run.flatten() for run in each.runs]) for each in (weight, expected[name]))
            assert torch.equal(one, other), name
            x = activations(9, weight.shape[1], torch.bfloat16)
            use_threads(1)
            alone = linear(x, expected[name])
            for threads in (2, 8):
                use_threads(threads)
                assert torch.equal(linear(x, weight), alone), (name, threads)


def test_a_processor_that_is_not_there_is_refused(two_nodes: list[tuple[int, list[int]]]) -> None:
    with pytest.raises(RuntimeError):
        _native.place_weights(_native.Placement.local, [two_nodes[0], (1, [16000])])
    packed(mixed_experts(1))  # goes on as before


def test_threads_are_spread_over_the_nodes() -> None:
    assert processors_of(4, TWO_NODES, True) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert processors_of(2, TWO_NODES, True) == [[0, 4], [2, 6]]
    assert processors_of(2, TWO_NODES, False) == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert processors_of(8, TWO_NODES, True)[::2] == [[0, 4], [1, 5], [2, 6], [3, 7]]


class Asked:
    """What the extension was asked for, and what it refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: Sequence[str] = ()) -> None:
        self.calls: list[tuple[object, ...]] = []
        for name in ("place_weights", "bind_threads"):
            monkeypatch.setattr(_native, name, self._asked(name, refused))

    def _asked(self, name: str, refused: Sequence[str]) -> Callable[..., None]:
        def ask(*arguments: object) -> None:
            self.calls.append(arguments)
            if name in refused and arguments != (_native.Placement.anywhere, []):
                raise RuntimeError("mbind: Operation not permitted")

        return ask


def test_settings_reach_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    nodes = [(0, [0, 4, 1, 5]), (1, [2, 6, 3, 7])]
    arrange(2, "local", False, TWO_NODES)
    arrange(2, "interleaved", True, TWO_NODES)
    arrange(2, "off", False, TWO_NODES)
    arrange(2, "local", False, TWO_NODES[:2])  # one node
    assert asked.calls == [
        (_native.Placement.local, nodes),
        ([[0, 4, 1, 5], [2, 6, 3, 7]],),
        (_native.Placement.interleaved, nodes),
        ([[0, 4], [2, 6]],),
        (_native.Placement.anywhere, nodes),
        ([],),
        (_native.Placement.anywhere, nodes[:1]),
        ([],),
    ]


def test_a_system_that_refuses_is_named_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Asked(monkeypatch, ("place_weights", "bind_threads"))
    with caplog.at_level(logging.WARNING):
        arrange(2, "interleaved", True, TWO_NODES)
    assert asked.calls[1] == (_native.Placement.anywhere, [])
    placing, binding = (record.getMessage() for record in caplog.records)
    assert "engine.numa is interleaved" in placing and "mbind" in placing and "--cap-add SYS_NICE" in placing
    assert "run anywhere" in binding
