"""The example client against a live server."""

from __future__ import annotations

import socket

import pytest
from examples.test_client import APIError, MixedPrecisionAPIClient

from tests.errors import raises
from tests.server.conftest import wait_until
from tests.server.fakes import FAIL, FakeDeployment


def test_generation(url: str) -> None:
    client = MixedPrecisionAPIClient(url)
    assert client.health_check()["status"] == "healthy"
    assert client.generate_text("请介绍一下人工智能：", max_new_tokens=2, temperature=0.7)["generated_text"] == "w0 w1 "
    batch = client.batch_generate(prompts=["a", "b"], max_new_tokens=1)
    assert list(zip(batch["prompts"], batch["generated_texts"], strict=True)) == [("a", "w0 "), ("b", "w0 ")]
    assert list(client.stream_text("a", max_new_tokens=3)) == ["w0 ", "w1 ", "w2 "]


def test_weights_and_info(url: str) -> None:
    client = MixedPrecisionAPIClient(url + "/")
    assert client.get_model_info()["architecture"] == "fake"
    assert client.update_weight_mapping({"a": "int4"})["num_changed"] == 1
    assert client.reload_weights()["weight_version"] == 3


@pytest.mark.parametrize("name", ["get_expert_stats", "reset_expert_stats", "export_expert_stats"])
def test_errors_carry_status_and_message(url: str, name: str) -> None:
    with raises(APIError, "statistics.enabled") as caught:
        getattr(MixedPrecisionAPIClient(url), name)()
    assert caught.value.status == 422


def test_a_refused_request_raises(url: str) -> None:
    with raises(APIError, "top_p") as caught:
        MixedPrecisionAPIClient(url).generate_text("a", top_p=7)
    assert caught.value.status == 422
    with raises(APIError, 200):
        list(MixedPrecisionAPIClient(url).stream_text(FAIL))


def test_leaving_a_stream_early_cancels_it(url: str, deployment: FakeDeployment) -> None:
    deployment.engine.held_at = 1
    stream = MixedPrecisionAPIClient(url).stream_text("a")
    assert next(stream) == "w0 "
    assert deployment.engine.running
    stream.close()
    wait_until(lambda: not deployment.engine.running)


def test_no_server_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with raises(APIError, url) as caught:
        MixedPrecisionAPIClient(url).health_check()
    assert caught.value.status == 0
