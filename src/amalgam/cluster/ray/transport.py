"""Calls and requests to replicas, through a Ray Serve handle.

In: what the gateway sends. Out: what replicas answer; a replica that has gone is a `ReplicaLostError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextvars import Context
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from amalgam.cluster.interface import Ask, Forwarded, Part
from amalgam.cluster.ray.shared import Target, here
from amalgam.errors import AmalgamError, OverloadedError, ReplicaLostError, UnavailableError

ROUTE_SECONDS = 5.0  # a call's replica may go while the call is on its way; Serve would look for it for ever


class RayTransport:
    """`interface.Transport` over a handle of the replicas' deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._calls = handle
        self._requests = handle.options(stream=True)

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
        response = self._calls.call.remote(Target(replica_id), method, *args)
        waiting = asyncio.ensure_future(_awaited(response))
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=ROUTE_SECONDS)
                if done:
                    break
                if replica_id not in here.replica_ids:
                    response.cancel()
                    raise _lost(replica_id)
            result = waiting.result()
        except RayTaskError as error:
            raise _as_error(error) from None
        except RayError as error:
            raise _lost(replica_id, error) from None
        finally:
            waiting.cancel()
        if isinstance(result, AmalgamError):
            raise result
        return result

    async def send(self, ask: Ask, request: Forwarded) -> AsyncGenerator[Sequence[Part]]:
        """See `Transport.send`."""
        response = self._requests.answer.remote(ask, request)
        try:
            async for parts in response:
                if ask.id in here.misrouted:
                    raise ReplicaLostError("There was no replica for this request at that moment.")
                yield parts
        except BackPressureError:
            raise OverloadedError("All replicas have full queues.", remedy="Try again later.") from None
        except RayActorError as error:
            raise _lost("of this answer", error) from None
        except TaskCancelledError as error:
            raise _lost("of this answer", error) from None
        except RayTaskError as error:
            raise _as_error(error) from None
        except RayError as error:
            raise _lost("of this answer", error) from None
        finally:
            here.misrouted.discard(ask.id)
            response.cancel()


async def _awaited(response: Any) -> Any:
    return await response


def _lost(replica_id: str, error: Exception | None = None) -> ReplicaLostError:
    reason = "" if error is None else f" ({type(error).__name__})"
    return ReplicaLostError(f"The replica {replica_id} has gone{reason}.", remedy="Another one comes in its place.")


def _as_error(error: RayTaskError) -> AmalgamError:
    """What a replica raised, which says so in words of ours where it is one of our errors."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, AmalgamError):
        return cause
    return UnavailableError(f"A replica failed: {type(cause or error).__name__}.", remedy="Its log has the cause.")
