"""A chat page whose model answers as it is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.browser import Page
from tests.server.scripted import FORMATS, NUM_EXPERTS, ScriptedModel, serving_scripts


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return ScriptedModel()


@pytest.fixture(scope="module")
def url(model: ScriptedModel) -> Iterator[str]:
    with serving_scripts(model) as url:
        yield url


@pytest.fixture
def page(browser: Page, model: ScriptedModel, url: str) -> Iterator[Page]:
    browser.reset()
    browser.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})
    model.scripts.clear()
    model.requests.clear()
    model.is_released.clear()
    model.key = ""
    model.has_chat_template = True
    model.num_experts = NUM_EXPERTS
    model.counts_experts = True
    model.formats = {1: tuple(FORMATS)}
    browser.open(url + "/")
    yield browser
    model.is_released.set()
