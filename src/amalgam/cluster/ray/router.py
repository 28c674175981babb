"""Ray Serve's request router, asked for the gateway's choice.

In: Serve's pending requests. Out: Serve's replicas, the best first. What is best says `cluster.routing`.

Serve pickles this module by value: what it shares with the gateway is reached by way of another module's name.
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from amalgam.cluster.interface import Ask
from amalgam.cluster.ray import shared


class ReplicaRouter(RequestRouter):
    """Sends calls to the replica that they are for, and requests where the gateway's routing says."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each. Never none: Serve tries the same again and again, in one of few tasks that route
        all calls, so that what is for a replica that has gone would keep all others waiting. It is sent to any other
        one, which takes it for what it is.
        """
        wanted = pending_request.args[0] if pending_request is not None and pending_request.args else None
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        everyone = [[replica] for replica in candidate_replicas]
        if isinstance(wanted, shared.Target):
            return [[by_id[wanted.replica_id]]] if wanted.replica_id in by_id else everyone
        if isinstance(wanted, Ask) and shared.here.routing is not None:
            order = shared.here.routing.order(wanted, list(by_id))
            if not order:
                shared.here.misrouted.add(wanted.id)
            return [[by_id[replica_id]] for replica_id in order] or everyone
        return everyone

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve has chosen, and the request is on its way."""
        wanted = pending_request.args[0] if pending_request.args else None
        if isinstance(wanted, Ask) and shared.here.routing is not None and wanted.id not in shared.here.misrouted:
            shared.here.routing.routed(wanted, replica_id.unique_id, time.time() - pending_request.created_at)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve tells which replicas there are."""
        super().update_replicas(replicas)
        shared.here.replica_ids = frozenset(replica.replica_id.unique_id for replica in replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A replica's process has ended; Serve's controller may not know yet."""
        super().on_replica_actor_died(replica_id)
        shared.here.replica_ids -= {replica_id.unique_id}
        if shared.here.routing is not None:
            shared.here.routing.lost(replica_id.unique_id)
