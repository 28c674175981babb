"""What the cluster adds to the server's figures: `amalgam_cluster_…`, and each replica's own under its label.

In: routing, forwarding, changes. Out: metric families. Under the names that one server has, `/metrics` gives what all
replicas have counted together, so that boards and alerts stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from amalgam.cluster.coordinator import Coordinator
from amalgam.cluster.figures import ClusterFigures
from amalgam.cluster.forwarding import ForwardingCounts
from amalgam.cluster.routing import Routing
from amalgam.server.metrics.families import Families

make = Families("amalgam_cluster_")


def families(
    routing: Routing, counts: ForwardingCounts, coordinator: Coordinator, figures: ClusterFigures
) -> Iterator[Metric]:
    """All of one gateway's. Any thread."""
    replicas = list(routing.replicas.items())
    ready = sum(seen.is_ready and not seen.is_lost for _, seen in replicas)
    yield make.gauge(
        "replicas", "Replicas.", [({"state": "ready"}, ready), ({"state": "other"}, len(replicas) - ready)]
    )
    places = [
        ({"replica": replica_id, "host": seen.state.host, "pid": seen.state.pid}, 1) for replica_id, seen in replicas
    ]
    yield make.gauge("replica_info", "Where each replica runs.", places)
    label = [({"replica": replica_id}, seen) for replica_id, seen in replicas]
    yield make.gauge("in_flight", "Requests sent and not answered.", [(x, seen.num_in_flight) for x, seen in label])
    running = [(x, seen.state.status.num_running) for x, seen in label]
    yield make.gauge("requests_running", "Requests being computed.", running)
    yield make.gauge("requests_waiting", "In the queue.", [(x, seen.state.status.num_waiting) for x, seen in label])
    yield make.gauge("kv_use", "Share of the KV cache in use.", [(x, seen.state.kv_use) for x, seen in label])
    yield make.gauge("weight_version", "New requests start on it.", [(x, seen.state.version_id) for x, seen in label])
    yield make.counter("requests_routed", "Requests sent to it.", [(x, seen.num_routed) for x, seen in label])
    processes = [({"replica": replica_id}, process) for replica_id, process in figures.by_replica().items()]
    memory = [({**x, "kind": kind}, size) for x, process in processes for kind, size in process.memory.items()]
    yield make.gauge("memory_bytes", "Resident memory; mapped: pages of files, which the system can drop.", memory)
    yield make.counter("cpu_seconds", "Processor time.", [(x, process.cpu_seconds) for x, process in processes])
    reasons = [({"reason": reason}, count) for reason, count in routing.reasons.items()]
    yield make.counter("routing", "Why a replica was chosen: its weights, a known beginning, its load.", reasons)
    yield make.histogram(
        "route_seconds", "From the choice of a replica to the request's way there.", routing.read_seconds()
    )
    yield make.counter("requests_resent", "To another replica, because the first was lost.", counts.num_resent)
    yield make.counter("streams_cut", "That had begun when their replica was lost.", counts.num_cut)
    yield make.counter("requests_held", "For which there was no replica at first.", counts.num_waited)
    results = [record.error is None for record in coordinator.log.read()]
    changes = [({"result": "ok"}, results.count(True)), ({"result": "failed"}, results.count(False))]
    yield make.gauge("changes", "The latest changes of the weights, of all replicas or none (at most 256).", changes)
