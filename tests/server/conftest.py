"""Servers to test against: real ports, real uvicorn, a fake model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from amalgam.config.settings import Settings
from amalgam.server import create_app
from amalgam.server.http.lifecycle import DrainingServer, listen, url_of
from amalgam.server.http.tls import certificate_of
from amalgam.server.service import Service
from tests.server.fakes import FakeDeployment, fake_settings

if TYPE_CHECKING:
    from tests.server.browser import Page


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for what must come; the time only ends what would hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def wait_until_ready(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)


@contextmanager
def serving(settings: Settings, open_deployment: Callable[[], Any]) -> Iterator[str]:
    """A server in a thread; yields its base URL. The model may still be loading."""
    assert Path(settings.server.export_dir).is_absolute(), "tests leave the working directory alone"
    listeners = listen(settings.server)
    certificate = certificate_of(settings.server)
    service = Service(settings, open_deployment)
    server = DrainingServer(create_app(service), service, certificate)
    with running(server, listeners):
        yield url_of(listeners[0], settings.server.host, "http" if certificate is None else "https")


@contextmanager
def running(server: DrainingServer, listeners: list[socket.socket]) -> Iterator[None]:
    """`server` in a thread."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": listeners})
    thread.start()
    try:
        yield
    finally:
        server.config.timeout_graceful_shutdown = 0  # pages that are still open keep their streams
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def deployment() -> FakeDeployment:
    return FakeDeployment()


@pytest.fixture
def url(deployment: FakeDeployment) -> Iterator[str]:
    """Base URL of a server that is ready with `deployment`."""
    settings = fake_settings(port=0, max_body_bytes=8 * 2**20, max_batch_prompts=4)
    with serving(settings, lambda: deployment) as base_url:
        wait_until_ready(base_url)
        yield base_url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def shared_client() -> Iterator[httpx.Client]:
    """One server for tests that leave no trace on it."""
    with serving(fake_settings(port=0), FakeDeployment) as base_url:
        wait_until_ready(base_url)
        with httpx.Client(base_url=base_url, timeout=60) as client:
            yield client


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One for all files; a test begins with `reset`."""
    from tests.server.browser import open_browser  # most tests here need no selenium

    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page
