"""Budgets as people write them."""

from __future__ import annotations

import pytest

from amalgam.errors import ConfigError
from amalgam.planning.budget import parse_budget
from tests.errors import raises


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("40GB", "bytes", 40e9),
        ("38.5 GiB", "bytes", 38.5 * 2**30),
        ("500MB", "bytes", 5e8),
        ("4.5bpw", "bits", 4.5),
        ("30tok/s", "speed", 30.0),
    ],
)
def test_what_a_budget_means(text: str, kind: str, value: float) -> None:
    found = parse_budget(text)
    assert (found.kind, found.value, found.text) == (kind, value, text)


def test_a_budget_of_several_devices() -> None:
    found = parse_budget("cpu=128GB, cuda:0=rtx-4090")
    assert (found.kind, found.value, found.primary) == ("bytes", 152e9, 1)
    assert [each.name for each in found.devices] == ["cpu", "cuda"]
    assert found.devices[0].memory.bandwidth is None and found.devices[1].memory.bandwidth == 1008e9
    assert parse_budget("cpu:1=1GB@9GB/s,cpu=2GB").devices[0].memory.bandwidth == 9e9


@pytest.mark.parametrize("text", ["cuda=24GB", "cuda=24GB,cuda:0=2GB", "gpu=24GB,cpu=2GB", "cuda=24,cpu=2GB", "=,="])
def test_devices_that_cannot_be_filled_are_refused(text: str) -> None:
    with raises(ConfigError):
        parse_budget(text)


@pytest.mark.parametrize("text", ["", "40", "GB", "-3GB", "0bpw", "4.5 bits", "1e3GB", "40gb"])
def test_what_is_none_is_refused(text: str) -> None:
    with raises(ConfigError):
        parse_budget(text)
