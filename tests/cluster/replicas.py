"""Replicas in this process: real members or scripted ones, which can be killed at any moment."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from amalgam.base.machine import ProcessFigures
from amalgam.cluster.channel import Address, Listener
from amalgam.cluster.channels import Channels
from amalgam.cluster.interface import (
    Ask,
    Description,
    Figures,
    Forwarded,
    Head,
    Noted,
    Part,
    ReplicaState,
    Take,
    Weights,
)
from amalgam.cluster.routing import Routing
from amalgam.config.placement import Rule
from amalgam.engine.generation_config import ModelDefaults
from amalgam.engine.meter import Meter, Reading
from amalgam.engine.request import EngineStatus
from amalgam.errors import PlanError, ReplicaLostError, VersionNotFoundError
from amalgam.runtime.changes import ChangeRequest, RemapResult
from amalgam.runtime.devices import DeviceFigures
from amalgam.text.filters.contract import Where

IDLE = EngineStatus(
    is_alive=True, is_draining=False, num_running=0, num_waiting=0, num_free_blocks=100, num_blocks=100, versions={1: 0}
)
RULES = (Rule(pattern="a.*", source="int4"),)
FIRST = Weights(1, RULES, "d1")
STREAM = Head(200, ((b"content-type", b"text/event-stream"),))


def state(**changes: Any) -> ReplicaState:
    """Of an idle replica with version 1."""
    made = ReplicaState(1, {}, frozenset({1}), 2, IDLE, None)
    return replace(made, **changes)


@dataclass
class ScriptedMember:
    """A member without a model: it keeps versions as a deployment does, and fails where it is told to.

    Attributes:
        fails: method → what it raises, once; True: the replica dies in it.
        fails_late: the same, when the method has done its work.
        hangs: method → what it waits for.
        before: what is kept for all to go back to.
        is_on_probation: it has yet to show that it answers.
        events: what an answer streams, before which `before_event` is called with the number of those sent.
    """

    fails: dict[str, Exception | bool] = field(default_factory=dict)
    fails_late: dict[str, Exception] = field(default_factory=dict)
    hangs: dict[str, asyncio.Event] = field(default_factory=dict)
    before: Weights | None = None
    is_on_probation: bool = False
    filtered: Counter[tuple[str, Where, str]] = field(default_factory=Counter)
    current: Weights = FIRST
    kept: dict[int, Weights] = field(default_factory=dict)
    temporary: dict[int, str] = field(default_factory=dict)
    named: dict[str, Weights] = field(default_factory=dict)
    coming_id: int = 2
    calls: list[str] = field(default_factory=list)
    is_dead: bool = False
    num_answers: int = 0
    head: Head = STREAM
    events: Sequence[bytes] = (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n")
    before_event: Callable[[int], None] = lambda number: None
    digest_of: Callable[[ChangeRequest], str] = lambda request: f"d{request.version_id}"

    async def call(self, method: str, *args: Any) -> Any:
        self.calls.append(method)
        await asyncio.sleep(0)
        if method in self.hangs:
            await self.hangs[method].wait()
        failure = self.fails.pop(method, None)
        if failure is True:
            self.is_dead = True
        elif isinstance(failure, Exception):
            raise failure
        if self.is_dead:
            raise ReplicaLostError("It is dead.")
        result = getattr(self, method)(*args)
        if method in self.fails_late:
            raise self.fails_late.pop(method)
        return result

    async def answer(self, request: Forwarded, take: Take) -> None:
        self.num_answers += 1
        await take(self.head)
        for number, event in enumerate(self.events):
            self.before_event(number)
            if self.is_dead:
                raise ReplicaLostError("It is dead.")
            await asyncio.sleep(0)
            await take(event)
        await take(Noted(num_prompt_tokens=3, num_new_tokens=2, finish_reasons=("length",), weight_version=1))

    def state(self) -> ReplicaState:
        kept = {self.current.version_id, *self.kept, *(one.version_id for one in self.named.values())}
        names = {name: weights.version_id for name, weights in self.named.items()}
        before_id = None if self.before is None else self.before.version_id
        return ReplicaState(
            self.current.version_id,
            names,
            frozenset(kept),
            self.coming_id,
            IDLE,
            None,
            is_on_probation=self.is_on_probation,
            before_id=before_id,
        )

    def device_figures(self) -> dict[str, DeviceFigures]:
        return {"cpu": DeviceFigures(experts=4, used_bytes=2, limit_bytes=None, available_bytes=8)}

    def figures(self) -> Figures:
        return Figures("elsewhere", ProcessFigures({"anonymous": 2**30}, 2**31, 5.0, 1), self.filtered)

    def reading(self) -> Reading:
        return Meter().read()

    def describe(self) -> Description:
        return Description(
            self.current, dict(self.named), "demo", ModelDefaults(), 63, counts_experts=False, before=self.before
        )

    def rules_of(self, version_id: int) -> tuple[Rule, ...] | None:
        return next((one.rules for one in (self.current, *self.kept.values()) if one.version_id == version_id), None)

    def prepare(self, request: ChangeRequest, keep_as: str) -> tuple[RemapResult, str]:
        if request.version is not None:
            known = {self.current.version_id: self.current, **self.kept}
            known |= {one.version_id: one for one in self.named.values()}
            weights = known[int(request.version)]
        else:
            assert request.version_id is not None
            assert request.version_id not in self.kept
            rules = request.rules_after(self.current.rules)
            weights = Weights(request.version_id, rules, self.digest_of(request))
            self.coming_id = max(self.coming_id, request.version_id + 1)
        self.kept[weights.version_id] = weights
        self.temporary[weights.version_id] = keep_as
        made = RemapResult(weights.version_id, self.current.version_id, "f", [], 1, 1, 0, 0.0, keep_as)
        return made, weights.digest

    def go_live(self, version_id: int, name: str | None = None, keeps_before: bool = False) -> RemapResult:
        before = self.current
        weights = {**self.kept, before.version_id: before}.get(version_id)
        if weights is None:
            raise VersionNotFoundError(f"Version {version_id} is not in memory.")
        if name is not None:
            self.named[name] = weights
        else:
            self.before = (self.before or before) if keeps_before and self.before != weights != before else None
            self.kept[before.version_id], self.current = before, weights
        return RemapResult(version_id, before.version_id, "f", [], 0, 0, 0, 0.0, name)

    def discard(self, version_id: int | None = None) -> None:
        self.temporary.clear()

    def release(self) -> None:
        if self.before is not None:
            self.kept.pop(self.before.version_id, None)
        self.before = None

    def leave(self) -> None:
        """What the engine does when its version fails on probation."""
        assert self.before is not None
        self.kept.pop(self.current.version_id, None)
        self.current, self.is_on_probation = self.before, False

    def remove_name(self, name: str) -> int:
        if name not in self.named:
            raise VersionNotFoundError(f"There are no weights {name!r}.")
        return self.named.pop(name).version_id

    def cancel(self) -> None:
        self.calls.append("cancelled")


class LocalTransport:
    """Members by name, each behind a listener of its own, so that requests take the way that they take to processes."""

    def __init__(self, members: dict[str, Any], routing: Routing) -> None:
        self.members = members
        self._channels = Channels(routing, lambda: self.members, self._address_of)
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """There is nothing to wait for."""

    def ids(self) -> Collection[str]:
        return [name for name, member in self.members.items() if not getattr(member, "is_dead", False)]

    async def call(self, replica_id: str, method: str, *args: Any) -> Any:
        if replica_id not in self.members:
            raise ReplicaLostError("There is none.")
        member = self.members[replica_id]
        return await member.call(method, *args)

    def send(self, ask: Ask, request: Forwarded) -> AsyncGenerator[Sequence[Part]]:
        return self._channels.send(ask, request)

    async def _address_of(self, replica_id: str) -> Address:
        member = self.members[replica_id]

        async def answer(request: Forwarded, take: Take) -> None:
            try:
                await member.answer(request, take)
            except ReplicaLostError:  # the end of its process, and of its connections
                self._closing.add(asyncio.create_task(listener.close()))
                await asyncio.Event().wait()

        listener = Listener(answer)
        return await listener.listen("127.0.0.1")


class ForeignError(Exception):
    """What a transport, or a fault of ours, may raise."""


def no_such_source() -> PlanError:
    return PlanError("There is no source 'x'.")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come."""
    while not condition():  # noqa: ASYNC110 – the other end tells nobody
        await asyncio.sleep(0.001)
