"""What is read from a prompt's hidden states while it is computed: log-probabilities of its tokens, or an embedding.

In: the final norm's output for the tokens of one step. Out: what the request's first output carries. Must never know:
queues, text, how a step is computed. A prompt comes in chunks, perhaps again after a preemption; nothing depends on
where it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from amalgam.engine.request import Pooling, RequestOutput, TokenLogprobs
from amalgam.engine.sampler import NonFiniteLogitsError, logprobs_of

PIECE_BYTES = 2**26  # of logits at a time, however long the prompt and large the vocabulary


class PromptLogprobs:
    """The log-probability of each token of a prompt but the first; see `PromptReader`.

    Args:
        num_top: of so many likeliest tokens too.
    """

    def __init__(self, prompt_ids: Sequence[int], num_top: int, vocab_size: int) -> None:
        self._prompt_ids = prompt_ids
        self._num_top = num_top
        self._num_rows = max(1, PIECE_BYTES // (4 * vocab_size))
        self.restart()

    def restart(self) -> None:
        """See `PromptReader`."""
        self._found: list[TokenLogprobs | None] = [None]
        self.error: Exception | None = None

    def read(self, hidden: Tensor, first: int, head: Callable[[Tensor], Tensor]) -> None:
        """See `PromptReader`."""
        end = min(first + len(hidden), len(self._prompt_ids) - 1)
        while (begin := len(self._found) - 1) < end and self.error is None:
            stop = min(begin + self._num_rows, end)
            logits = head(hidden[begin - first : stop - first])
            if bool(logits.isfinite().all()):
                self._found += logprobs_of(logits, self._prompt_ids[begin + 1 : stop + 1], self._num_top)
            else:
                self.error = _non_finite(begin, stop)

    def added_to(self, output: RequestOutput) -> RequestOutput:
        """See `PromptReader`."""
        return output._replace(prompt_logprobs=tuple(self._found))


class PromptEmbedding:
    """One vector for a prompt: the mean of its tokens' hidden states, or the last one's; see `PromptReader`."""

    def __init__(self, num_tokens: int, pooling: Pooling) -> None:
        self._num_tokens = num_tokens
        self._pooling = pooling
        self.restart()

    def restart(self) -> None:
        """See `PromptReader`."""
        self._num_read = 0
        self._sum: npt.NDArray[np.float64] | None = None
        self.error: Exception | None = None

    def read(self, hidden: Tensor, first: int, head: Callable[[Tensor], Tensor]) -> None:
        """See `PromptReader`."""
        rows = hidden[self._num_read - first : self._num_tokens - first]
        self._num_read += len(rows)
        if self._pooling == "last":
            rows = rows[-1:] if self._num_read == self._num_tokens else rows[:0]
        # One after the other, so that the sum does not depend on where the prompt was cut.
        for row in rows.double().cpu().numpy():
            self._sum = row.copy() if self._sum is None else self._sum + row
        if self._sum is not None and not np.isfinite(self._sum).all():
            self.error = _non_finite(first, first + len(hidden))

    def added_to(self, output: RequestOutput) -> RequestOutput:
        """See `PromptReader`."""
        assert self._sum is not None
        count = self._num_tokens if self._pooling == "mean" else 1
        return output._replace(embedding=(self._sum / count).astype(np.float32))


def _non_finite(begin: int, stop: int) -> NonFiniteLogitsError:
    return NonFiniteLogitsError(
        f"The model computed NaN or infinity in tokens {begin} to {stop} of the prompt.",
        remedy="A damaged weight, or a dtype too narrow for it: check the sources, or set inference.dtype to float32.",
    )
