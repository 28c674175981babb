"""Mixtures of experts that lie on several devices.

In: a program whose `Mix`es say where each expert lies. Out: the same program, with experts that mix themselves: each
device multiplies its own, all at the same time, and the primary backend adds. Must never know: how a program is run,
names of weights, plans.

With kernels of one kind on all devices an output is the same bits as on one device: what an expert makes of a row is
made in float32, or rounded as that backend does, and added in the order of the routing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from amalgam.kernels.backends.base import Backend, OwnMixture
from amalgam.kernels.backends.split.parts import CardRemote, Finish, HostRemote, ProcessorRemote, Remote, Share
from amalgam.kernels.backends.split.traffic import Traffic
from amalgam.kernels.program import Instruction, Mix, Program
from amalgam.kernels.weights import ExpertTable, GatedActivation


@dataclass(frozen=True, eq=False)
class SplitExperts(OwnMixture):
    """See `OwnMixture`.

    Attributes:
        backend: of the primary device.
        near: experts there; None: there are none.
        far: the others, each share with how it is reached.
        num_helpers: compute threads of other devices that compute beside this one's.
    """

    backend: Backend = field(kw_only=True)
    near: Share | None = field(kw_only=True)
    far: Sequence[tuple[Share, Remote]] = field(kw_only=True)
    num_helpers: int = field(kw_only=True)

    def mix(self, x: Tensor, expert_ids: Tensor, gate_weights: Tensor, activation: GatedActivation) -> Tensor:
        x, expert_ids = x.contiguous(), expert_ids.contiguous()
        outputs = torch.empty((*expert_ids.shape, x.shape[1]), dtype=torch.float32, device=x.device)
        begun: list[Finish] = []
        try:
            for share, remote in self.far:
                begun.append(remote.start(share, x, expert_ids, activation, outputs))
            if self.near is not None:
                places = self.near.places[expert_ids]
                threads = max(1, torch.get_num_threads() - self.num_helpers) if self.num_helpers else None
                self.backend.expert_outputs(x, places, self.near.table, activation, outputs, num_threads=threads)
        finally:
            _finish(begun)  # whatever has failed: they write to `outputs`
        return self.backend.weighted_sum(outputs, expert_ids, gate_weights, x.dtype)

    def alone(self) -> SplitExperts:
        return replace(self, far=(), num_helpers=0)

    @property
    def who(self) -> str:
        counts = Counter(name or "here" for name in self.devices)
        return "split: " + ", ".join(f"{number} of {len(self)} experts {_at(name)}" for name, number in counts.items())


def _at(name: str) -> str:
    return name if name == "here" else f"on {name}"


def _finish(begun: Sequence[Finish]) -> None:
    """Wait for all, and raise the first error."""
    if begun:
        try:
            begun[0]()
        finally:
            _finish(begun[1:])


class Splitter:
    """Makes mixtures of experts on several devices ready to run, for one model.

    Args:
        backend: that runs programs.
        open_backend: by a device's name.

    Attributes:
        traffic: by device, of all programs together.
    """

    def __init__(self, backend: Backend, open_backend: Callable[[str], Backend]) -> None:
        self.traffic: dict[str, Traffic] = {}
        self._backend = backend
        self._open_backend = open_backend
        self._others: dict[str, tuple[Backend, Remote]] = {}
        self._opening = threading.Lock()  # any thread compiles

    def split(self, program: Program) -> Program:
        """The program, with mixtures over several devices where it says that experts lie on some.

        Raises:
            ValueError: a device is not there.
        """
        if not any(isinstance(one, Mix) and any(one.experts.devices) for one in program.instructions):
            return program
        return Program(tuple(map(self._instruction, program.instructions)))

    def _instruction(self, one: Instruction) -> Instruction:
        if not isinstance(one, Mix) or not any(one.experts.devices):
            return one
        return replace(one, experts=self._experts(one.experts))

    def _experts(self, experts: ExpertTable) -> SplitExperts:
        names = sorted({name for name in experts.devices if name is not None})
        others = [(name, *self._other(name)) for name in names]
        far = [(self._share(experts, name, backend), remote) for name, backend, remote in others]
        near = self._share(experts, None, self._backend) if None in experts.devices else None
        helpers = sum(isinstance(remote, HostRemote) for _, _, remote in others)
        return SplitExperts(
            experts.experts, experts.devices, backend=self._backend, near=near, far=far, num_helpers=helpers
        )

    def _share(self, experts: ExpertTable, device: str | None, backend: Backend) -> Share:
        own = [index for index, name in enumerate(experts.devices) if name == device]
        places = torch.full((len(experts) + 1,), -1, dtype=torch.int64)
        places[own] = torch.arange(len(own))
        table = backend.prepare_experts(ExpertTable(tuple(experts[index] for index in own)))
        return Share(table, places.to(self._backend.device))

    def _other(self, name: str) -> tuple[Backend, Remote]:
        with self._opening:
            if name not in self._others:
                backend, traffic = self._open_backend(name), Traffic()
                self._others[name] = backend, _remote(name, self._backend, backend, traffic)
                self.traffic = {**self.traffic, name: traffic}
            return self._others[name]


def _remote(name: str, primary: Backend, other: Backend, traffic: Traffic) -> Remote:
    if other.device.type != "cpu":
        return CardRemote(other, traffic)
    return HostRemote(name, other, traffic) if primary.device.type == "cpu" else ProcessorRemote(other, traffic)
