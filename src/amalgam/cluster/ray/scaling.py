"""Ray Serve's autoscaling policy: by queue depth and KV use.

In: what replicas record. Out: how many there should be; Serve applies bounds and delays.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

from amalgam.cluster.scaling import wanted_replicas


class ByQueueAndKV:
    """Serve's controller makes one of the policy's arguments and calls it again and again."""

    def __init__(self, target_requests: float, target_kv: float) -> None:
        self._target_requests = target_requests
        self._target_kv = target_kv

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        recorded = context.aggregated_metrics or {}
        requests, kv_uses = recorded.get("requests", {}), recorded.get("kv_use", {})
        if not requests:  # none has told yet
            return context.target_num_replicas, {}
        return wanted_replicas(requests.values(), kv_uses.values(), self._target_requests, self._target_kv), {}
