"""The application as it is put together."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import fastapi
import httpx
import pytest

from amalgam.server.app import create_app, every_route, pages
from amalgam.server.service import Service
from tests.server.fakes import FakeDeployment, fake_settings


def ask(app: fastapi.FastAPI, *paths: str) -> list[httpx.Response]:
    """All at once, in a loop of the thread that calls this."""

    async def get() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await asyncio.gather(*map(client.get, paths))

    return asyncio.run(get())


def test_an_unknown_path_costs_no_description() -> None:
    """That takes most of a second, in the loop that all streams share."""
    app = create_app(Service(fake_settings(port=0), FakeDeployment))

    [answer] = ask(app, "/nowhere/")
    assert answer.status_code == 404
    assert app.openapi_schema is None


def test_the_description_is_made_once_and_not_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def describe(**fields: Any) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return {"info": {"title": "", "version": ""}, "paths": {}, "components": {"schemas": {}}}

    monkeypatch.setattr(fastapi.applications, "get_openapi", describe)
    app = create_app(Service(fake_settings(port=0), FakeDeployment))
    answers = ask(app, "/openapi.json", "/docs", "/openapi.json")
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


def test_pages_are_what_the_description_says_takes_get() -> None:
    app = create_app(Service(fake_settings(port=0), FakeDeployment))
    described = {path for path, methods in app.openapi()["paths"].items() if "get" in methods}
    assert described == pages() - {"/dashboard", "/docs", "/openapi.json"}


def test_routes_are_made_once() -> None:
    one, other = (create_app(Service(fake_settings(port=0), FakeDeployment)) for _ in range(2))
    assert all(route in one.router.routes and route in other.router.routes for route in every_route())
