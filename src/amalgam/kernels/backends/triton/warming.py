"""Steps that are run for the kernels that Triton compiles for them, so that no request waits for a compiler.

In: a program, the cache that its steps will use. Out: nothing but compiled kernels: a warming step works on a cache of
its own, of one block and one state, which has the types and the widths of the other. Must never know: what a program
computes.

Whether a program's steps are recorded makes no difference. Where experts lie on several devices, those on this one are
multiplied (`OwnMixture.alone`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from amalgam.kernels.backends.base import Compiled
from amalgam.kernels.backends.triton import sampling
from amalgam.kernels.step import Cache, LayerCache, LayerState, SequenceState, StepContext, StepSequence

# Tokens of steps that need, together, every kernel that a model launches: a tile's rows are a power of two, and the
# tallest tiles, of the experts of the models with the most of them, come with 768 tokens.
WARMING_LENGTHS = (1, 16, 32, 64, 128, 256, 512, 1024)


class Warmed:
    """Which caches the programs that launch the same kernels have been warmed up for.

    Args:
        max_positions: of a sequence.
    """

    def __init__(self, max_positions: int) -> None:
        self._max_positions = max_positions
        self._caches: WeakSet[Cache] = WeakSet()

    def steps(self, kv: Cache) -> Iterator[StepContext]:
        """What has to be run so that no kernel is left to be compiled; nothing the second time."""
        if kv in self._caches:
            return
        scratch = _Scratch.like(kv)
        state = SequenceState(None, 0) if any(scratch.states) else None
        for length in WARMING_LENGTHS:
            if length <= self._max_positions:
                blocks = [0] * -(-length // kv.block_size)
                yield StepContext([StepSequence([0] * length, 0, blocks, 1, state)], scratch)
        self._caches.add(kv)


@dataclass(frozen=True, eq=False)
class WarmUp:
    """See `Compiled.warm_up`.

    Attributes:
        make: a program that launches what steps will launch, for this alone: it keeps hidden states of many tokens.
    """

    make: Callable[[], Compiled]
    warmed: Warmed

    @torch.inference_mode()
    def __call__(self, kv: Cache) -> None:
        program = self.make()
        for step in self.warmed.steps(kv):
            logits = program.run(step)
            if sampling.supports(logits):
                sampling.draw(logits, [(0, 0.0, 1.0, 0.0, 0.0)])


@dataclass(frozen=True, eq=False)
class _Scratch:
    """See `Cache`. Layers of one shape share what they write to."""

    layers: tuple[LayerCache, ...]
    states: tuple[LayerState | None, ...]
    indexes: tuple[LayerCache | None, ...]
    block_size: int
    device: torch.device

    @classmethod
    def like(cls, kv: Cache) -> _Scratch:
        shared: dict[object, Tensor] = {}

        def tensor(theirs: Tensor, count: int) -> Tensor:
            key = theirs.dtype, theirs.shape[1:], count
            if key not in shared:
                shared[key] = torch.zeros((count, *theirs.shape[1:]), dtype=theirs.dtype, device=theirs.device)
            return shared[key]

        def layer(theirs: LayerCache) -> LayerCache:
            return LayerCache(*(None if part is None else tensor(part, kv.block_size) for part in theirs))  # type: ignore[arg-type]

        return cls(
            layers=tuple(map(layer, kv.layers)),
            states=tuple(state and LayerState(*(tensor(part, 1) for part in state)) for state in kv.states),
            indexes=tuple(index and layer(index) for index in kv.indexes),
            block_size=kv.block_size,
            device=kv.device,
        )
