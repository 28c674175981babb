"""Requests to replicas, over a channel to each.

In: requests, where replicas listen. Out: answers. Must never know: how replicas are started and found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing

from amalgam.cluster.channel import Address, Channel
from amalgam.cluster.interface import Ask, Forwarded, Part
from amalgam.cluster.routing import Routing
from amalgam.errors import ReplicaLostError


class Channels:
    """Chooses a replica for each request, and opens a channel to it when it is first chosen. One event loop's.

    Args:
        ids: the replicas that there are.
        address_of: where a replica listens; raises ReplicaLostError if it has gone.
    """

    def __init__(
        self, routing: Routing, ids: Callable[[], Collection[str]], address_of: Callable[[str], Awaitable[Address]]
    ) -> None:
        self._routing = routing
        self._ids = ids
        self._address_of = address_of
        self._opening: dict[str, asyncio.Task[Channel]] = {}

    async def send(self, ask: Ask, request: Forwarded) -> AsyncGenerator[Sequence[Part]]:
        """See `Transport.send`."""
        self._forget_closed()
        began = time.perf_counter()
        order = self._routing.order(ask, self._ids())
        if not order:
            raise ReplicaLostError("There was no replica for this request at that moment.")
        self._routing.routed(ask, order[0], time.perf_counter() - began)
        channel = await self._to(order[0])
        async with aclosing(channel.ask(request)) as groups:
            async for parts in groups:
                yield parts

    async def _to(self, replica_id: str) -> Channel:
        """The channel to a replica; all that want it wait for the same one.

        Raises:
            ReplicaLostError: the replica has gone.
        """
        opening = self._opening.get(replica_id)
        if opening is None:
            opening = self._opening[replica_id] = asyncio.create_task(self._open(replica_id))
        return await asyncio.shield(opening)

    async def _open(self, replica_id: str) -> Channel:
        return await Channel.open(await self._address_of(replica_id))

    def _forget_closed(self) -> None:
        """Not those to replicas that are being ended: they give the answers yet that are under way."""
        for replica_id, opening in list(self._opening.items()):
            if opening.done() and not _is_open(opening):
                del self._opening[replica_id]


def _is_open(opening: asyncio.Task[Channel]) -> bool:
    return opening.done() and not opening.cancelled() and opening.exception() is None and opening.result().is_open
