"""What leaves for a replica, without a server in front of it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from amalgam.cluster.forwarding import Forwarding, ForwardingCounts
from amalgam.cluster.routing import Routing
from amalgam.server.http.record import RequestRecord
from tests.cluster.replicas import LocalTransport, ScriptedMember, state


def test_half_a_body_is_sent_to_no_replica() -> None:
    """Half of it may be a whole one of another request."""
    routing, counts, gate = Routing(4), ForwardingCounts(), asyncio.Event()
    routing.update({"a": state()}, asked_at=0.0)
    routing.set_ready("a", is_ready=True)
    gate.set()
    messages = [{"type": "http.request", "body": b"{}", "more_body": True}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def application(*_: Any) -> None:
        raise AssertionError("it is for a replica")

    service: Any = SimpleNamespace(admit=nullcontext, check_ready=lambda: None)
    transport = LocalTransport({"a": ScriptedMember()}, routing)
    forwarding = Forwarding(application, service, routing, transport, gate, counts)
    record = RequestRecord("r1", "POST", "/generate")
    scope = {
        "type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": [],
        "state": {"record": record},
    }  # fmt: skip
    with pytest.raises(ClientDisconnect):
        asyncio.run(forwarding(scope, receive, send))
    assert (counts.num_sent, sent) == (0, [])
