"""The application as it is put together."""

from __future__ import annotations

import asyncio

import httpx

from amalgam.server.app import create_app, every_route, pages
from amalgam.server.service import Service
from tests.server.fakes import FakeDeployment, fake_settings


def test_an_unknown_path_costs_no_description() -> None:
    """That takes most of a second, in the loop that all streams share."""
    app = create_app(Service(fake_settings(port=0), FakeDeployment))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/nowhere/")

    assert asyncio.run(ask()).status_code == 404
    assert app.openapi_schema is None


def test_pages_are_what_the_description_says_takes_get() -> None:
    app = create_app(Service(fake_settings(port=0), FakeDeployment))
    described = {path for path, methods in app.openapi()["paths"].items() if "get" in methods}
    assert described == pages() - {"/dashboard", "/docs", "/openapi.json"}


def test_routes_are_made_once() -> None:
    one, other = (create_app(Service(fake_settings(port=0), FakeDeployment)) for _ in range(2))
    assert all(route in one.router.routes and route in other.router.routes for route in every_route())
