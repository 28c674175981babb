"""The demo model behind OpenAI's interface, in float32, and OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from amalgam.config.settings import build_settings
from amalgam.runtime.opening import open_deployment
from tests.lazy import Lazy
from tests.server.conftest import serving, wait_until_ready

openai = Lazy("openai")

DEMO = Path(__file__).parents[3] / "models" / "demo"
MAX_TOKENS = 1024


@pytest.fixture(scope="session")
def demo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = build_settings(
        {
            "model": {"base_path": str(DEMO)},
            "inference": {"device_map": "cpu", "max_seq_length": MAX_TOKENS, "dtype": "float32"},
            "engine": {"num_threads": 1},
            "server": {
                "port": 0,
                "export_dir": str(tmp_path_factory.mktemp("exports")),
                "served_model_names": ["demo", "gpt-demo"],
            },
        }
    )
    with serving(settings, lambda: open_deployment(settings)) as url:
        wait_until_ready(url)
        yield url


@pytest.fixture(scope="session")
def client(demo_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=demo_url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def http(demo_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_url, timeout=60) as client:
        yield client
