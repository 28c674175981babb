"""The instructions of a gated delta net: what they compute, and that neither chunks nor neighbours change a bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends.reference.execution import execute
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.program import Convolve, DeltaRule, Rows, ScaleBySigmoid, Split
from amalgam.kernels.step import LayerState, SequenceState, StepContext, StepSequence

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, WIDTH = 2, 4, 8, 6, 4
QUERY, VALUE = KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM
CHANNELS = 2 * QUERY + VALUE
MIXED = Rows("mixed", CHANNELS, 0, CHANNELS)
CONVOLVED = Rows("convolved", CHANNELS, 0, CHANNELS)


def whole(name: str, width: int) -> Rows:
    return Rows(name, width, 0, width)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CONVOLVE = Convolve(MIXED, random(CHANNELS, WIDTH), CONVOLVED, 0)
RULE = DeltaRule(
    CONVOLVED.columns(0, QUERY),
    CONVOLVED.columns(QUERY, QUERY),
    CONVOLVED.columns(2 * QUERY, VALUE),
    whole("decay", VALUE_HEADS),
    whole("strength", VALUE_HEADS),
    whole("out", VALUE),
    layer_id=0,
    num_key_heads=KEY_HEADS,
    num_value_heads=VALUE_HEADS,
    log_rate=random(VALUE_HEADS),
    decay_bias=random(VALUE_HEADS) + 1,
)
LENGTHS = 19, 11
INPUTS = [
    {"mixed": random(n, CHANNELS), "decay": random(n, VALUE_HEADS), "strength": random(n, VALUE_HEADS) * 2}
    for n in LENGTHS
]


class Net:
    """Runs steps of convolution and delta rule, as `[(sequence, tokens, its state)]`."""

    def __init__(self, num_slots: int = 8) -> None:
        self.state = LayerState(
            torch.full((num_slots, WIDTH - 1, CHANNELS), torch.nan),
            torch.full((num_slots, VALUE_HEADS, KEY_DIM, VALUE_DIM), torch.nan),
        )

    def run(self, *shares: tuple[int, range, SequenceState], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        sequences = [StepSequence([0] * len(tokens), tokens.start, [], 0, state) for _, tokens, state in shares]
        cache = SimpleNamespace(states=(self.state,), device=torch.device("cpu"))
        frame = Frame(StepContext(sequences, cache), dtype, [])
        for name, width in (("mixed", CHANNELS), ("decay", VALUE_HEADS), ("strength", VALUE_HEADS)):
            rows = [INPUTS[index][name][tokens.start : tokens.stop] for index, tokens, _ in shares]
            frame.put(whole(name, width), torch.cat(rows).to(dtype))
        execute(CONVOLVE, frame)
        execute(RULE, frame)
        return list(frame.get(RULE.out).split([len(tokens) for _, tokens, _ in shares]))


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return [Net().run((index, range(n), SequenceState(None, 0)))[0] for index, n in enumerate(LENGTHS)]


def by_hand(inputs: dict[str, Tensor]) -> Tensor:
    """One sequence in float64, channel by channel and head by head."""
    mixed = inputs["mixed"].double()
    padded = torch.cat((torch.zeros(WIDTH - 1, CHANNELS, dtype=torch.float64), mixed))
    taps = CONVOLVE.weight.double()
    convolved = torch.stack([(padded[t : t + WIDTH] * taps.t()).sum(0) for t in range(len(mixed))])
    convolved = torch.nn.functional.silu(convolved)
    rate = -RULE.log_rate.double().exp() * torch.nn.functional.softplus(inputs["decay"].double() + RULE.decay_bias)
    results = torch.empty(len(mixed), VALUE_HEADS, VALUE_DIM, dtype=torch.float64)
    for head in range(VALUE_HEADS):
        start = head // (VALUE_HEADS // KEY_HEADS) * KEY_DIM
        state = torch.zeros(KEY_DIM, VALUE_DIM, dtype=torch.float64)
        for t, row in enumerate(convolved):
            query, key = row[start : start + KEY_DIM], row[QUERY + start : QUERY + start + KEY_DIM]
            query, key = (x / (x.square().sum() + 1e-6).sqrt() for x in (query, key))
            value = row[2 * QUERY :].view(VALUE_HEADS, VALUE_DIM)[head]
            state = rate[t, head].exp() * state
            strength = inputs["strength"][t, head].double().sigmoid()
            state = state + torch.outer(key, strength * (value - key @ state))
            results[t, head] = query @ state / KEY_DIM**0.5
    return results.flatten(1)


def test_the_recurrence(expected: list[Tensor]) -> None:
    for inputs, found in zip(INPUTS, expected, strict=True):
        torch.testing.assert_close(found.double(), by_hand(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 18])
def test_chunks_and_neighbours_do_not_change_a_bit(expected: list[Tensor], size: int) -> None:
    net, parts = Net(), [[], []]  # type: tuple[Net, list[list[Tensor]]]
    for start in range(0, max(LENGTHS), size):
        shares = [
            (index, range(start, min(start + size, n)), SequenceState(5 + index if start else None, 5 + index))
            for index, n in enumerate(LENGTHS)
            if start < n
        ]
        for (index, _, _), found in zip(shares, net.run(*shares), strict=True):
            parts[index].append(found)
    assert all(torch.equal(torch.cat(found), whole) for found, whole in zip(parts, expected, strict=True))


def test_states_are_saved_on_the_way_and_read_without_being_written(expected: list[Tensor]) -> None:
    net = Net()
    net.run((0, range(14), SequenceState(None, 1, ((1, 2), (9, 3)))))
    kept = [part[3].clone() for part in net.state]
    ahead, behind, again = (
        net.run((0, range(start, 19), SequenceState(source, 4)))[0] for source, start in ((1, 14), (2, 1), (3, 9))
    )
    assert torch.equal(ahead, expected[0][14:])
    assert torch.equal(behind, expected[0][1:])
    assert torch.equal(again, expected[0][9:])
    assert all(torch.equal(part[3], before) for part, before in zip(net.state, kept, strict=True))
    two = net.run((0, range(9, 12), SequenceState(3, 5)), (0, range(9, 19), SequenceState(3, 6)))
    assert torch.equal(two[0], expected[0][9:12]) and torch.equal(two[1], expected[0][9:])


def test_bfloat16_activations_leave_a_wide_state() -> None:
    wide, narrow = Net(), Net()
    expected = wide.run((0, range(19), SequenceState(None, 0)))[0]
    found = narrow.run((0, range(19), SequenceState(None, 0)), dtype=torch.bfloat16)[0]
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)
    assert narrow.state.recurrent.dtype is torch.float32 and narrow.state.recurrent[0].isfinite().all()


def test_split_and_a_gate_for_each_element() -> None:
    frame = Frame(StepContext([], SimpleNamespace()), torch.float32, [])
    x = torch.arange(24.0).view(2, 12)  # two groups of 3 + 1 + 2 columns
    frame.put(whole("x", 12), x)
    first, second, third = Rows("joined", 8, 0, 6), Rows("joined", 8, 6, 2), whole("other", 4)
    execute(Split(whole("x", 12), 2, (first, second, third)), frame)
    assert frame.get(whole("joined", 8)).tolist() == [[0, 1, 2, 6, 7, 8, 3, 9], [12, 13, 14, 18, 19, 20, 15, 21]]
    assert frame.get(third).tolist() == [[4, 5, 10, 11], [16, 17, 22, 23]]
    execute(ScaleBySigmoid(third, first.columns(0, 4)), frame)
    gate = torch.tensor([[0.0, 1, 2, 6], [12, 13, 14, 18]]).sigmoid()
    torch.testing.assert_close(frame.get(third), torch.tensor([[4.0, 5, 10, 11], [16, 17, 22, 23]]) * gate)
