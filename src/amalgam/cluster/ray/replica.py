"""A replica on Ray Serve: a deployment of the model, and the methods that Serve and the gateway call.

In: settings, calls. Out: answers, health, load.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.util import get_node_ip_address

from amalgam.base.heap import share_one_heap
from amalgam.cluster.channel import Listener
from amalgam.cluster.member import Member
from amalgam.config.environment import let_threads_sleep
from amalgam.config.settings import Settings
from amalgam.errors import AmalgamError, ReplicaLostError
from amalgam.server.app import settling
from amalgam.server.http.logs import start_logging

if TYPE_CHECKING:
    from amalgam.runtime.deployment import Deployment

_POLL_SECONDS = 0.05


class Replica:
    """Serve makes one in each replica's process, and takes it for running when it is made."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc] # Serve awaits it
        start_logging(settings.server.log_format)
        share_one_heap()
        let_threads_sleep()

        def load() -> Deployment:
            from amalgam.runtime.lookahead import look_ahead
            from amalgam.runtime.opening import open_deployment
            from amalgam.text.grammar import prepare_grammars

            deployment = open_deployment(settings)
            prepare_grammars(deployment.tokenizer)  # in the first request it would hold up all others
            look_ahead(deployment)
            return deployment

        self.member = Member(await asyncio.to_thread(settling(load)), settings)
        await self.member.start()
        self._listener = Listener(self.member.answer)
        self._address = await self._listener.listen(get_node_ip_address())

    async def call(self, target: Any, method: str, *args: Any) -> Any:
        """See `Member.call`; errors that a user can cause are returned, for Ray changes the class of what is raised."""
        if target is not None and target.replica_id != serve.get_replica_context().replica_id.unique_id:
            return ReplicaLostError(f"The replica {target.replica_id} has gone.")
        if method == "address":
            return self._address
        try:
            return await self.member.call(method, *args)
        except AmalgamError as error:
            return error

    async def check_health(self) -> None:
        """Serve puts another replica in the place of one whose engine has died."""
        if (failure := self.member.failure) is not None:
            raise failure

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `scaling` decides by."""
        return {"requests": float(self.member.num_requests), "kv_use": self.member.state().kv_use}

    async def __del__(self) -> None:
        """Serve waits for calls before this, and for this until `graceful_shutdown_timeout_s` is over."""
        if (listener := getattr(self, "_listener", None)) is not None:  # it may not have been loaded
            while listener.num_open:  # noqa: ASYNC110 – requests tell nobody
                await asyncio.sleep(_POLL_SECONDS)
            await listener.close()
        if (member := getattr(self, "member", None)) is not None:
            await asyncio.to_thread(member.close)
