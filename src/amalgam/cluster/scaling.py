"""How many replicas a load needs.

In: requests and KV use of each replica. Out: a number. Bounds and delays are the business of whoever asks.
"""

from __future__ import annotations

import math
from collections.abc import Collection


def wanted_replicas(
    num_requests: Collection[float], kv_uses: Collection[float], target_requests: float, target_kv: float
) -> int:
    """So many that each has at most `target_requests`, waiting and running, and uses `target_kv` of its KV cache.

    Args:
        num_requests, kv_uses: of each replica that there is; both grow in proportion when there are fewer.
    """
    by_queue = sum(num_requests) / target_requests
    by_kv = sum(kv_uses) / target_kv
    # A replica's worth and a thousandth is not worth another one: shares of blocks are no whole numbers.
    return max(1, math.ceil(round(max(by_queue, by_kv), 3)))
