"""Recorded steps: what is copied where, who shares a recording, what runs as before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from amalgam.kernels.step import Cache, LayerCache, LayerState, SequenceState, StepContext, StepSequence
from amalgam.models.kv_cache import KVCache

pytest.importorskip("triton")

from amalgam.kernels.backends.triton.graphs import (
    SIZES,
    CapturedProgram,
    Outputs,
    RecordedStep,
    Recordings,
)
from amalgam.kernels.backends.triton.warming import WARMING_LENGTHS, Warmed, WarmUp
from tests.kernels.triton.backend import CPU, Again, Repeater

BLOCK_SIZE, NUM_BLOCKS = 2, 20


class Summing:
    """Logits from everything that a step says and from one weight, which is a table: `[tokens, 2]`.

    Writes a token's id to its slot, as attention would.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.seen: list[list[int]] = []  # rows of each run, as they were
        self._hidden = torch.empty(0)

    def run(self, step: StepContext) -> Tensor:
        ids, positions, slots, keys = step.token_ids, step.positions, step.slot_ids, step.kv.layers[0].keys
        if isinstance(step, RecordedStep):
            rows = step.buffers.rows
            firsts = step.attention.block_tables[rows[5], torch.div(positions, BLOCK_SIZE, rounding_mode="floor")]
        else:
            firsts = torch.div(slots, BLOCK_SIZE, rounding_mode="floor")
        self.seen.append([len(ids)])
        is_real = slots >= 0
        keys[:, 0, 0] = torch.where(
            torch.zeros(len(keys), dtype=torch.bool).scatter(0, slots.clamp(min=0), is_real),
            keys[:, 0, 0].scatter(0, slots.clamp(min=0), ids.float()),
            keys[:, 0, 0],
        )
        self._hidden = torch.stack((ids, positions), dim=1).float()
        if step.observer is not None:
            step.observer.observe(3, firsts[:, None], ids[:, None].float())
        logits = torch.stack((ids * self.weight, firsts.float()), dim=1)
        return logits if len(step.logit_rows) == len(ids) else logits.index_select(0, step.logit_rows)

    def hidden(self) -> Tensor:
        return self._hidden

    def head(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight

    def warm_up(self, kv: Cache) -> None:
        raise AssertionError("whoever records it warms it up")

    def describe(self) -> dict[str, str]:
        return {"sum": "torch"}


class Observer:
    def __init__(self) -> None:
        self.ids: list[Tensor] = []

    def observe(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self.ids.append(expert_ids)

    def observe_all(self, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self.ids += list(expert_ids)


def new_cache() -> KVCache:
    slots = NUM_BLOCKS * BLOCK_SIZE
    return KVCache([LayerCache(torch.zeros(slots, 1, 1), torch.zeros(slots, 1, 1))], BLOCK_SIZE)


def step_of(kv: KVCache, *sequences: StepSequence, observer: Observer | None = None) -> StepContext:
    return StepContext(sequences, kv, observer)


def captured(weight: float = 2.0, **more: object) -> tuple[CapturedProgram, Recordings, Repeater]:
    table, own = torch.zeros(1), torch.tensor([weight])
    repeater = Repeater()
    recordings = Recordings(
        Summing(table),
        repeater,
        max_positions=16,
        tables=(table,),
        sizes=(1, 2, 4),
        **more,  # type: ignore[arg-type]
    )
    return CapturedProgram(Summing(own), recordings, (own,)), recordings, repeater


def test_a_replayed_step_is_the_step_itself() -> None:
    program, recordings, repeater = captured()
    kv, plain_kv = new_cache(), new_cache()
    plain = Summing(torch.tensor([2.0]))
    steps: Sequence[Sequence[StepSequence]] = [
        [StepSequence([7], 4, [3, 9, 5], 1), StepSequence([8, 6], 1, [2, 4], 2)],
        [StepSequence([7], 5, [3, 9, 5], 1), StepSequence([9], 2, [2, 4], 1), StepSequence([1], 0, [11], 1)],
        [StepSequence([3], 2, [2, 6], 1), StepSequence([5], 6, [3, 9, 5, 7], 1), StepSequence([1], 1, [11], 1)],
        [StepSequence([4, 2, 1], 0, [13, 14], 0), StepSequence([5], 0, [15], 1)],
        [StepSequence([9, 8, 7], 0, [13, 14], 2)],
    ]
    for sequences in steps:
        ours, theirs = Observer(), Observer()
        logits = program.run(step_of(kv, *sequences, observer=ours))
        expected = plain.run(step_of(plain_kv, *sequences, observer=theirs))
        assert torch.equal(logits, expected)
        assert torch.equal(program.hidden(), plain.hidden())
        assert [ids.tolist() for ids in ours.ids] == [ids.tolist() for ids in theirs.ids]
        assert torch.equal(kv.layers[0].keys, plain_kv.layers[0].keys)
    assert recordings.num_recorded == len(repeater.recordings) == 1


def test_rows_without_a_token_repeat_the_first_and_are_written_nowhere() -> None:
    program, _, repeater = captured()
    kv = new_cache()
    program.run(step_of(kv, StepSequence([7, 5, 6], 1, [3, 9], 3)))
    outputs = repeater.recordings[0].outputs
    assert outputs.hidden.tolist() == [[7, 1], [5, 2], [6, 3], [7, 1]]
    assert outputs.routing[0][1].tolist() == [[3], [9], [9], [3]]
    assert kv.layers[0].keys.nonzero()[:, 0].tolist() == [7, 18, 19]


def test_what_an_observer_has_seen_stays() -> None:
    program, _, _ = captured()
    observer, kv = Observer(), new_cache()
    for block in (4, 8):
        program.run(step_of(kv, StepSequence([1], 0, [block], 1), observer=observer))
    assert [ids.tolist() for ids in observer.ids] == [[[4]], [[8]]]


def test_versions_share_what_is_recorded() -> None:
    first, recordings, _ = captured(2.0)
    own = torch.tensor([5.0])
    second = CapturedProgram(Summing(own), recordings, (own,))
    kv = new_cache()
    results = [
        float(program.run(step_of(kv, StepSequence([3], 0, [1], 1)))[0, 0])
        for program in (first, second, second, first)
    ]
    assert results == [6.0, 15.0, 15.0, 6.0]
    assert recordings.num_recorded == 1
    assert second.head(torch.ones(1)).tolist() == [5.0]


def test_each_size_and_each_cache_is_recorded_once() -> None:
    program, recordings, _ = captured()
    caches = new_cache(), new_cache()
    for kv in (*caches, *caches):
        for count in (1, 2, 3, 4):
            program.run(step_of(kv, *(StepSequence([1], 0, [index], 1) for index in range(count))))
    assert recordings.num_recorded == 6


def test_recordings_leave_their_logits_in_one_place() -> None:
    program, _, repeater = captured()
    kv = new_cache()
    for count in (1, 3):
        program.run(step_of(kv, *(StepSequence([5], 0, [index], 1) for index in range(count))))
    one, other = (recording.outputs.logits for recording in repeater.recordings)
    assert one.data_ptr() == other.data_ptr() and (len(one), len(other)) == (1, 4)


def test_a_version_is_warmed_up_once_for_each_cache_and_writes_nothing() -> None:
    own, warmed = torch.tensor([5.0]), Warmed(16)
    plain, (_, recordings, _) = Summing(own), captured()
    program = CapturedProgram(plain, recordings, (own,), warm_up=WarmUp(lambda: plain, warmed))
    caches = new_cache(), new_cache()
    for kv in (*caches, *caches):
        kv.layers[0].keys.fill_(9)
        program.warm_up(kv)
        assert (kv.layers[0].keys == 9).all()
    assert plain.seen == 2 * [[length] for length in WARMING_LENGTHS if length <= 16]
    assert recordings.num_recorded == 0

    # A version that differs in where its experts lie needs nothing more, nor does one that nothing is compiled for.
    second, third = Summing(own), Summing(own)
    CapturedProgram(second, recordings, (own,), warm_up=WarmUp(lambda: second, warmed)).warm_up(caches[0])
    CapturedProgram(third, None, reason="no graphs").warm_up(caches[0])
    assert not second.seen and not third.seen


def test_warming_up_leaves_no_state_and_no_index_key() -> None:
    class Keeping(Summing):
        """Writes what carries a state along a sequence, and what an indexer finds tokens by."""

        def run(self, step: StepContext) -> Tensor:
            states, index = step.kv.states[0], step.kv.indexes[0]
            assert states is not None and index is not None
            for sequence in step.sequences:
                assert sequence.state is not None and sequence.state.source is None
                for part in states:
                    part[sequence.state.target] += 1
            index.keys[step.slot_ids] += 1
            return super().run(step)

    own, slots = torch.tensor([5.0]), NUM_BLOCKS * BLOCK_SIZE
    layer, index = (LayerCache(torch.zeros(slots, 1, 1), torch.zeros(slots, 1, width)) for width in (1, 0))
    state = LayerState(torch.zeros(3, 2, 4), torch.zeros(3, 1, 4, 4))
    kv, plain = KVCache([layer], BLOCK_SIZE, [state], [index]), Keeping(own)
    CapturedProgram(plain, None, reason="states", warm_up=WarmUp(lambda: plain, Warmed(40))).warm_up(kv)
    assert plain.seen == [[1], [16], [32]]
    assert not any(tensor.any() for tensor in (*layer[:2], *index[:2], *state))


@pytest.mark.parametrize(
    "sequences",
    [
        [StepSequence(list(range(9)), 0, [1, 2, 3, 4, 5], 1)],
        [StepSequence([1], 0, [index], 1) for index in range(5)],
        [StepSequence([1], 0, [1], 1, SequenceState.of(0, 0))],
        [],
    ],
)
def test_other_steps_run_as_before(sequences: list[StepSequence]) -> None:
    program, recordings, _ = captured()
    logits = program.run(step_of(new_cache(), *sequences))
    assert torch.equal(logits, Summing(torch.tensor([2.0])).run(step_of(new_cache(), *sequences)))
    assert recordings.num_recorded == 0


def test_what_cannot_be_recorded_runs_as_before(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def record(self, work: Callable[[], Outputs], device: torch.device) -> Again:
            raise RuntimeError("no memory\nand more")

    plain = Summing(torch.tensor([2.0]))
    recordings = Recordings(plain, Failing(), max_positions=16)
    program = CapturedProgram(plain, recordings)
    assert program.describe()["steps"] == f"CUDA graphs of 1 to {SIZES[-1]} rows"
    for _ in range(2):
        assert program.run(step_of(new_cache(), StepSequence([3], 0, [1], 1))).tolist() == [[6.0, 1.0]]
    assert program.describe() == {"sum": "torch", "steps": "not recorded: no memory"}
    assert len(caplog.records) == 1

    assert CapturedProgram(plain, None, reason="a reason").describe()["steps"] == "not recorded: a reason"


def test_steps_smaller_than_one_that_failed_are_recorded() -> None:
    class Small(Repeater):
        """Has memory for two rows."""

        def record(self, work: Callable[[], Outputs], device: torch.device) -> Again:
            recording = super().record(work, device)
            if len(recording.outputs.logits) > 2:
                raise RuntimeError("no memory")
            return recording

    plain, kv = Summing(torch.tensor([2.0])), new_cache()
    recordings = Recordings(plain, Small(), max_positions=16, sizes=(1, 2, 4, 8))
    program = CapturedProgram(plain, recordings)
    for count in (1, 5, 4, 8, 3, 2):
        step = step_of(kv, *(StepSequence([3], 0, [index], 1) for index in range(count)))
        assert program.run(step).tolist() == [[6.0, index] for index in range(count)]
    assert recordings.num_recorded == 4  # of 1 and 2 rows; of 8 and 4 in vain, once each
    assert program.describe()["steps"] == "CUDA graphs of 1 to 2 rows; larger ones not: no memory"


def test_what_has_been_recorded_stays_when_another_size_fails() -> None:
    class Once(Repeater):
        def record(self, work: Callable[[], Outputs], device: torch.device) -> Again:
            if self.recordings:
                raise RuntimeError("no memory")
            return super().record(work, device)

    plain, kv, repeater = Summing(torch.tensor([2.0])), new_cache(), Once()
    program = CapturedProgram(plain, recordings := Recordings(plain, repeater, max_positions=16, sizes=(1, 2, 4)))
    for count, is_replayed in ((4, True), (2, False), (3, True), (1, False)):
        step = step_of(kv, *(StepSequence([3], 0, [index], 1) for index in range(count)))
        assert recordings.takes(step) or not is_replayed
        program.run(step)
        assert (plain.seen[-1] == [4]) == is_replayed
    assert recordings.num_recorded == 3


def test_work_that_asks_the_host_is_refused() -> None:
    with pytest.raises(AssertionError):
        Repeater().record(lambda: Outputs(torch.zeros(1), torch.ones(1).sum().item(), ()), CPU)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs() -> None:
    from amalgam.kernels.backends.triton.graphs import CudaRecorder

    device = torch.device("cuda")
    x = torch.ones(3, device=device)
    recording = CudaRecorder().record(lambda: Outputs(x * 2, x + 1, ()), device)
    x.fill_(5)
    recording.replay()
    assert recording.outputs.logits.tolist() == [10.0] * 3
    assert recording.outputs.hidden.tolist() == [6.0] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_that_fails_leaves_the_thread_where_it_was() -> None:
    from amalgam.kernels.backends.triton.graphs import CudaRecorder

    device = torch.device("cuda")
    x, before, recorder = torch.ones(3, device=device), torch.cuda.current_stream(), CudaRecorder()
    with pytest.raises(RuntimeError):
        recorder.record(lambda: Outputs(x * x.sum().item(), x, ()), device)
    assert torch.cuda.current_stream() == before
    recording = recorder.record(lambda: Outputs(x * 2, x + 1, ()), device)
    del recording
    recording = recorder.record(lambda: Outputs(x * 3, x, ()), device)
    recording.replay()
    assert recording.outputs.logits.tolist() == [3.0] * 3
