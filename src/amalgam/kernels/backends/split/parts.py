"""Experts of one layer that lie on another device than the rest of the model, and how they are reached.

In: a step's rows with their experts' ids. Out: the rows of the outputs that these experts make. Must never know: gate
weights, layers, plans.

    primary device        other device         who computes beside whom
    processors            a stand-in (cpu:1)   a thread of the other's own; each has its share of the cores
    processors            a card               the card's kernels are in its queue while the processors compute
    a card                processors           the card's kernels are in its queue while this thread computes
    a card                another card         both have theirs in their queues

Rows go as they are and outputs come back in float32, one for each pair of token and expert, unweighted: whoever adds
them adds in the order of the routing, so that a sum is the same bits wherever an expert lies.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from amalgam.kernels.backends.base import Backend
from amalgam.kernels.backends.split.traffic import Traffic
from amalgam.kernels.backends.split.worker import Worker
from amalgam.kernels.weights import ExpertTable, GatedActivation

Finish = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Share:
    """The experts of a layer that lie on one device.

    Attributes:
        table: they, as the device's backend has prepared them.
        places: int64 `[experts + 1]` on the primary device: the place of each of the layer's experts in the table, -1
            of those that lie elsewhere, and of no expert, whose id is -1.
    """

    table: ExpertTable
    places: Tensor

    def wanted(self, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that some of these experts are chosen for, int64 `[n]`, and the places of their experts `[n, k]`."""
        places = self.places[expert_ids]
        rows = (places >= 0).any(dim=1).nonzero().flatten()
        return rows, places[rows]


class Remote(Protocol):
    """How another device's share is computed."""

    def start(
        self, share: Share, x: Tensor, expert_ids: Tensor, activation: GatedActivation, outputs: Tensor
    ) -> Finish:
        """Begin, and return what waits for the end: then the share's rows of `outputs` are written.

        Args:
            x: `[tokens, hidden]`, on the primary device as all others.
            expert_ids: int64 `[tokens, k]`.
            outputs: float32 `[tokens, k, hidden]`.
        """


class HostRemote:
    """Processors beside processors: a thread of its own."""

    def __init__(self, name: str, backend: Backend, traffic: Traffic) -> None:
        self._backend = backend
        self._traffic = traffic
        self._worker = Worker(f"amalgam-{name}")

    def start(
        self, share: Share, x: Tensor, expert_ids: Tensor, activation: GatedActivation, outputs: Tensor
    ) -> Finish:
        def compute() -> None:
            rows, places = share.wanted(expert_ids)
            if len(rows):
                sent = x[rows]  # a copy: the device has a memory of its own
                self._traffic.send(sent, places)
                results = _computed(self._backend, share, sent, places, activation, num_threads=1)
                _put(outputs, rows, places, results, self._traffic)

        future: Future[None] = self._worker.submit(compute)
        return future.result


class CardRemote:
    """A card beside anything: a stream of its own."""

    def __init__(self, backend: Backend, traffic: Traffic) -> None:
        self._backend = backend
        self._traffic = traffic
        self._stream = torch.cuda.Stream(backend.device)

    def start(
        self, share: Share, x: Tensor, expert_ids: Tensor, activation: GatedActivation, outputs: Tensor
    ) -> Finish:
        rows, places = share.wanted(expert_ids)
        if not len(rows):
            return _nothing
        sent = _pinned(x[rows])
        if x.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            there, places_there = (part.to(self._backend.device, non_blocking=True) for part in (sent, places))
            self._traffic.send(sent, places)
            results = _computed(self._backend, share, there, places_there, activation)
            back = torch.empty(results.shape, dtype=results.dtype, device=x.device, pin_memory=not x.is_cuda)
            back.copy_(results, non_blocking=True)
            done = self._stream.record_event()

        def finish() -> None:
            done.synchronize()
            _put(outputs, rows, places, back, self._traffic)

        return finish


class ProcessorRemote:
    """Processors beside a card: the thread that runs steps has the time, once the card has its kernels in the queue."""

    def __init__(self, backend: Backend, traffic: Traffic) -> None:
        self._backend = backend
        self._traffic = traffic

    def start(
        self, share: Share, x: Tensor, expert_ids: Tensor, activation: GatedActivation, outputs: Tensor
    ) -> Finish:
        sent, ids = (_to_host(part) for part in (x, share.places[expert_ids]))
        arrived = torch.cuda.current_stream(x.device).record_event()

        def finish() -> None:
            arrived.synchronize()
            rows = (ids >= 0).any(dim=1).nonzero().flatten()
            self._traffic.send(sent, ids)
            if len(rows):
                places = ids[rows]
                results = _computed(self._backend, share, sent[rows], places, activation)
                _put(outputs, rows, places, results, self._traffic)

        return finish


def _nothing() -> None:
    pass


def _computed(
    backend: Backend,
    share: Share,
    x: Tensor,
    places: Tensor,
    activation: GatedActivation,
    num_threads: int | None = None,
) -> Tensor:
    """float32 `[rows, k, hidden]`, of the experts that are in the share."""
    results = torch.empty((*places.shape, x.shape[1]), dtype=torch.float32, device=x.device)
    backend.expert_outputs(x, places, share.table, activation, results, num_threads=num_threads)
    return results


def _put(outputs: Tensor, rows: Tensor, places: Tensor, results: Tensor, traffic: Traffic) -> None:
    """Copy the results of some tokens to where they belong; all but `outputs` are where they were computed."""
    tokens, choices = (places >= 0).nonzero(as_tuple=True)
    found = results[tokens.to(results.device), choices.to(results.device)]
    traffic.receive(found)
    at = rows[tokens].to(outputs.device), choices.to(outputs.device)
    outputs[at] = found.to(outputs.device)


def _pinned(x: Tensor) -> Tensor:
    return x if x.is_cuda else x.pin_memory()


def _to_host(x: Tensor) -> Tensor:
    """A copy that is there once the stream has come to it."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
