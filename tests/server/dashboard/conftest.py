"""Servers for the dashboard: with the demo model behind it, and with the statistics of a large one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from amalgam.config.settings import build_settings
from amalgam.runtime.opening import open_deployment
from amalgam.server.dashboard import pages
from amalgam.server.web.files import PageFile
from tests.conftest import DEMO
from tests.server.browser import Page
from tests.server.conftest import serving, wait_until, wait_until_ready
from tests.server.fakes import fake_settings
from tests.server.large import LargeDeployment

DOMAINS = {
    "prose": ["It was a dark night, and", "The old captain looked at the sea"],
    "宋词": ["床前明月光，", "明月几时有，"],
    "<i>code</i>": ["def fibonacci(n):\n", "import os\n\nclass Path:"],
}


@pytest.fixture(scope="package")
def demo_url(derived: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the demo model in three precisions, after some traffic in three domains."""
    settings = build_settings(
        {
            "model": {
                "name": "demo",
                "base_path": str(DEMO),
                "mixed_precision": {
                    "fp8_path": str(derived / "fp8"),
                    "int4_path": str(derived / "int4"),
                    "weight_mapping": {
                        "model.layers.*.mlp.experts.*": "int4",
                        "model.layers.*.mlp.experts.{0-3}.*": "fp8",
                    },
                },
            },
            "inference": {"device_map": "cpu", "max_seq_length": 256, "packed_cache": str(derived / "packed")},
            "engine": {"num_threads": 1},
            "statistics": {"pair_sampling": 1},
            "server": {"port": 0, "export_dir": str(tmp_path_factory.mktemp("exports"))},
        }
    )
    with serving(settings, lambda: open_deployment(settings)) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200, 60)
        bodies = [
            {"prompt": prompt, "max_new_tokens": 40, "domain": domain, "seed": seed}
            for domain, prompts in DOMAINS.items()
            for prompt in prompts
            for seed in range(3)
        ]
        with ThreadPoolExecutor(6) as pool:
            codes = list(pool.map(lambda body: client.post("/generate", json=body).status_code, bodies))
        assert set(codes) == {200}
        yield url


@pytest.fixture(scope="package")
def large_url() -> Iterator[str]:
    deployment = LargeDeployment()
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        yield url


@pytest.fixture
def page(browser: Page) -> Page:
    browser.reset()
    return browser


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at no chart: to load plotly.js and to draw takes longer than all else of a page."""
    script = b"window.Plotly = { react: async (node, data, layout) => { Object.assign(node, { data, layout }); } };"
    files = {**pages.files(), pages.PLOTLY: PageFile(script, "text/javascript; charset=utf-8")}
    monkeypatch.setattr(pages, "files", lambda: files)
