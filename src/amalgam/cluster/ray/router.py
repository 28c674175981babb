"""Ray Serve's request router: a call goes to the replica that it is for.

In: Serve's pending calls. Out: Serve's replicas. Requests do not pass here: `cluster.channels` has them.

Serve pickles this module by value: what it shares with the gateway is reached by way of another module's name.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from amalgam.cluster.ray import shared


class ReplicaRouter(RequestRouter):
    """Sends calls to the replica that they are for."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each. Never none: Serve tries the same again and again, in one of few tasks that route
        all calls, so that what is for a replica that has gone would keep all others waiting. It is sent to any other
        one, which takes it for what it is.
        """
        wanted = pending_request.args[0] if pending_request is not None and pending_request.args else None
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if isinstance(wanted, shared.Target) and wanted.replica_id in by_id:
            return [[by_id[wanted.replica_id]]]
        return [[replica] for replica in candidate_replicas]

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
