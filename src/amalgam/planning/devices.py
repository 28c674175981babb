"""The devices that a model is divided between: what options take there, and how long a step reads them.

In: a problem, as each kind of device would hold it; how the traffic uses the experts; budgets. Out: `Devices`, which
makes the `Place`s of a placement, and says of one what lies where. Must never know: losses, files, terminals.

The primary device computes all but the experts that lie elsewhere, so that everything dense, the KV cache and the
workspace count there. Of the others weights alone count.

A step of n sequences reads an expert's weights with probability 1 - (1 - p)^n, where a token uses it with probability
p; everything else that is multiplied is read at each step. What is read takes its bytes over the device's bandwidth.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from amalgam.errors import PlanError
from amalgam.planning.budget import DeviceBudget
from amalgam.planning.cards import card_named
from amalgam.planning.lagrangian import Floats, Integers
from amalgam.planning.losses import table
from amalgam.planning.placement import Place, Placement
from amalgam.planning.problem import Item, Problem
from amalgam.planning.use import Use

_READ_BYTES, _ROUNDS = 256 * 2**20, 3


@dataclass(frozen=True)
class Device:
    """Attributes:
    budget_bytes: of its memory, for the model.
    bandwidth: bytes a second that can be read of it; None: not known.
    origin: of the bandwidth, for people.
    """

    name: str
    budget_bytes: int
    bandwidth: float | None
    origin: str


@dataclass(frozen=True)
class Share:
    """What of a plan lies on one device.

    Attributes:
        other_bytes: KV cache and workspace.
        num_experts: whole ones, of all layers; `of_layer`: least and most of any layer.
        expert_bytes: their weights that have a choice.
        activations: share of all activations of experts that theirs are.
        read_bytes: expected, of a step.
        seconds: that takes; None: how fast it is read is not known.
    """

    device: Device
    is_primary: bool
    dense_bytes: int
    other_bytes: int
    num_experts: int
    of_layer: tuple[int, int]
    expert_bytes: int
    activations: float
    read_bytes: int
    seconds: float | None

    @property
    def nbytes(self) -> int:
        return self.dense_bytes + self.other_bytes + self.expert_bytes


@dataclass(frozen=True)
class Devices:
    """Attributes:
    primary: index.
    memory: for each device `[items, options]`, bytes; infinity where an option cannot lie there.
    fixed_bytes: of weights without a choice, on the primary device; `fixed_reads`: what a step reads of them.
    other_bytes: KV cache and workspace, there.
    reads: `[items]`, how often a step reads each.
    groups: int64 `[items]`: the weights of an expert have one number.
    sequences: of a step.
    """

    problem: Problem
    devices: tuple[Device, ...]
    primary: int
    memory: tuple[Floats, ...]
    fixed_bytes: int
    fixed_reads: int
    other_bytes: int
    reads: Floats
    groups: Integers
    sequences: int

    def check(self) -> None:
        """
        Raises:
            PlanError: see `places`; the smallest plan takes more than all devices have.
        """
        left = sum(place.limit for place in self.places())
        least = float(self.least_memory.min(axis=1).sum())
        if least > left:
            kept = self.fixed_bytes + self.other_bytes
            budget = ", ".join(f"{device.name}={device.budget_bytes:,} bytes" for device in self.devices)
            raise PlanError(
                f"The smallest plan takes {(least + kept) / 1e6:,.1f} MB, with KV cache and workspace, and the budget "
                f"is {budget}.",
                remedy="Raise a budget, or declare a source in a narrower precision.",
            )

    def places(self) -> list[Place]:
        """
        Raises:
            PlanError: what has no choice takes more than the primary device has; how fast another one is is not known.
        """
        kept = self.fixed_bytes + self.other_bytes
        first = self.devices[self.primary]
        if kept > first.budget_bytes:
            raise PlanError(
                f"{first.name} has {first.budget_bytes:,} bytes, less than what has no choice: {self.fixed_bytes:,} "
                f"bytes of weights, and {self.other_bytes:,} of KV cache and workspace.",
                remedy="Raise its budget, or lower --context or --sequences.",
            )
        return [
            Place(
                device.name,
                device.budget_bytes - (kept if index == self.primary else 0),
                self.memory[index],
                self._seconds(index),
            )
            for index, device in enumerate(self.devices)
        ]

    def _seconds(self, index: int) -> Floats:
        device = self.devices[index]
        if device.bandwidth is None and index != self.primary:
            raise PlanError(
                f"How fast {device.name} is read is not known.",
                remedy=f"Say it in the budget: {device.name}=24GB@1008GB/s.",
            )
        # Of a primary device of unknown speed: what the others read is what there is to save.
        per_byte = 0.0 if device.bandwidth is None else 1.0 / device.bandwidth
        return np.asarray(self.reads[:, None] * self.memory[index] * per_byte)

    @property
    def least_memory(self) -> Floats:
        """`[items, options]`: of each where it takes least."""
        return np.asarray(np.stack(self.memory).min(axis=0))

    def shares(self, placement: Placement, use: Use) -> list[Share]:
        """What lies where."""
        return [self._share(index, placement, use) for index in range(len(self.devices))]

    def _share(self, index: int, placement: Placement, use: Use) -> Share:
        device, items = self.devices[index], self.problem.items
        rows = np.flatnonzero(placement.places == index)
        sizes = self.memory[index][rows, placement.options[rows]]
        is_expert = np.array([items[row].expert is not None for row in rows], dtype=bool)
        cells = {(items[row].layer, items[row].expert) for row in rows[is_expert]}
        layers = {item.layer: 0 for item in items if item.expert is not None}
        for layer, _ in cells:
            layers[layer] += 1
        is_primary = index == self.primary
        read = float(self.reads[rows] @ sizes) + (self.fixed_reads if is_primary else 0)
        return Share(
            device,
            is_primary,
            int(sizes[~is_expert].sum()) + (self.fixed_bytes if is_primary else 0),
            self.other_bytes if is_primary else 0,
            len(cells),
            (min(layers.values(), default=0), max(layers.values(), default=0)),
            int(sizes[is_expert].sum()),
            _activations(cells, use) / max(_activations(use.activations, use), 1e-300),
            int(read),
            None if device.bandwidth is None else read / device.bandwidth,
        )


def _activations(cells: Iterable[tuple[int | None, int | None]], use: Use) -> float:
    return sum(
        use.activations.get((layer, expert), 0.0) for layer, expert in cells if layer is not None and expert is not None
    )


def divide(
    problem: Problem,
    held: Mapping[str, Problem],
    devices: Sequence[Device],
    primary: int,
    use: Use,
    *,
    fixed_reads: int,
    other_bytes: int,
    sequences: int,
    has_tied_head: bool,
) -> Devices:
    """
    Args:
        held: device → the same problem with the bytes that it takes there.
    """
    memory = []
    for index, device in enumerate(devices):
        bytes_of = {
            item.name: {option.source: float(option.memory_bytes) for option in item.options}
            for item in held[device.name].items
        }
        found = table(problem, bytes_of)
        if index != primary:
            found[[item.expert is None for item in problem.items]] = np.inf
        memory.append(found)
    numbers: dict[object, int] = {}
    keys = [item.name if item.expert is None else (item.layer, item.expert) for item in problem.items]
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    reads = np.array([_reads(item, use, sequences, has_tied_head=has_tied_head) for item in problem.items])
    fixed = held[devices[primary].name].fixed_memory
    return Devices(
        problem, tuple(devices), primary, tuple(memory), fixed, fixed_reads, other_bytes, reads, groups, sequences
    )


def _reads(item: Item, use: Use, sequences: int, *, has_tied_head: bool) -> float:
    if item.layer is None or item.expert is None:
        return 0.0 if item.role == "embedding" and not has_tied_head else 1.0
    return float(1.0 - (1.0 - min(1.0, use.activations.get((item.layer, item.expert), 0.0))) ** sequences)


def read_bandwidth() -> float:
    """Bytes a second that all threads read of this machine's memory, at best."""
    values = torch.ones(_READ_BYTES // 4)
    best = 0.0
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        values.sum()
        best = max(best, _READ_BYTES / (time.perf_counter() - started))
    return best


def device_of(budget: DeviceBudget) -> Device:
    """How fast a device is read: as given, as published, or measured where it is the memory of this machine."""
    memory = budget.memory
    if memory.bandwidth is not None:
        return Device(budget.name, memory.memory_bytes, memory.bandwidth, memory.source)
    if budget.name.startswith("cpu"):
        return Device(budget.name, memory.memory_bytes, read_bandwidth(), "measured on this machine")
    index = int(budget.name.partition(":")[2] or 0)
    if torch.cuda.is_available() and index < torch.cuda.device_count():
        known = card_named(torch.cuda.get_device_name(index))
        if known is not None:
            return Device(budget.name, memory.memory_bytes, known.bandwidth, f"published for {known.name}")
    return Device(budget.name, memory.memory_bytes, None, "not known")
