"""The whole OpenAPI description, walked by schemathesis: whatever it makes up, no answer is 5xx.

`SCHEMATHESIS_EXAMPLES=100` walks it with so many examples per operation and mode, in another order each time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from amalgam.config.settings import build_settings
from amalgam.runtime.opening import open_deployment
from tests.server.conftest import serving, wait_until_ready

DEMO = Path(__file__).parents[2] / "models" / "demo"
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES")
NUM_EXAMPLES = int(EXAMPLES or 2)  # per operation and mode: most of the time goes into making them up
ENDLESS = {"/dashboard/api/events", "/dashboard/events"}  # streams that end with their client


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = build_settings(
        {
            "model": {"base_path": str(DEMO)},
            "inference": {"device_map": "cpu", "max_seq_length": 32},
            "engine": {"num_threads": 1},
            "server": {"port": 0, "export_dir": str(tmp_path_factory.mktemp("exports"))},
        }
    )
    with serving(settings, lambda: open_deployment(settings)) as url:
        wait_until_ready(url)
        yield url


@pytest.mark.timeout(0 if EXAMPLES else 180)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_answer_is_the_servers_fault(url: str, mode: str) -> None:
    import schemathesis  # takes long, in each process that reads this file
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_url(url + "/openapi.json")
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    assert {"/v1/chat/completions", "/v1/responses", "/generate"} <= {operation.path for operation in operations}
    called = 0

    def walk(operation: Any) -> None:
        @settings(
            max_examples=NUM_EXAMPLES,
            deadline=None,
            database=None,
            derandomize=EXAMPLES is None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def call(case: Any) -> None:
            nonlocal called
            called += 1
            with session.stream(**_arguments(case)) as response:
                assert response.status_code < 500, (case, response.read())

        with suppress(Unsatisfiable):  # nothing about it can be wrong
            call()

    with httpx.Client(base_url=url, timeout=60) as session:
        for operation in operations:
            if operation.path not in ENDLESS:
                walk(operation)
    assert called > len(operations)


def _arguments(case: Any) -> dict[str, Any]:
    arguments = case.as_transport_kwargs(base_url=None)
    return {name: value for name, value in arguments.items() if name in ("method", "url", "headers", "params", "json")}
