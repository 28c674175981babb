"""Which experts work together: within a layer, and from one layer to the next.

In: counted rows. Out: matrices of counts over a random sample of the tokens. Must never know: requests, the time.
Not locked: `ExpertTracker` calls it under its own lock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amalgam.experts.recording import Rows

_SEED = 20_250_701  # the sample should not depend on the run


@dataclass(frozen=True)
class PairCounts:
    """Counts over `num_tokens` sampled tokens.

    `together[l, a, b]` tokens used both a and b in layer l (on the diagonal: used a). `onward[l, a, b]` tokens used a
    in layer l and b in the next layer that has experts; nothing for the last one.
    """

    num_tokens: int
    together: npt.NDArray[np.int64]  # [layers, experts, experts]
    onward: npt.NDArray[np.int64]  # [layers - 1, experts, experts]

    def __add__(self, other: PairCounts) -> PairCounts:
        return PairCounts(
            self.num_tokens + other.num_tokens, self.together + other.together, self.onward + other.onward
        )


@dataclass(frozen=True)
class LayerPairs:
    """One layer's pairs of experts, over a sample of the tokens."""

    num_tokens: int  # sampled since the last reset
    sampling: int  # one token in so many; 0: none
    together: npt.NDArray[np.int64]  # [experts, experts]; on the diagonal, uses
    onward: npt.NDArray[np.int64] | None  # [experts, experts of the next layer]; None for the last layer
    next_layer_id: int | None


class PairCounter:
    """Takes one token in `sampling`, drawn at random so that no request of a regular batch is favoured; 0: none."""

    def __init__(self, num_layers: int, num_experts: int, sampling: int) -> None:
        self.sampling = sampling
        self._shape = (num_layers, num_experts)
        self._random = np.random.default_rng(_SEED)
        self.clear()

    def clear(self) -> None:
        num_layers, num_experts = self._shape if self.sampling else (0, 0)
        self._num_tokens = 0
        # Zeroed pages cost no memory before they are used.
        self._together = np.zeros((num_layers, num_experts, num_experts), np.int64)
        self._onward = np.zeros((max(num_layers - 1, 0), num_experts, num_experts), np.int64)

    def add(self, rows: Rows) -> None:
        if not self.sampling or not self._shape[0]:
            return
        if self.sampling > 1:
            rows = rows[self._random.random(len(rows)) * self.sampling < 1]
        if not len(rows):
            return
        self._num_tokens += len(rows)
        # The cell of (layer, a) times the number of experts, plus b, is the index into the flattened matrices.
        first, second = rows.cells * self._shape[1], rows.expert_ids.astype(np.int64)
        np.add.at(self._together.reshape(-1), first[..., :, None] + second[..., None, :], 1)
        np.add.at(self._onward.reshape(-1), first[:-1, :, :, None] + second[1:, :, None, :], 1)

    def restore(self, pairs: PairCounts) -> None:
        if self.sampling:
            self._num_tokens += pairs.num_tokens
            self._together += pairs.together
            self._onward += pairs.onward

    def read(self) -> PairCounts:
        return PairCounts(self._num_tokens, self._together.copy(), self._onward.copy())

    def layer(self, index: int) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
        """Sampled tokens, and one layer's matrices."""
        onward = self._onward[index].copy() if index < len(self._onward) else None
        return self._num_tokens, self._together[index].copy(), onward

    @property
    def nbytes(self) -> int:
        return self._together.nbytes + self._onward.nbytes
