"""What becomes of a call by way of Ray Serve, whatever that raises; with stand-ins where Ray is not installed."""

from __future__ import annotations

import asyncio
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from amalgam.cluster.interface import Ask, Forwarded
from amalgam.cluster.routing import Routing
from amalgam.errors import AmalgamError, PlanError, ReplicaLostError, UnavailableError
from tests.cluster.replicas import ForeignError, no_such_source, state
from tests.errors import raises

REQUEST = Forwarded("POST", "/generate", b"", (), b"{}", "r1")


class RayError(Exception):
    """As in ray.exceptions."""


class RayTaskError(RayError):
    """As in ray.exceptions: what the replica raised is its cause."""

    def __init__(self, function_name: str, traceback_str: str, cause: Exception) -> None:
        super().__init__(function_name, traceback_str, cause)
        self.cause = cause


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray's exceptions."""
    if find_spec("ray") is None:
        contents: dict[str, dict[str, Any]] = {
            "ray": {}, "ray.exceptions": {"RayError": RayError, "RayTaskError": RayTaskError},
            "ray.serve": {}, "ray.serve.handle": {"DeploymentHandle": list},
        }  # fmt: skip
        for name, values in contents.items():
            module = ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
    return importlib.import_module("ray.exceptions")


@pytest.fixture
def transport(ray: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose calls raise what stands in its `failures`, one after the other, and then return 1."""
    name = "amalgam.cluster.ray.transport"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    del sys.modules[name]  # others import it with Ray or not at all
    failures: list[BaseException] = []

    async def respond() -> int:
        if failures:
            raise failures.pop(0)
        return 1

    routing = Routing(4)
    routing.update({"a": state()}, asked_at=0.0)
    routing.set_ready("a", is_ready=True)
    monkeypatch.setattr(module.here, "replica_ids", frozenset({"a"}))
    handle = SimpleNamespace(call=SimpleNamespace(remote=lambda *_: respond()))
    made = module.RayTransport(handle, routing)
    made.failures = failures
    return made


def failures_of(ray: Any) -> list[tuple[BaseException, type[AmalgamError], str]]:
    """What Ray raises, what becomes of it, and what that names."""
    return [
        (ForeignError(), UnavailableError, "ForeignError"),
        (ray.RayError(), ReplicaLostError, "RayError"),
        (asyncio.CancelledError(), ReplicaLostError, "a"),
        (ray.RayTaskError("call", "", ForeignError()), UnavailableError, "ForeignError"),
        (ray.RayTaskError("call", "", no_such_source()), PlanError, "x"),
        (no_such_source(), PlanError, "x"),
    ]


def test_whatever_ray_raises_is_one_of_our_errors(transport: Any, ray: Any) -> None:
    async def run() -> None:
        for failure, kind, named in failures_of(ray):
            transport.failures.append(failure)
            with raises(kind, named):
                await transport.call("a", "state")
        assert await transport.call("a", "state") == 1

    asyncio.run(run())


def test_a_request_whose_replica_cannot_be_asked_for_its_address_ends_with_one_of_our_errors(transport: Any) -> None:
    async def run() -> None:
        transport.failures.append(ForeignError())
        with raises(UnavailableError, "ForeignError"):
            await anext(transport.send(Ask("1"), REQUEST))

    asyncio.run(run())
