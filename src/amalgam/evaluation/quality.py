"""A plan against a reference plan, token by token.

In: two loaded plans and windows. Out: `Figures` of each token, and `Quality`: their summary with confidence intervals.
Must never know: where plans come from.

The divergence is KL(reference ‖ plan) of the next token, in nats (Kullback & Leibler 1951), at every position of every
window but the last, which predicts nothing that is known. Logits are computed of some positions at a time, so that
those of a large vocabulary take no more memory than those of a small one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.composition.progress import Progress
from amalgam.errors import CheckpointError
from amalgam.evaluation.confidence import MIN_UNITS, Bootstrap, Floats, Interval
from amalgam.evaluation.running import Contestant, Step, rows_at_once
from amalgam.evaluation.texts import Sample, Window
from amalgam.kernels.backends import Compiled

CHANCE = 0.25  # of the vocabulary: a perplexity beyond it is that of a guess

_KEPT_BYTES = 512 * 2**20  # of the reference's probabilities
_BLOCK_BYTES = 4 * 2**20  # of logits that are compared at a time: they stay in a core's cache


@dataclass(frozen=True)
class Figures:
    """One value for each scored token. Divergence and agreement are those with the reference.

    Attributes:
        loss: negative log-likelihood of the token that follows, in nats.
    """

    units: npt.NDArray[np.int64]
    domains: npt.NDArray[np.int64]
    num_bytes: Floats
    loss: Floats
    divergence: Floats
    agrees: Floats

    def only(self, is_wanted: npt.NDArray[np.bool_]) -> Figures:
        return Figures(*(getattr(self, name)[is_wanted] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Quality:
    """What the figures of some tokens say; without a reference, divergence and agreement are None.

    Attributes:
        bits_per_byte: loss for each byte of the text, which tokenizers do not change; None where bytes are not known.
        percentile_99, percentile_999: of the divergence.
    """

    num_tokens: int
    num_units: int
    perplexity: Interval
    bits_per_byte: Interval | None
    divergence: Interval | None = None
    percentile_99: Interval | None = None
    percentile_999: Interval | None = None
    agreement: Interval | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Reference:
    """The plan that others are compared with; its hidden states are computed once and kept.

    Raises:
        CheckpointError: they hold NaN or infinity.
    """

    def __init__(self, contestant: Contestant, sample: Sample, progress: Progress | None = None) -> None:
        self.contestant = contestant
        self.sample = sample
        self._hidden = dict(contestant.hidden(sample.windows, progress))
        self._kept: dict[tuple[Step, int, int], _Expected] = {}
        self._room = _KEPT_BYTES

    def figures(self, plan: Contestant | None = None, progress: Progress | None = None) -> Figures:
        """A plan's figures; the reference's own, without divergence, if None is given.

        Raises:
            CheckpointError: hidden states or logits hold NaN or infinity.
        """
        windows = self.sample.windows
        other = None if plan is None else plan.compiled
        source = self._hidden.items() if plan is None else plan.hidden(windows, progress)
        loss: list[Tensor] = []
        divergence: list[Tensor] = []
        agrees: list[Tensor] = []
        for step, hidden in source:
            rows, targets = scored(windows[step.start : step.stop])
            for some, wanted in zip(rows.split(self._at_once), targets.split(self._at_once), strict=True):
                if other is None or plan is None:
                    found = log_probabilities(self.contestant.compiled, hidden[some], self.contestant.name)
                    loss.append(loss_of(found, wanted))
                    continue
                compared = self._expected(step, some).compare(_logits(other, hidden[some], plan.name), wanted)
                for part, values in zip((loss, divergence, agrees), compared, strict=True):
                    part.append(values)
        zeros = [torch.zeros(sum(map(len, loss)), dtype=torch.float64)]
        return _figures(self.sample, loss, divergence or zeros, agrees or zeros)

    def _expected(self, step: Step, rows: Tensor) -> _Expected:
        """Of few tokens it is kept, for the next plan."""
        key = step, int(rows[0]), len(rows)
        if key in self._kept:
            return self._kept[key]
        hidden = self._hidden[step][rows]
        found = _Expected(_logits(self.contestant.compiled, hidden, self.contestant.name))
        if self._room >= found.nbytes:
            self._room -= found.nbytes
            self._kept[key] = found
        return found

    @property
    def _at_once(self) -> int:
        return rows_at_once(self.contestant.loader.spec.vocab_size)


class _Expected:
    """What the reference predicts behind some tokens, such that comparing a plan takes one exponential a logit.

    KL(p ‖ q) of q = exp(z) / Σ exp(z) is log Σ exp(z) - Σ p z, less the same of p's own logits.
    """

    def __init__(self, logits: Tensor) -> None:
        """
        Args:
            logits: the reference's, `[rows, vocabulary]`.
        """
        self._probabilities = logits.double().softmax(-1)
        self._likeliest = logits.argmax(-1)
        sums, products = self._sums_and_products(logits)
        self._entropy = sums - products

    @property
    def nbytes(self) -> int:
        return self._probabilities.nbytes

    def compare(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, divergence and agreement of each row, float64."""
        sums, products = self._sums_and_products(logits)
        loss = sums - logits.gather(1, targets[:, None]).squeeze(1)
        agrees = self._likeliest == logits.argmax(-1)
        return loss, (sums - products - self._entropy).clamp_(min=0), agrees.double()

    def _sums_and_products(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """log Σ exp(z) and Σ p z of each row, float64."""
        size = max(1, _BLOCK_BYTES // (8 * logits.shape[1]))
        sums, products = [], []
        for probabilities, block in zip(self._probabilities.split(size), logits.split(size), strict=True):
            wide = block.double()
            sums.append(wide.logsumexp(-1))
            products.append(wide.mul_(probabilities).sum(-1))
        return torch.cat(sums), torch.cat(products)


def own_figures(contestant: Contestant, sample: Sample, progress: Progress | None = None) -> Figures:
    """A plan's figures without a reference: of another model, say."""
    at_once = rows_at_once(contestant.loader.spec.vocab_size)
    loss = []
    for step, hidden in contestant.hidden(sample.windows, progress):
        rows, targets = scored(sample.windows[step.start : step.stop])
        for some, wanted in zip(rows.split(at_once), targets.split(at_once), strict=True):
            found = log_probabilities(contestant.compiled, hidden[some], contestant.name)
            loss.append(loss_of(found, wanted))
    zeros = [torch.zeros(sum(map(len, loss)), dtype=torch.float64)]
    return _figures(sample, loss, zeros, zeros)


@torch.inference_mode()
def log_probabilities(compiled: Compiled, hidden: Tensor, name: str) -> Tensor:
    """float64 `[rows, vocabulary]`.

    Raises:
        CheckpointError: a logit is NaN or infinite.
    """
    return _logits(compiled, hidden, name).double().log_softmax(-1)


@torch.inference_mode()
def _logits(compiled: Compiled, hidden: Tensor, name: str) -> Tensor:
    """`[rows, vocabulary]`, see `log_probabilities`."""
    logits = compiled.head(hidden.contiguous())
    if not bool(logits.sum().isfinite()):
        raise CheckpointError(f"{name}: logits hold NaN or infinity.", remedy="Check the weights of the head.")
    return logits


def loss_of(found: Tensor, targets: Tensor) -> Tensor:
    """Of each row of log-probabilities, minus that of its target."""
    return -found.gather(1, targets[:, None]).squeeze(1)


def divergence_of(reference: Tensor, found: Tensor) -> Tensor:
    """KL(reference ‖ found) of each row of log-probabilities, in nats."""
    return (reference.exp() * (reference - found)).sum(-1)


def agreement_of(reference: Tensor, found: Tensor) -> Tensor:
    """1 where both have the same likeliest token, else 0; float64."""
    return (reference.argmax(-1) == found.argmax(-1)).double()


def scored(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """The rows of a step that predict a token that is known, and those tokens; int64 on the CPU."""
    rows: list[int] = []
    targets: list[int] = []
    start = 0
    for window in windows:
        size = len(window.token_ids)
        rows += range(start + window.first - 1, start + size - 1)
        targets += window.token_ids[window.first :]
        start += size
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)


def _figures(sample: Sample, loss: Sequence[Tensor], divergence: Sequence[Tensor], agrees: Sequence[Tensor]) -> Figures:
    sizes = [window.num_rows for window in sample.windows]
    domains = {domain: index for index, domain in enumerate(sample.domains)}
    per_token = [window.num_bytes / size for window, size in zip(sample.windows, sizes, strict=True)]
    return Figures(
        np.repeat(np.array([window.unit for window in sample.windows], np.int64), sizes),
        np.repeat(np.array([domains[window.domain] for window in sample.windows], np.int64), sizes),
        np.repeat(np.array(per_token, np.float64), sizes),
        *(torch.cat(list(parts)).numpy() for parts in (loss, divergence, agrees)),
    )


def summarise(figures: Figures, *, has_reference: bool = True, seed: int = 0) -> Quality:
    """Means and percentiles with their 95% confidence intervals."""
    bootstrap = Bootstrap(figures.units, seed)
    loss = bootstrap.mean(figures.loss)
    bits = _ratio(bootstrap, figures.loss / math.log(2), figures.num_bytes)
    own = Quality(len(figures.loss), bootstrap.num_units, _exponential(loss), bits)
    if not has_reference:
        return own
    high, higher = bootstrap.quantiles(figures.divergence, (0.99, 0.999))
    return Quality(
        own.num_tokens,
        own.num_units,
        own.perplexity,
        own.bits_per_byte,
        bootstrap.mean(figures.divergence),
        high,
        higher,
        bootstrap.mean(figures.agrees),
    )


def by_domain(figures: Figures, sample: Sample, *, has_reference: bool = True) -> dict[str, Quality]:
    """Domain → its own summary."""
    return {
        domain: summarise(figures.only(figures.domains == index), has_reference=has_reference)
        for index, domain in enumerate(sample.domains)
    }


def _ratio(bootstrap: Bootstrap, values: Floats, weights: Floats) -> Interval | None:
    if not weights.any():
        return None
    ratio = bootstrap.ratio_of_means(values, weights)
    if ratio.low is None or ratio.high is None:
        return Interval(ratio.value + 1)
    return Interval(ratio.value + 1, ratio.low + 1, ratio.high + 1)


def _exponential(loss: Interval) -> Interval:
    bounds = [None if value is None else math.exp(value) for value in (loss.low, loss.high)]
    return Interval(math.exp(loss.value), *bounds)


def remarks(reference: Quality, sample: Sample, vocab_size: int) -> list[str]:
    """What a reader of the figures should know."""
    found = []
    if reference.num_units < MIN_UNITS:
        found.append(
            f"{reference.num_units} {sample.unit} are too few for confidence intervals: give texts of at least "
            f"{MIN_UNITS} {sample.unit}."
        )
    if reference.perplexity.value > CHANCE * vocab_size:
        found.append(
            f"The reference predicts these texts as badly as chance would (perplexity "
            f"{reference.perplexity.value:.0f}, {vocab_size} tokens): the tokenizer may be another model's."
        )
    return found
