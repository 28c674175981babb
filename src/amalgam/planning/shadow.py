"""Two plans of a running model on the same tokens, beside its work: a little at a time, on one core, at low priority.

In: loaded versions, windows of tokens. Out: `Shadowed`, with a third plan as the reference; `Compared`, one plan
against the other, whose answers the tokens are. Must never know: requests, rules.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amalgam.composition.loader import ModelLoader
from amalgam.errors import CheckpointError
from amalgam.evaluation.confidence import Bootstrap, Floats, Interval
from amalgam.evaluation.quality import Reference, agreement_of, divergence_of, log_probabilities, loss_of
from amalgam.evaluation.running import BLOCK_SIZE, STEP_TOKENS, Contestant, check_finite, rows_at_once
from amalgam.evaluation.texts import Sample, Window
from amalgam.kernels.step import SequenceState, StepContext, StepSequence
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.models.weights import WeightVersion
from amalgam.planning.following import Shadowed

_SINGLE_TOKENS = 4  # of a request, that are computed one by one to see how long that takes


class Throttle:
    """Keeps the work of each thread that calls it within a share of the time; a `Progress`, between two pieces of it.

    The thread that makes it counts from then on, another one from its own beginning: weights are loaded in threads that
    are there for nothing else.

    Args:
        check: raises what ends the work.
        wait: sleeps so many seconds, or less if the work is to end.
    """

    def __init__(self, share: float, check: Callable[[], None], wait: Callable[[float], object]) -> None:
        self._share = share
        self._check = check
        self._wait = wait
        self._since = threading.local()  # `seconds` of each thread's own clock
        self._since.seconds = time.thread_time()

    def __call__(self, what: str, done: int, total: int) -> None:
        self._check()
        spent = time.thread_time() - getattr(self._since, "seconds", 0.0)
        self._wait(spent * (1 / self._share - 1))
        self._since.seconds = time.thread_time()
        self._check()


def shadow(
    loader: ModelLoader,
    dtype: torch.dtype,
    versions: tuple[WeightVersion, WeightVersion, WeightVersion],
    name: str,
    windows: Sequence[Sequence[int]],
    throttle: Throttle,
) -> Shadowed:
    """
    Args:
        versions: the reference, the plan in force, the candidate.
        name: of the reference, for people.
        windows: token ids of one request each, at least two.

    Raises:
        CheckpointError: hidden states or logits hold NaN or infinity.
    """
    started = time.monotonic()
    decoder = Decoder(loader.spec, max(map(len, windows)), dtype, loader.device)
    reference, now, candidate = (
        Contestant(label, loader, decoder, version)
        for label, version in zip((name, "the plan in force", "the candidate"), versions, strict=True)
    )
    sample = Sample(tuple(Window("traffic", unit, tuple(ids), 0.0) for unit, ids in enumerate(windows)), "requests")
    scale = Reference(reference, sample, throttle)
    figures = [scale.figures(plan, throttle) for plan in (now, candidate)]
    bootstrap = Bootstrap(figures[0].units)
    before, after = (bootstrap.mean(each.divergence) for each in figures)
    difference = bootstrap.ratio_of_means(figures[1].divergence, figures[0].divergence)
    return Shadowed(name, sample.num_tokens, len(windows), before, after, difference, time.monotonic() - started)


@dataclass(frozen=True)
class Times:
    """Seconds of one core's time for each token.

    Attributes:
        ratio: candidate / now.
    """

    now: float
    candidate: float
    ratio: Interval


@dataclass(frozen=True)
class Compared:
    """A candidate against the plan in force, on tokens of answers that this one gave.

    Attributes:
        divergence: KL(now ‖ candidate) in nats a token; `percentile_99` of it.
        agreement: share of the tokens for which both have the same likeliest one.
        perplexity_now, perplexity_candidate: of the answers.
        prompt_time: of tokens that are computed many at a time; `token_time`: one by one.
    """

    num_requests: int
    num_tokens: int
    divergence: Interval
    percentile_99: Interval
    agreement: Interval
    perplexity_now: Interval
    perplexity_candidate: Interval
    prompt_time: Times
    token_time: Times


class _Run(NamedTuple):
    """One plan on one request.

    Attributes:
        hidden: `[tokens, hidden]`, what the head reads.
        seconds: of the tokens that were computed together, and of the others; `num_tokens` likewise.
    """

    hidden: Tensor
    seconds: tuple[float, float]
    num_tokens: tuple[int, int]


class _Row(NamedTuple):
    """What one request has given; the figures `[tokens]`."""

    divergence: Floats
    agreement: Floats
    loss_now: Floats
    loss_candidate: Floats
    runs: tuple[_Run, _Run]


class Comparison:
    """Two plans, compared on one request after the other.

    Args:
        max_tokens: of a request.
        throttle: is called between two pieces of work.
    """

    def __init__(
        self,
        loader: ModelLoader,
        dtype: torch.dtype,
        now: WeightVersion,
        candidate: WeightVersion,
        max_tokens: int,
        throttle: Throttle,
    ) -> None:
        self._decoder = Decoder(loader.spec, max_tokens, dtype, loader.device)
        self._cache: KVCache | None = None  # one for all requests: what is recorded of steps belongs to a cache
        self._versions: tuple[WeightVersion, ...] = now, candidate
        self._names = "the weights in use", "the candidate"
        self._at_once = rows_at_once(loader.spec.vocab_size)
        self._throttle = throttle
        self._rows: list[_Row] = []
        self._known: Compared | None = None  # of as many requests as it says

    @property
    def num_requests(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def add(self, token_ids: Sequence[int], num_prompt_tokens: int) -> bool:
        """Run both on a request; the figures are of its answer's tokens, of which there is at least one.

        Returns:
            False: the plan in force computes NaN or infinity for it, which tells nothing of the candidate.

        Raises:
            CheckpointError: of the candidate only, hidden states or logits hold NaN or infinity.
        """
        if self._cache is None:
            self._cache = self._begin(token_ids[0])
        runs: dict[int, _Run] = {}
        failure: CheckpointError | None = None
        for which in (0, 1) if len(self._rows) % 2 else (1, 0):  # who comes second finds the caches warm
            try:
                runs[which] = self._run(token_ids, which)
            except CheckpointError as error:
                if which == 0:
                    return False
                failure = error
        if failure is not None:
            raise failure
        targets = torch.tensor(token_ids[num_prompt_tokens:])
        rows = torch.arange(num_prompt_tokens - 1, len(token_ids) - 1)
        parts: list[tuple[Tensor, ...]] = []
        for some, wanted in zip(rows.split(self._at_once), targets.split(self._at_once), strict=True):
            try:
                now = self._log_probabilities(runs, 0, some)
            except CheckpointError:
                return False
            candidate = self._log_probabilities(runs, 1, some)
            losses = loss_of(now, wanted), loss_of(candidate, wanted)
            parts.append((divergence_of(now, candidate), agreement_of(now, candidate), *losses))
            self._throttle("Comparing", 0, 1)
        divergence, agreement, loss_now, loss_candidate = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
        kept = tuple(runs[which]._replace(hidden=torch.empty(0)) for which in (0, 1))
        self._rows.append(_Row(divergence, agreement, loss_now, loss_candidate, (kept[0], kept[1])))
        return True

    def _begin(self, token_id: int) -> KVCache:
        """Make now what the first steps would else wait for, since they are timed."""
        decoder = self._decoder
        num_blocks = -(-decoder.max_positions // BLOCK_SIZE)
        cache = KVCache.allocate(decoder.spec, num_blocks, BLOCK_SIZE, decoder.dtype, decoder.device)
        for version in self._versions:
            decoder.prepare(version, cache)
            decoder.compile(version).run(self._step(cache, [token_id], 0, 1))
            self._throttle("Comparing", 0, 1)
        return cache

    def _step(self, cache: KVCache, token_ids: Sequence[int], first: int, num_logits: int) -> StepContext:
        """Of tokens of the one sequence, the first of them at a position."""
        state = SequenceState.of(0, first) if self._decoder.spec.state_bytes else None
        blocks = range(-(-(first + len(token_ids)) // BLOCK_SIZE))
        return StepContext([StepSequence(list(token_ids), first, blocks, num_logits, state)], cache)

    def _log_probabilities(self, runs: Mapping[int, _Run], which: int, rows: Tensor) -> Tensor:
        compiled = self._decoder.compile(self._versions[which])
        return log_probabilities(compiled, runs[which].hidden[rows], self._names[which]).cpu()

    def _run(self, token_ids: Sequence[int], which: int) -> _Run:
        """Compute all but the last few tokens together, and those one by one, as an engine does."""
        decoder, cache = self._decoder, self._cache
        assert cache is not None
        compiled = decoder.compile(self._versions[which])
        num_single = min(_SINGLE_TOKENS, len(token_ids) - 1)
        num_together = len(token_ids) - num_single
        hidden: list[Tensor] = []

        def run(first: int, stop: int, num_logits: int) -> float:
            step = self._step(cache, token_ids[first:stop], first, num_logits)
            started = _clock(decoder.device)
            compiled.run(step)
            seconds = _clock(decoder.device) - started
            hidden.append(compiled.hidden().clone())
            self._throttle("Comparing", stop, len(token_ids))
            return seconds

        together = sum(
            run(first, min(first + STEP_TOKENS, num_together), 0) for first in range(0, num_together, STEP_TOKENS)
        )
        single = sum(run(place, place + 1, 1) for place in range(num_together, len(token_ids)))
        found = torch.cat(hidden)
        check_finite(found, self._names[which], "traffic")
        return _Run(found, (together, single), (num_together, num_single))

    def close(self) -> None:
        """Let the weights go; the figures stay."""
        self._versions = ()
        self._cache = None

    def read(self) -> Compared | None:
        """What is known so far; None: nothing. In any thread."""
        rows, known = list(self._rows), self._known
        if not rows or (known is not None and known.num_requests == len(rows)):
            return known
        sizes = [len(row.divergence) for row in rows]
        by_token = Bootstrap(np.repeat(np.arange(len(rows)), sizes))
        divergence = _joined(row.divergence for row in rows)
        losses = [by_token.mean(_joined(getattr(row, name) for row in rows)) for name in ("loss_now", "loss_candidate")]
        perplexities = [_exponential(loss) for loss in losses]
        self._known = Compared(
            num_requests=len(rows),
            num_tokens=sum(sizes),
            divergence=by_token.mean(divergence),
            percentile_99=by_token.quantiles(divergence, (0.99,))[0],
            agreement=by_token.mean(_joined(row.agreement for row in rows)),
            perplexity_now=perplexities[0],
            perplexity_candidate=perplexities[1],
            prompt_time=_times(rows, 0),
            token_time=_times(rows, 1),
        )
        return self._known


def _times(rows: Sequence[_Row], phase: int) -> Times:
    """Of tokens that are computed together (0), or one by one (1)."""
    now, candidate = (np.array([row.runs[which].seconds[phase] for row in rows]) for which in (0, 1))
    num_tokens = max(1, sum(row.runs[0].num_tokens[phase] for row in rows))
    more = Bootstrap(np.arange(len(rows))).ratio_of_means(candidate, now)
    bounds = [None if value is None else value + 1 for value in (more.low, more.high)]
    return Times(float(now.sum()) / num_tokens, float(candidate.sum()) / num_tokens, Interval(more.value + 1, *bounds))


def _joined(parts: Iterable[Floats]) -> Floats:
    return np.concatenate(list(parts))


def _exponential(loss: Interval) -> Interval:
    bounds = [None if value is None else math.exp(value) for value in (loss.low, loss.high)]
    return Interval(math.exp(loss.value), *bounds)


def _clock(device: torch.device) -> float:
    """Seconds: of this thread's work on a CPU, whoever else has the cores; else by the clock, when all is done."""
    if device.type == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
