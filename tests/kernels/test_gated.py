"""Compiled blocks with a state compute what their reference does; chunks, neighbours and threads change no bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam import _native
from amalgam.kernels.backends.base import Compiled
from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.backends.cpu.backend import CpuBackend
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.layouts import dense
from amalgam.kernels.program import (
    Convolve,
    DeltaRule,
    Embed,
    Head,
    Instruction,
    Program,
    Project,
    Projection,
    Rows,
    ScaleBySigmoid,
    ScanStates,
    Split,
)
from amalgam.kernels.step import LayerCache, LayerState, SequenceState, StepContext, StepSequence
from amalgam.kernels.weights import PackedWeight
from tests.errors import raises

pytestmark = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))

LENGTHS = 70, 1, 37
SLOTS = 9
CPU = torch.device("cpu")


def whole(name: str, width: int, *, is_wide: bool = False) -> Rows:
    return Rows(name, width, 0, width, is_wide)


def prepared(backend: Any, weight: Tensor) -> PackedWeight:
    return backend.prepare(dense(weight), "bf16", codes=False)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Sizes:
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4
    kind: str = "delta"

    @property
    def decays(self) -> int:
        return self.value_heads * (self.key_dim if self.kind in ("rows", "bounded") else 1)

    @property
    def query(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        return 2 * self.query + self.value


class Net:
    """Embeddings, convolution, and delta rule or state space; a token's id is its place among the tokens of all.

    Args:
        decay, strength: what all gates are, before their functions; None: random.
    """

    def __init__(
        self,
        sizes: Sizes,
        dtype: torch.dtype = torch.float32,
        *,
        backend: Any = None,
        decay: float | None = None,
        strength: float | None = None,
    ) -> None:
        self.sizes, heads, decays = sizes, sizes.value_heads, sizes.decays
        width = decays + heads
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        backend = CpuBackend(dtype) if backend is None else backend
        mixed, gates = random(sum(LENGTHS), sizes.channels), 2 * random(sum(LENGTHS), width)
        for columns, value in (((0, decays), decay), ((decays, width), strength)):
            if value is not None:
                gates[:, slice(*columns)] = value
        self.convolve = Convolve(
            whole("mixed", sizes.channels), random(sizes.channels, sizes.taps), whole("convolved", sizes.channels), 0
        )
        out, wide, gated = self.convolve.out, whole("wide", width, is_wide=True), whole("gates", width)
        query, key = (out.columns(start, sizes.query) for start in (0, sizes.query))
        self.rule: DeltaRule | ScanStates
        if sizes.kind == "space":
            self.rule = ScanStates(
                key,
                query,
                out.columns(2 * sizes.query, sizes.value),
                wide.columns(0, heads),
                whole("out", sizes.value),
                layer_id=0,
                num_groups=sizes.key_heads,
                num_heads=heads,
                log_rate=random(heads),
                step_bias=random(heads),
                skip=random(heads),
                limits=(0.1, 3.0),
            )
        else:
            self.rule = DeltaRule(
                query,
                key,
                out.columns(2 * sizes.query, sizes.value),
                wide.columns(0, decays),
                (wide if dtype is torch.float32 else gated).columns(decays, heads),
                whole("out", sizes.value),
                layer_id=0,
                num_key_heads=sizes.key_heads,
                num_value_heads=heads,
                log_rate=random(heads),
                decay_bias=random(decays),
                bound=-5.0 if sizes.kind == "bounded" else None,
            )
        self._backend = backend
        self.program = self.compile(
            (
                Embed(dense(mixed.to(dtype)), whole("mixed", sizes.channels)),
                Embed(dense(gates.to(dtype)), gated),
                Project(gated, (Projection(prepared(backend, torch.eye(width, dtype=dtype)), None, wide),)),
                self.convolve,
                self.rule,
            )
        )
        self.state = LayerState(
            torch.full((SLOTS, sizes.taps - 1, sizes.channels), torch.nan),
            torch.full((SLOTS, heads, sizes.key_dim, sizes.value_dim), torch.nan),
        )
        layer = LayerCache(torch.zeros(128, 0, 0), torch.zeros(128, 0, 0))
        self.cache: Any = SimpleNamespace(
            layers=(layer,), states=(self.state,), indexes=(None,), block_size=128, device=CPU
        )

    def compile(self, instructions: tuple[Instruction, ...]) -> Compiled:
        head = Head(self.rule.out, prepared(self._backend, torch.zeros(1, self.rule.out.width)), None)
        return self._backend.compile(Program((*instructions, head)), [])  # type: ignore[no-any-return]

    def run(self, *shares: tuple[int, range, SequenceState]) -> list[Tensor]:
        """(Sequence, tokens, its state) in one step → the rule's rows of each."""
        sequences = []
        for index, tokens, state in shares:
            start = sum(LENGTHS[:index])
            sequences.append(StepSequence([start + token for token in tokens], tokens.start, [0], 0, state))
        self.program.run(StepContext(sequences, self.cache))
        return list(self.program.hidden().clone().split([len(tokens) for _, tokens, _ in shares]))


def at_once(net: Net) -> list[Tensor]:
    return net.run(*((index, range(n), SequenceState(None, index)) for index, n in enumerate(LENGTHS)))


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


SHAPES = [
    Sizes(2, 4, 16, 24),
    Sizes(1, 1, 64, 64, taps=3),
    Sizes(2, 2, 128, 128),
    Sizes(1, 3, 256, 64, taps=1),
    Sizes(3, 6, 24, 16, taps=2),
    Sizes(2, 4, 8, 6),
    Sizes(1, 2, 130, 250, taps=5),
    Sizes(2, 2, 32, 48, kind="bounded"),
    Sizes(2, 4, 24, 30, kind="rows"),
    Sizes(2, 4, 40, 64, kind="space"),
]


@cache
def of_the_reference(sizes: Sizes, dtype: torch.dtype) -> tuple[list[Tensor], LayerState]:
    """Rows and states, computed once for all instruction sets."""
    net = Net(sizes, dtype, backend=ReferenceBackend(dtype, CPU))
    return at_once(net), net.state


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_what_the_reference_computes(isa: str, sizes: Sizes, dtype: torch.dtype) -> None:
    assert extension.gated_kernels().isa == {"amx_emulated": "portable", "amx": "avx512"}.get(isa, isa)
    native = Net(sizes, dtype)
    assert set(native.program.describe().values()) == {f"native ({isa})"}
    expected, state = of_the_reference(sizes, dtype)
    for one, other in zip(at_once(native), expected, strict=True):
        assert one.dtype is dtype
        assert_close(one, other)
    for mine, other in zip(native.state, state, strict=True):
        assert_close(mine[:3].to(dtype), other[:3].to(dtype))
        assert mine[3:].isnan().all()


def assert_close(one: Tensor, other: Tensor) -> None:
    """By the largest element of the other."""
    if other.numel():
        error = (one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-30)
        assert float(error) < (1e-5 if one.dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("decay", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("strength", [-1e4, 1e4])
def test_gates_that_are_quite_open_or_shut(isa: str, decay: float, strength: float) -> None:
    sizes = Sizes(1, 2, 32, 48)
    native = Net(sizes, decay=decay, strength=strength)
    reference = Net(sizes, backend=ReferenceBackend(torch.float32, CPU), decay=decay, strength=strength)
    for one, other in zip(at_once(native), at_once(reference), strict=True):
        assert_close(one, other)
        assert one.any() == (strength > 0)


@pytest.mark.parametrize("sizes", [*SHAPES[:3], *SHAPES[7:]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_neighbours_and_threads_do_not_change_a_bit(threads: int, sizes: Sizes, dtype: torch.dtype) -> None:
    net = Net(sizes, dtype)
    alone = [net.run((index, range(n), SequenceState(None, index)))[0] for index, n in enumerate(LENGTHS)]
    states = [part[:3].clone() for part in net.state]
    for chunk in (1, 3, 32, 33, 69):
        parts: list[list[Tensor]] = [[], [], []]
        for start in range(0, max(LENGTHS), chunk):
            shares = [
                (index, range(start, min(start + chunk, n)), SequenceState(5 + index if start else None, 5 + index))
                for index, n in enumerate(LENGTHS)
                if start < n
            ]
            for (index, _, _), found in zip(shares, net.run(*shares), strict=True):
                parts[index].append(found)
        assert all(map(torch.equal, map(torch.cat, parts), alone)), chunk
        assert all(torch.equal(part[5:8], before) for part, before in zip(net.state, states, strict=True)), chunk


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        found.append(torch.cat(at_once(Net(SHAPES[2]))))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in pairwise(found))


@pytest.mark.parametrize("sizes", [SHAPES[0], SHAPES[2], SHAPES[3], *SHAPES[7:]], ids=str)
def test_states_are_saved_on_the_way_and_read_without_being_written(sizes: Sizes) -> None:
    net = Net(sizes)
    saves = ((1, 1), (16, 2), (33, 3), (64, 4), (70, 5))
    (expected,) = net.run((0, range(70), SequenceState(None, 0, saves)))
    kept = [part.clone() for part in net.state]
    assert all(torch.equal(part[0], part[5]) for part in net.state)
    for count, slot in saves[:-1]:
        found, _ = net.run((0, range(count, 70), SequenceState(slot, 6)), (0, range(70), SequenceState(None, 7)))
        assert torch.equal(found, expected[count:])
    assert all(torch.equal(part[:6], before[:6]) for part, before in zip(net.state, kept, strict=True))
    assert all(torch.equal(part[6], part[0]) for part in net.state)
    net.run((0, range(1, 3), SequenceState(1, 1, ((1, 8),))))  # from a slot into itself
    assert all(torch.equal(part[2:6], before[2:6]) for part, before in zip(net.state, kept, strict=True))
    (found,) = net.run((0, range(2, 70), SequenceState(8, 8)))
    assert torch.equal(found, expected[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_convolution_between_two_factors(isa: str, dtype: torch.dtype) -> None:
    """With a bias and without a SiLU, of columns of wider rows; the state holds what it has seen."""
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(sum(LENGTHS), 3 * 300, generator=generator).to(dtype)
    weight, bias = torch.randn(300, 3, generator=generator), torch.randn(300, generator=generator)
    x = whole("x", 900)
    results = []
    for backend in (CpuBackend(dtype), ReferenceBackend(dtype, CPU)):
        before, behind, mixed = (x.columns(start, 300) for start in (0, 300, 600))
        convolve = Convolve(
            mixed, weight, whole("out", 300), 0, bias=bias, before=before, behind=behind, activates=False
        )
        head = Head(convolve.out, prepared(backend, torch.zeros(1, 300, dtype=dtype)), None)
        program = backend.compile(Program((Embed(dense(table), x), convolve, head)), [])
        assert isinstance(backend, ReferenceBackend) or set(program.describe().values()) == {f"native ({isa})"}
        layer = LayerCache(torch.zeros(128, 0, 0), torch.zeros(128, 0, 0))
        state = LayerState(torch.zeros(2, 2, 300), torch.zeros(2, 0, 0, 0))
        cache: Any = SimpleNamespace(layers=(layer,), states=(state,), indexes=(None,), block_size=128, device=CPU)
        found = []
        for first, end in ((0, 37), (37, 70)):
            share = SequenceState.of(1, first)
            program.run(StepContext([StepSequence(list(range(first, end)), first, [0], 0, share)], cache))
            found.append(program.hidden().float().clone())
        results.append((torch.cat(found), state.convolution[1].clone()))
    for one, other in zip(*results, strict=True):
        assert_close(one.to(dtype), other.to(dtype))
    gate, _, last = table[68:70].float().split(300, dim=1)
    torch.testing.assert_close(results[0][1], gate * last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_split_and_a_gate_for_each_element(isa: str, dtype: torch.dtype) -> None:
    """Two groups of 24 + 40 + 8 columns, of which two parts go beside each other, and one gates a share of another."""
    tokens, groups = sum(LENGTHS), 2
    table = torch.randn(tokens, 144, generator=torch.Generator().manual_seed(2)).to(dtype)
    x, third = whole("x", 144), whole("third", 16)
    first, second = Rows("joined", 128, 0, 48), Rows("joined", 128, 48, 80)
    results = []
    for backend in (CpuBackend(dtype), ReferenceBackend(dtype, CPU)):
        head = Head(whole("joined", 128), prepared(backend, torch.zeros(1, 128, dtype=dtype)), None)
        gates = (
            ScaleBySigmoid(first.columns(8, 16), third),
            ScaleBySigmoid(second.columns(0, 16), first.columns(8, 16)),
            ScaleBySigmoid(second.columns(16, 64), third.columns(0, 4)),
        )
        program = backend.compile(
            Program((Embed(dense(table), x), Split(x, groups, (first, second, third)), *gates, head)), []
        )
        assert isinstance(backend, ReferenceBackend) or set(program.describe().values()) == {f"native ({isa})"}
        layer = LayerCache(torch.zeros(128, 0, 0), torch.zeros(128, 0, 0))
        cache: Any = SimpleNamespace(layers=(layer,), states=(None,), indexes=(None,), block_size=128, device=CPU)
        program.run(StepContext([StepSequence(list(range(tokens)), 0, [0], 0)], cache))
        results.append(program.hidden().float())
    torch.testing.assert_close(results[0], results[1], rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
    untouched = table.view(tokens, groups, 72)[:, :, :24].flatten(1)[:, 24:].float()
    assert torch.equal(results[0][:, 24:48], untouched)


def test_states_that_do_not_fit_are_refused_before_anything_is_written() -> None:
    net = Net(SHAPES[0])
    for error, state, named in (
        (IndexError, SequenceState(None, SLOTS), (SLOTS,)),
        (IndexError, SequenceState(SLOTS, 0), (SLOTS,)),
        (ValueError, SequenceState(-1, 0), (-1,)),
        (IndexError, SequenceState(None, -1), (-1,)),
        (IndexError, SequenceState(None, 0, ((1, SLOTS),)), (SLOTS,)),
        (ValueError, SequenceState(None, 0, ((5, 1), (5, 2))), (5,)),
        (ValueError, SequenceState(None, 0, ((0, 1),)), (0,)),
        (ValueError, SequenceState(None, 0, ((71, 1),)), (71, 70)),
    ):
        with raises(error, *named):
            net.run((0, range(70), state))
    with raises(ValueError, "state"):
        net.program.run(StepContext([StepSequence([0], 0, [0], 0)], net.cache))
    for states in (
        (None,),
        (),
        (LayerState(net.state.convolution[:, 1:].contiguous(), net.state.recurrent),),
        (LayerState(net.state.convolution, net.state.recurrent[..., 1:].contiguous()),),
    ):
        net.cache.states = states
        with raises(ValueError, "layer 0", "state"):
            net.run((0, range(70), SequenceState(None, 0)))
    assert net.state.convolution.isnan().all() and net.state.recurrent.isnan().all()


def test_instructions_that_do_not_fit_together_are_refused() -> None:
    net = Net(SHAPES[0])
    rule, convolve = net.rule, net.convolve
    assert isinstance(rule, DeltaRule)
    for wrong in (
        replace(rule, num_key_heads=3),
        replace(rule, num_value_heads=3),
        replace(rule, query=rule.query.columns(0, 16)),
        replace(rule, decay=rule.decay.columns(0, 2)),
        replace(rule, out=rule.value),
        replace(rule, log_rate=torch.zeros(3)),
        replace(convolve, weight=convolve.weight[1:]),
        replace(convolve, out=convolve.x),
        ScaleBySigmoid(rule.out, rule.out.columns(0, 17)),
        Split(convolve.x, 3, (convolve.out,)),
        Split(convolve.x, 2, (rule.value,)),
        Split(convolve.x, 2, (convolve.x,)),
    ):
        with raises(ValueError):
            net.compile((wrong,))
            pytest.fail(f"took {wrong}")


def test_states_of_other_types_are_refused() -> None:
    net = Net(SHAPES[0])
    caches = [((layer.keys, None), (layer.values, None)) for layer in net.cache.layers]
    wrong = [
        (net.state.convolution.double(), net.state.recurrent),
        (net.state.convolution, net.state.recurrent.bfloat16()),
        (net.state.convolution, net.state.recurrent[1:]),
        (net.state.convolution[:, :, 1:], net.state.recurrent),
        (net.state.convolution[0], net.state.recurrent),
    ]
    for state in wrong:
        with raises(ValueError):
            _native.StepMemory(caches, 128, [], 128, [state], [])
    with raises(ValueError):
        _native.StepMemory(caches, 128, [], 128, [net.state, LayerState(*(part[1:] for part in net.state))], [])
