"""Small steps as CUDA graphs: a program is recorded once for a number of rows, and replayed with other inputs.

In: a program that runs one operator after the other, steps. Out: `CapturedProgram`, which gives the bits that the
program gives for a step of as many rows as the recording has. Must never know: families, requests, what a program's
instructions are.

A step of few tokens is hundreds of short kernels, and a processor that launches them one by one takes longer than the
card that runs them. A recording reads everything that changes from step to step from buffers of its own, one column for
each row of the step:

    token id │ slot │ its tile of attention: row, position, number of rows, row of the table     and a table of blocks

A step with fewer rows than the recording has repeats its first row in the others, but writes them nowhere: they read
the keys, and are sent to the experts, that the first row needs anyway. A sequence with several tokens has several rows.

Weights that change from version to version reach a recording through tables of pointers (`tables`): versions that
differ in nothing else share their recordings, and a step of another version than the last one first copies its tables
over those that the recordings read, in the order of the stream.

What is not recorded runs as before: prompts, steps with recurrent states, and programs with an instruction that asks
the host (`reason`).
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from amalgam.kernels.backends.base import Compiled
from amalgam.kernels.backends.triton.batches import MOST_SINGLE, TokenBatch
from amalgam.kernels.backends.triton.warming import WarmUp
from amalgam.kernels.step import AttentionBatch, Cache, Observer, StepContext, StepSequence

SIZES = (1, 2, 4, *range(8, 129, 8))
_NOWHERE = -1

logger = logging.getLogger("amalgam.models")


class Outputs(NamedTuple):
    """What a recorded step leaves, at the same addresses after every replay.

    Attributes:
        routing: of each `Route` in order: the layer, ids and weights `[rows, k]`.
    """

    logits: Tensor
    hidden: Tensor
    routing: tuple[tuple[int, Tensor, Tensor], ...]


class Recording(Protocol):
    """A step that can be run again."""

    @property
    def outputs(self) -> Outputs: ...

    def replay(self) -> None:
        """Run it on what its buffers hold now."""


class Recorder(Protocol):
    """Records what a function launches: `torch.cuda.graph`, or what stands in for it where there is no card."""

    def record(self, work: Callable[[], Outputs], device: torch.device) -> Recording:
        """Record `work`, which asks the host for nothing that a tensor holds; it may be called more than once."""


class CudaRecorder:
    """See `Recorder`. All recordings share one pool of memory: no two of them run at the same time."""

    def __init__(self) -> None:
        self._pool: torch.cuda.MemPool | None = None  # which stays when the last of its recordings goes

    def record(self, work: Callable[[], Outputs], device: torch.device) -> Recording:
        with _RECORDING, torch.cuda.device(device):
            before = torch.cuda.current_stream()
            try:
                return self._captured(work, _side_stream(device))
            finally:  # a capture that fails at its end leaves the thread on its stream
                torch.cuda.set_stream(before)

    def _captured(self, work: Callable[[], Outputs], stream: torch.cuda.Stream) -> Recording:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # compiles kernels, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.MemPool()
        pool = torch.cuda._POOL_HANDLE(self._pool.id)
        try:
            # Other threads go on allocating and copying: they build weight versions.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = work()
        except BaseException:
            self._give_up(graph, pool)
            raise
        return _CudaRecording(graph, outputs)

    def _give_up(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        """A capture has failed. PyTorch then may not have ended to allocate for it, and would take the pool for busy
        and defer what it frees; and it goes on to ask the graph which streams are its own."""
        with suppress(RuntimeError):  # it has ended
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        _FAILED.append((graph, self._pool))
        self._pool = None


# One capture at a time in a process: PyTorch's rule, and the stream has room for one.
_RECORDING = threading.Lock()
# Kept for good, since PyTorch may still ask the graph of a failed capture. There are few of them.
_FAILED: list[tuple[torch.cuda.CUDAGraph, torch.cuda.MemPool | None]] = []


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps of a device are recorded. PyTorch hands out 32 streams in turns: one made for each recording would
    sooner or later be another thread's, whose copies the capture would take along; and what a library keeps for each
    stream, some MB, would be kept 32 times."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True, eq=False)
class _CudaRecording:
    graph: torch.cuda.CUDAGraph
    outputs: Outputs

    def replay(self) -> None:
        self.graph.replay()


class Buffers:
    """The inputs of a recording, on the device, and how a step gets there.

    Attributes:
        rows: int64 `[6, size]`, see the module's drawing.
        tables: int64 `[size, blocks]`.
    """

    def __init__(self, size: int, num_blocks: int, device: torch.device) -> None:
        self.size = size
        self._host = torch.zeros((6, size), dtype=torch.int64)
        self._host[1] = _NOWHERE
        self._host[2], self._host[4] = torch.arange(size), 1
        self._host_tables = torch.zeros((size, num_blocks), dtype=torch.int64)
        self._known: list[list[int]] = [[] for _ in range(size)]
        self.rows = self._host.to(device, copy=True)
        self.tables = self._host_tables.to(device, copy=True)

    def fill(self, sequences: Sequence[StepSequence], block_size: int) -> None:
        """Take over a step: one copy of its rows, and one of the tables that have changed."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        tables: list[int] = []
        for index, (new_ids, first, block_ids, _, _) in enumerate(sequences):
            token_ids += new_ids
            for place in range(first, first + len(new_ids)):
                positions.append(place)
                slots.append(block_ids[place // block_size] * block_size + place % block_size)
                tables.append(index)
        spare = self.size - len(token_ids)
        token_ids += token_ids[:1] * spare
        positions += positions[:1] * spare
        slots += [_NOWHERE] * spare
        tables += tables[:1] * spare
        self._host[0] = torch.tensor(token_ids)
        self._host[1] = torch.tensor(slots)
        self._host[3] = torch.tensor(positions)
        self._host[5] = torch.tensor(tables)
        self.rows.copy_(self._host)
        self._fill_tables(sequences)

    def _fill_tables(self, sequences: Sequence[StepSequence]) -> None:
        changed: list[int] = []
        width = 0
        for index, sequence in enumerate(sequences):
            block_ids = list(sequence.block_ids[: self.tables.shape[1]])
            if block_ids == self._known[index]:
                continue
            self._known[index] = block_ids
            self._host_tables[index, : len(block_ids)] = torch.tensor(block_ids)
            changed.append(index)
            width = max(width, len(block_ids))
        if changed:
            some = slice(changed[0], changed[-1] + 1)
            self.tables[some, :width].copy_(self._host_tables[some, :width])


@dataclass(frozen=True)
class RecordedStep(StepContext):
    """A step as a recording sees it: all on the device, no sequences."""

    buffers: Buffers = field(kw_only=True)

    @property
    def token_ids(self) -> Tensor:
        return self.buffers.rows[0]

    @property
    def positions(self) -> Tensor:
        return self.buffers.rows[3]

    @property
    def slot_ids(self) -> Tensor:
        return self.buffers.rows[1]

    @property
    def logit_rows(self) -> Tensor:
        """All of them: whoever replays takes those that are wanted."""
        return self.buffers.rows[2]

    @property
    def attention(self) -> AttentionBatch:
        nothing = torch.empty(0, dtype=torch.int64)
        return TokenBatch(nothing, nothing, self.buffers.tables, self.kv.block_size, tiles=self.buffers.rows[2:])


class _Kept:
    """Keeps the tensors of the routing, which every replay writes anew."""

    def __init__(self) -> None:
        self.routing: list[tuple[int, Tensor, Tensor]] = []

    def observe(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self.routing.append((layer_id, expert_ids, gate_weights))

    def observe_all(self, expert_ids: Tensor, gate_weights: Tensor) -> None:
        for layer_id, (ids, weights) in enumerate(zip(expert_ids, gate_weights, strict=True)):
            self.observe(layer_id, ids, weights)


@dataclass(frozen=True, eq=False)
class _Taken:
    buffers: Buffers
    recording: Recording


class Recordings:
    """The recordings of programs that differ in nothing but what their tables hold. Used by one thread at a time.

    Args:
        program: what is recorded. It reads weights that differ between versions through `tables` and holds none of
            them: it stays as long as any version needs the recordings.
        tables: tensors on the device, which belong to the recordings.
        max_positions: of a sequence.
        sizes: rows of recordings, ascending.

    Attributes:
        num_recorded: how often something had to be recorded.
        most_rows: of a step that may still be recorded. After an attempt has failed only smaller ones are; larger
            steps run as they would without, or as they have been recorded before.
        failure: why the last attempt that failed did.
    """

    def __init__(
        self,
        program: Compiled,
        recorder: Recorder,
        *,
        max_positions: int,
        tables: Sequence[Tensor] = (),
        sizes: Sequence[int] = SIZES,
    ) -> None:
        self.tables = tuple(tables)
        self.sizes = tuple(sizes)
        self.num_recorded = 0
        self.most_rows = self.sizes[-1]
        self.failure: str | None = None
        self._program = program
        self._recorder = recorder
        self._max_positions = max_positions
        self._taken: WeakKeyDictionary[Cache, dict[int, _Taken]] = WeakKeyDictionary()
        self._owner: Sequence[Tensor] | None = None
        self._logits: Tensor | None = None

    def takes(self, step: StepContext) -> bool:
        """Whether a step can be replayed: few tokens, a few for each sequence, and no recurrent state."""
        num_rows = 0
        for sequence in step.sequences:
            count = len(sequence.token_ids)
            if not 0 < count <= MOST_SINGLE or sequence.state is not None:
                return False
            num_rows += count
        if not 0 < num_rows <= self.sizes[-1]:
            return False
        return num_rows <= self.most_rows or self._size_of(num_rows) in self._taken.get(step.kv, {})

    def replay(self, step: StepContext, tables: Sequence[Tensor]) -> Outputs | None:
        """Run a step with a version's tables: outputs with as many rows as the recording has; None: it has failed."""
        num_rows = sum(len(sequence.token_ids) for sequence in step.sequences)
        size = self._size_of(num_rows)
        of_cache = self._taken.setdefault(step.kv, {})
        self._turn_to(tables)
        if size not in of_cache:
            try:
                of_cache[size] = self._record(step.kv, size)
            except RuntimeError as error:  # no memory left, or an operator that asks the host after all
                self.failure = str(error).splitlines()[0]
                self.most_rows = max((smaller for smaller in self.sizes if smaller < size), default=0)
                logger.warning("Steps of %d rows and more are not recorded as CUDA graphs: %s", size, self.failure)
                return None
        taken = of_cache[size]
        taken.buffers.fill(step.sequences, step.kv.block_size)
        taken.recording.replay()
        return taken.recording.outputs

    def _size_of(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)

    def _turn_to(self, tables: Sequence[Tensor]) -> None:
        if tables is self._owner:
            return
        for here, theirs in zip(self.tables, tables, strict=True):
            here.copy_(theirs)
        self._owner = tables

    def _record(self, kv: Cache, size: int) -> _Taken:
        num_blocks = kv.layers[0].keys.shape[0] // kv.block_size
        width = min(num_blocks, -(-self._max_positions // kv.block_size))
        buffers = Buffers(size, max(1, width), kv.device)  # nothing in them is written anywhere

        def work() -> Outputs:
            kept = _Kept()
            step = RecordedStep((), kv, kept, buffers=buffers)
            logits = self._kept(self._program.run(step))
            return Outputs(logits, self._program.hidden(), tuple(kept.routing))

        self.num_recorded += 1
        return _Taken(buffers, self._recorder.record(work, kv.device))

    def _kept(self, logits: Tensor) -> Tensor:
        """Logits where all recordings leave theirs. Of a vocabulary of 150,000, 128 rows are 80 MB: each recording with
        memory of its own for them would be nine times that."""
        if self._logits is None:
            self._logits = logits.new_empty((self.sizes[-1], logits.shape[1]))
        return self._logits[: len(logits)].copy_(logits)


class CapturedProgram:
    """See `Compiled`: replays steps that can be, and runs the others.

    Args:
        program: of this version.
        recordings: None: nothing is recorded.
        tables: this version's, in the order of the recordings'; not written to as long as a step may need them.
        reason: why nothing is recorded, for people.
        warm_up: see `Compiled`; None: there is nothing to be compiled.
    """

    def __init__(
        self,
        program: Compiled,
        recordings: Recordings | None,
        tables: Sequence[Tensor] = (),
        reason: str | None = None,
        warm_up: WarmUp | None = None,
    ) -> None:
        self._program = program
        self._recordings = recordings
        self._tables = tables
        self._reason = reason
        self._warm_up = warm_up
        self._hidden: Tensor | None = None  # of the last step, if that was replayed

    @torch.inference_mode()
    def run(self, step: StepContext) -> Tensor:
        takes = self._recordings is not None and self._recordings.takes(step)
        outputs = self._recordings.replay(step, self._tables) if self._recordings is not None and takes else None
        if outputs is None:
            self._hidden = None
            return self._program.run(step)
        num_rows = sum(len(sequence.token_ids) for sequence in step.sequences)
        self._hidden = outputs.hidden[:num_rows]
        if step.observer is not None and outputs.routing:
            _show(outputs, num_rows, step.observer)
        return _wanted(outputs.logits, step.sequences, num_rows)

    def warm_up(self, kv: Cache) -> None:
        if self._warm_up is not None:
            self._warm_up(kv)

    def hidden(self) -> Tensor:
        return self._program.hidden() if self._hidden is None else self._hidden

    def head(self, hidden: Tensor) -> Tensor:
        return self._program.head(hidden)

    def describe(self) -> dict[str, str]:
        return {**self._program.describe(), "steps": self._steps()}

    def _steps(self) -> str:
        """How steps run, for people."""
        if self._recordings is None:
            return f"not recorded: {self._reason}"
        most, failure = self._recordings.most_rows, self._recordings.failure
        if not most:
            return f"not recorded: {failure}"
        return f"CUDA graphs of 1 to {most} rows" + ("" if failure is None else f"; larger ones not: {failure}")


def _wanted(logits: Tensor, sequences: Sequence[StepSequence], num_rows: int) -> Tensor:
    """The rows that the step wants of those that were computed."""
    if all(sequence.num_logits >= len(sequence.token_ids) for sequence in sequences):
        return logits[:num_rows]
    rows: list[int] = []
    end = 0
    for sequence in sequences:
        count = len(sequence.token_ids)
        end += count
        rows += range(end - min(sequence.num_logits, count), end)
    return logits.index_select(0, torch.tensor(rows, dtype=torch.int64).to(logits.device))


def _show(outputs: Outputs, num_rows: int, observer: Observer) -> None:
    """The routing of the real rows, as tensors that stay as they are."""
    routing = outputs.routing
    if len({ids.shape[1] for _, ids, _ in routing}) == 1:
        observer.observe_all(
            torch.stack([ids[:num_rows] for _, ids, _ in routing]),
            torch.stack([weights[:num_rows] for _, _, weights in routing]),
        )
        return
    for layer_id, ids, weights in routing:
        observer.observe(layer_id, ids[:num_rows].clone(), weights[:num_rows].clone())
