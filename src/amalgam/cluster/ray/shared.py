"""What the gateway and the request router of one process share.

Serve makes the router, and hands it no objects of ours; it lives in the process of whoever holds the handle, which is
the gateway. So the two meet in `here`. Serve pickles the router's module by value, so that this one is another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from amalgam.cluster.routing import Routing


@dataclass(frozen=True)
class Target:
    """The one replica that a call is for."""

    replica_id: str


@dataclass
class Here:
    """What the gateway and the router of one process share."""

    routing: Routing | None = None
    replica_ids: frozenset[str] = field(default_factory=frozenset)


here = Here()
