"""Two plans of a running model on the same tokens, beside its work: a little at a time, on one core, at low priority.

In: loaded versions, windows of tokens. Out: `Shadowed`. Must never know: requests, rules.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence

import torch

from amalgam.composition.loader import ModelLoader
from amalgam.evaluation.confidence import Bootstrap
from amalgam.evaluation.quality import Reference
from amalgam.evaluation.running import Contestant
from amalgam.evaluation.texts import Sample, Window
from amalgam.models.decoder import Decoder
from amalgam.models.weights import WeightVersion
from amalgam.planning.following import Shadowed

_NICENESS = 5  # more than others; no more than that: whoever holds the interpreter's lock must not wait long for a core

_turning_quiet = threading.Lock()


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


def be_quiet() -> None:
    """Have the calling thread, from now on, compute alone and behind others. Once for each thread.

    A call of a kernel that finds the other threads at work for the engine would leave the engine without them.
    """
    with _turning_quiet:  # who asks in between how many threads compute is told one
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # That is what threads begun from now on would have too. A thread that says otherwise undoes it for these only.
        other = threading.Thread(target=torch.set_num_threads, args=[num_threads], name="amalgam-threads")
        other.start()
        other.join()
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)


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
