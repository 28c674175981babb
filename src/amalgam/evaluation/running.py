"""Plans at work on texts: the hidden states of all tokens, and logits of some at a time.

In: a loader, planned weights, windows. Out: hidden states, which are small, and from them logits, which are not. Must
never know: what is made of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.composition.progress import Progress
from amalgam.errors import CheckpointError
from amalgam.evaluation.texts import Window
from amalgam.kernels.backends import Compiled
from amalgam.kernels.step import SequenceState, StepContext, StepSequence
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.models.weights import WeightVersion

BLOCK_SIZE = 16
STEP_TOKENS = 512
_LOGIT_BYTES = 64 * 2**20  # of one plan's logits, in float64

_version_ids = itertools.count(1)


class Step(NamedTuple):
    """Windows that are computed together: `[start, stop)` of a list of them."""

    start: int
    stop: int


def steps_of(windows: Sequence[Window], num_tokens: int = STEP_TOKENS) -> list[Step]:
    """Windows in order, as many together as have `num_tokens` tokens; a longer one alone."""
    steps: list[Step] = []
    start = total = 0
    for index, window in enumerate(windows):
        size = len(window.token_ids)
        if index > start and total + size > num_tokens:
            steps.append(Step(start, index))
            start, total = index, 0
        total += size
    return [*steps, Step(start, len(windows))] if windows else []


def step_context(
    windows: Sequence[Window], decoder: Decoder, num_logits: int = 0, dtype: torch.dtype | None = None
) -> StepContext:
    """A step of whole windows, over a cache of its own.

    Args:
        num_logits: of how many of each window's last tokens logits are wanted.
        dtype: of keys and values; None: as the activations.
    """
    sequences, first_block = [], 0
    for index, window in enumerate(windows):
        num_blocks = -(-len(window.token_ids) // BLOCK_SIZE)
        blocks = range(first_block, first_block + num_blocks)
        state = SequenceState.of(index, 0) if decoder.spec.state_bytes else None
        sequences.append(StepSequence(list(window.token_ids), 0, blocks, num_logits, state))
        first_block += num_blocks
    cache = KVCache.allocate(
        decoder.spec, first_block, BLOCK_SIZE, dtype or decoder.dtype, decoder.device, num_states=len(windows)
    )
    return StepContext(sequences, cache)


@dataclass(frozen=True)
class Contestant:
    """One plan, loaded.

    Attributes:
        name: for people.
    """

    name: str
    loader: ModelLoader
    decoder: Decoder
    version: WeightVersion

    @property
    def compiled(self) -> Compiled:
        return self.decoder.compile(self.version)

    @property
    def nbytes(self) -> int:
        return self.version.nbytes

    def with_plan(self, name: str, planned: Sequence[PlannedWeight], progress: Progress | None = None) -> Contestant:
        """Another plan of the same model; what both have is in memory once."""
        loaded = self.loader.build(planned, next(_version_ids), self.version, progress)
        return Contestant(name, self.loader, self.decoder, loaded.version)

    @torch.inference_mode()
    def hidden(self, windows: Sequence[Window], progress: Progress | None = None) -> Iterator[tuple[Step, Tensor]]:
        """Of each step, `[tokens, hidden]`: what the head reads.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        total = sum(len(window.token_ids) for window in windows)
        done = 0
        for step in steps_of(windows):
            part = windows[step.start : step.stop]
            self.compiled.run(step_context(part, self.decoder))
            hidden = self.compiled.hidden().clone()
            check_finite(hidden, self.name, part[0].domain)
            done += len(hidden)
            if progress is not None:
                progress(f"Computing {self.name}", done, total)
            yield step, hidden


def check_finite(hidden: Tensor, name: str, domain: str) -> None:
    """
    Args:
        name, domain: of the plan and of its text, for people.

    Raises:
        CheckpointError: a hidden state holds NaN or infinity.
    """
    if bool(hidden.isfinite().all()):
        return
    row = int((~hidden.isfinite()).any(dim=1).nonzero()[0])
    raise CheckpointError(
        f"{name}: the hidden state of token {row} of a text of domain {domain!r} holds NaN or infinity.",
        remedy="A weight is damaged, or the activations overflow: try --inference.dtype float32.",
    )


def open_contestant(
    name: str,
    loader: ModelLoader,
    planned: Sequence[PlannedWeight],
    dtype: torch.dtype,
    max_positions: int,
    progress: Progress | None = None,
) -> Contestant:
    """Load a plan.

    Args:
        max_positions: tokens of the longest window.
    """
    decoder = Decoder(loader.spec, max_positions, dtype, loader.device)
    loaded = loader.build(planned, next(_version_ids), progress=progress)
    return Contestant(name, loader, decoder, loaded.version)


def rows_at_once(vocab_size: int) -> int:
    """Of so many tokens the logits are computed together."""
    return max(1, _LOGIT_BYTES // (8 * vocab_size))
