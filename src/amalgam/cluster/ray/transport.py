"""Calls to replicas through a Ray Serve handle, requests past it.

In: what the gateway sends. Out: what replicas answer; a replica that has gone is a `ReplicaLostError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextvars import Context
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle

from amalgam.cluster.channel import Address
from amalgam.cluster.channels import Channels
from amalgam.cluster.interface import Ask, Forwarded, Part
from amalgam.cluster.ray.shared import Target, here
from amalgam.cluster.routing import Routing
from amalgam.errors import AmalgamError, ReplicaLostError, UnavailableError

ROUTE_SECONDS = 5.0  # a call's replica may go while the call is on its way; Serve would look for it for ever


class RayTransport:
    """`interface.Transport` over a handle of the replicas' deployment."""

    def __init__(self, handle: DeploymentHandle[Any], routing: Routing) -> None:
        self._calls = handle
        self._channels = Channels(routing, self.ids, self._address_of)

    async def start(self) -> None:
        """Serve tells of replicas who has a router, and a handle gets that with its first call."""
        await self._calls.call.remote(None, "state")

    def ids(self) -> Collection[str]:
        """The replicas that Serve has told of."""
        return here.replica_ids

    async def call(self, replica_id: str, method: str, *args: Any) -> Any:
        """See `Transport.call`.

        Serve knows calls by the request that they are made in. Several calls of one request at a time would be taken
        for each other, so that each is made in a context of its own.
        """
        return await asyncio.create_task(self._call(replica_id, method, *args), context=Context())

    async def _call(self, replica_id: str, method: str, *args: Any) -> Any:
        try:
            response = self._calls.call.remote(Target(replica_id), method, *args)
            result = await _unless_lost(replica_id, response)
        except Exception as error:
            raise _as_error(replica_id, error) from None
        if isinstance(result, AmalgamError):
            raise result
        return result

    def send(self, ask: Ask, request: Forwarded) -> AsyncGenerator[Sequence[Part]]:
        """See `Transport.send`."""
        return self._channels.send(ask, request)

    async def _address_of(self, replica_id: str) -> Address:
        address: Address = await self.call(replica_id, "address")
        return address


async def _unless_lost(replica_id: str, response: Any) -> Any:
    """What a call returns.

    Raises:
        ReplicaLostError: the replica has gone while the call was on its way.
        Exception: what Ray raises.
    """
    waiting = asyncio.ensure_future(_awaited(response))
    try:
        while not (await asyncio.wait({waiting}, timeout=ROUTE_SECONDS))[0]:
            if replica_id not in here.replica_ids:
                response.cancel()
                raise _lost(replica_id)
        if waiting.cancelled():  # by Serve, which would cancel whoever asked, too
            raise _lost(replica_id)
        return waiting.result()
    finally:
        waiting.cancel()


async def _awaited(response: Any) -> Any:
    return await response


def _lost(replica_id: str, error: Exception | None = None) -> ReplicaLostError:
    reason = "" if error is None else f" ({type(error).__name__})"
    return ReplicaLostError(f"The replica {replica_id} has gone{reason}.", remedy="Another one comes in its place.")


def _as_error(replica_id: str, error: Exception) -> AmalgamError:
    """What has come of a call, as one of our errors: who calls knows no others."""
    if isinstance(error, RayTaskError):  # the replica has raised it
        cause = getattr(error, "cause", None)
        if isinstance(cause, AmalgamError):
            return cause
        return UnavailableError(f"A replica failed: {type(cause or error).__name__}.", remedy="Its log has the cause.")
    if isinstance(error, AmalgamError):
        return error
    if isinstance(error, RayError):
        return _lost(replica_id, error)
    return UnavailableError(  # Ray Serve's own have no base in common with Ray's
        f"Ray Serve cannot call the replica {replica_id}: {type(error).__name__}.", remedy="Try again."
    )
