"""The slots of recurrent states: whose they are, and which hold a state that others can start from.

In: requests as they are admitted, computed and released. Out: slot ids. Must never know: steps, queues, tensors.

A request that runs has one slot, which each step brings up to date. A state cannot be cut like keys and values: a
request starts from blocks that are there only if somebody has kept the state at their end. That is done at the end of
a prompt's last full block, and where its beginning parts from one whose blocks are there: what two have shared, a third
may share as well. A slot takes as much memory as the keys and values of thousands of tokens, so other borders are not
kept. What is kept stays until a slot is needed; what has not been used for longest goes first.

A state that has taken a token in does not give it back. So a step with guesses leaves a state before each of them, in
slots that are free: the one before the first wrong guess becomes the request's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from amalgam.engine.blocks import Key

_Name = tuple[int, Key]  # version id, and the key of the block at whose end a state is


class StateShare(NamedTuple):
    """What a step does with a request's state; see `amalgam.kernels.step.SequenceState`."""

    source: int | None
    target: int
    saves: tuple[tuple[int, int], ...] = ()


@dataclass(eq=False, slots=True)
class RequestState:
    """The state of one running request.

    Attributes:
        slot: its own.
        source: the kept slot that its first step reads; None: it has begun, or begins with nothing.
        borders: positions whose states are to be kept, in order.
        pending: position → the slot that the step under way saves its state to.
        kept: names of the states that it has kept, or started from.
        guesses: the slots that the step under way saves its state to, before each guess.
    """

    slot: int
    source: int | None
    borders: list[int]
    pending: dict[int, int] = field(default_factory=dict)
    kept: list[_Name] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)


class StatePool:
    """Hands out slots `0 … num_slots - 1`, and finds those with a state that is needed. Not thread-safe.

    Args:
        num_spare: slots in which no states are kept, so that they are free for guesses.
    """

    def __init__(self, num_slots: int, num_spare: int = 0) -> None:
        self.num_slots = num_slots
        self.num_spare = num_spare
        self._free = list(range(num_slots - 1, -1, -1))
        self._kept: OrderedDict[_Name, int] = OrderedDict()  # the longest unused comes first
        self._num_readers: dict[int, int] = {}  # slot → requests whose next step reads it

    @property
    def num_free(self) -> int:
        """Slots in which nothing is."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Slots that a request can get: nobody's, or with a state that nobody is about to read."""
        return len(self._free) + sum(slot not in self._num_readers for slot in self._kept.values())

    @property
    def version_ids(self) -> AbstractSet[int]:
        """The weight versions of which states are kept."""
        return {version_id for version_id, _ in self._kept}

    def count_usable(self, version_id: int, keys: Sequence[Key]) -> int:
        """How many of the first blocks end where a state is kept."""
        return next((n for n in range(len(keys), 0, -1) if (version_id, keys[n - 1]) in self._kept), 0)

    def begin(self, version_id: int, keys: Sequence[Key], borders: list[int]) -> RequestState:
        """A slot for a request that is admitted; at least one is available.

        Args:
            keys: of the blocks that it shares, as many as `count_usable` has said.
            borders: positions whose states are to be kept.
        """
        source = None
        if keys:
            name = version_id, keys[-1]
            source = self._kept[name]
            self._kept.move_to_end(name)
            self._num_readers[source] = self._num_readers.get(source, 0) + 1
        slot = self._take()
        if slot is None:  # only the one that it starts from is left: it goes on there
            assert source is not None and keys
            self._end_reading(source)
            slot = self._kept.pop((version_id, keys[-1]))
        return RequestState(slot, source, borders, kept=[(version_id, keys[-1])] if keys else [])

    def share(self, state: RequestState, start: int, end: int) -> StateShare:
        """What a step does that computes tokens `[start, end)`, which the request has."""
        for border in state.borders:
            if start < border <= end and (slot := self._take(self.num_spare)) is not None:
                state.pending[border] = slot
        saves = tuple((border - start, slot) for border, slot in state.pending.items())
        source = state.slot if state.source is None else state.source
        return StateShare(source if start else None, state.slot, saves)

    def guess(self, state: RequestState, share: StateShare, num_known: int, num_guesses: int) -> StateShare | None:
        """The same step with guesses behind its `num_known` tokens, if there are slots; None: none is free.

        How many it may have is the number of saves that have been added.
        """
        count = min(num_guesses, len(self._free))
        if not count:
            return None
        state.guesses = [self._free.pop() for _ in range(count)]
        saves = tuple((num_known + place, slot) for place, slot in enumerate(state.guesses))
        return share._replace(saves=share.saves + saves)

    def commit(
        self, state: RequestState, version_id: int, keys: Sequence[Key], block_size: int, num_rejected: int = 0
    ) -> None:
        """The step has been computed: what it has saved can be found.

        Args:
            keys: of the request's full blocks.
            num_rejected: guesses that did not come true, the last ones.
        """
        self._begun(state)
        if num_rejected:
            index = len(state.guesses) - num_rejected
            state.slot, state.guesses[index] = state.guesses[index], state.slot
        self._free += state.guesses
        state.guesses.clear()
        for border, slot in state.pending.items():
            name = version_id, keys[border // block_size - 1]
            if name in self._kept:
                self._free.append(slot)
                self._kept.move_to_end(name)
            else:
                self._kept[name] = slot
                state.kept.append(name)
        state.borders = [border for border in state.borders if border not in state.pending]
        state.pending.clear()

    def release(self, state: RequestState, *, is_sound: bool = True) -> None:
        """A request has no use for its state any more.

        Args:
            is_sound: False: what it has kept or started from may be wrong, and nobody is to find it.
        """
        self._begun(state)
        self._free += [state.slot, *state.pending.values(), *state.guesses]
        for name in () if is_sound else state.kept:
            slot = self._kept.pop(name, None)
            if slot is not None and slot not in self._num_readers:  # or it is free when it has been read
                self._free.append(slot)

    def forget_version(self, version_id: int) -> None:
        """States of a weight version are of no use any more; no request of it runs."""
        for name in [name for name in self._kept if name[0] == version_id]:
            self._free.append(self._kept.pop(name))

    def _begun(self, state: RequestState) -> None:
        """Its next step reads its own slot."""
        if state.source is not None and state.source != state.slot:
            self._end_reading(state.source)
        state.source = None

    def _end_reading(self, slot: int) -> None:
        self._num_readers[slot] -= 1
        if not self._num_readers[slot]:
            del self._num_readers[slot]
            if slot not in self._kept.values():  # nobody is to find it any more
                self._free.append(slot)

    def _take(self, num_left: int = 0) -> int | None:
        """A free slot, if more than `num_left` are, or one with a kept state that nobody is about to read."""
        if len(self._free) > num_left:
            return self._free.pop()
        name = next((name for name, slot in self._kept.items() if slot not in self._num_readers), None)
        return None if name is None else self._kept.pop(name)
