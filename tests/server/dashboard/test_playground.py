"""The dashboard's playground."""

from __future__ import annotations

import pytest

from tests.server.browser import Page
from tests.server.conftest import serving, wait_until, wait_until_ready
from tests.server.dashboard.looking import FEW, assert_clean
from tests.server.fakes import FakeDeployment, fake_settings
from tests.server.large import LargeDeployment


@pytest.mark.usefixtures("without_charts")
def test_the_playground_streams_and_tells_errors(page: Page, demo_url: str) -> None:
    page.open(demo_url + "/dashboard")
    page.run("arguments[0].value = '12'", page.show("#play-max"))
    page.run("arguments[0].value = 'prose'", page.show("#play-domain"))
    page.click("#play-start")
    page.wait("return document.querySelector('#play-figures').textContent.includes('12 generated tokens')")
    assert "tokens/s" in page.text("#play-figures")
    assert len(page.text("#play-output")) > len("It was a dark night, and") + 5
    page.wait("return document.getElementById('playground').grid.data !== null")

    page.choose("#play-mode", "chat")
    for turn in (1, 2):
        page.run("arguments[0].value = 'Tell me of the sea'", page.show("#play-prompt"))
        page.click("#play-start")
        page.wait("return document.querySelectorAll('#play-output .assistant').length === arguments[0]", turn)
        page.wait("return document.querySelector('#play-figures').textContent.includes('first after')")
    assert page.text("#play-output").count("Tell me of the sea") == 2
    assert_clean(page, demo_url)
    page.choose("#play-mode", "text")
    told = "return document.querySelector('#playground .panel-error')?.textContent.includes(arguments[0])"
    page.run("arguments[0].value = 'A text'.repeat(1000)", page.show("#play-prompt"))
    page.click("#play-start")
    page.wait(told, "prompt")  # the server's word
    page.run("arguments[0].value = '0'", page.show("#play-max"))
    page.click("#play-start")
    page.wait(told, "Max tokens is 0. Allowed: at least 1.")
    page.show("#play-max").clear()
    page.driver.find_element("css selector", "#play-max").send_keys("1e")
    page.click("#play-start")
    page.wait(told, "Max tokens is not a number.")


@pytest.mark.usefixtures("without_charts")
def test_a_long_answer_leaves_the_page_usable(page: Page) -> None:
    """What is there is not written again for each token, and one can stop in the middle."""
    deployment = FakeDeployment()
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        page.run("arguments[0].value = '1500'", page.show("#play-max"))
        page.run(
            """
            window.removed = 0;
            new MutationObserver((records) => {
                for (const record of records) window.removed += record.removedNodes.length;
            }).observe(document.querySelector("#play-output"), {childList: true, subtree: true});
            """
        )
        page.click("#play-start")
        page.wait("return document.querySelector('#play-figures').textContent.includes('1,500 generated tokens')")
        expected = "It was a dark night, and" + "".join(f"w{index} " for index in range(1500))
        assert page.text("#play-output") == expected + page.text("#play-output .cut")
        assert page.run("return window.removed") < 20  # when it begins and when it ends
        assert page.run("return document.querySelector('#play-output .cut').dataset.reason") == "length"

        page.run("arguments[0].value = '1000000'", page.show("#play-max"))
        page.click("#play-start")
        page.wait("return document.querySelector('#play-output').textContent.includes(' w500 ')")
        page.click("#play-start")
        wait_until(lambda: not deployment.engine.running)
        page.wait("return document.querySelector('#play-output .cut')?.dataset.reason === 'cancelled'")
        assert page.text("#play-start") == "Generate"
        assert_clean(page, url)


@pytest.mark.usefixtures("without_charts")
def test_enter_sends_in_a_chat(page: Page) -> None:
    press = """
        const field = document.querySelector("#play-prompt");
        const event = new KeyboardEvent("keydown", {key: "Enter", cancelable: true, bubbles: true, ...arguments[0]});
        field.value = arguments[1];
        return field.dispatchEvent(event);  // false: it was taken
    """
    deployment = FakeDeployment()
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        assert page.run("return document.querySelector('#play-max').placeholder") == "server default 512"
        assert page.run(press, {}, "a text") is True  # one that is continued may have several lines
        page.choose("#play-mode", "chat")
        for keys in ({"shiftKey": True}, {"isComposing": True}, {"keyCode": 229}):
            assert page.run(press, keys, "ni hao") is True
        assert deployment.engine.num_submitted == 0
        assert page.run(press, {}, "Hello") is False
        page.wait("return document.querySelector('#play-figures').textContent.includes(arguments[0])", "512 generated")
        assert page.run("return document.querySelector('#play-output .assistant .cut').dataset.reason") == "length"
        page.run("arguments[0].value = '3'", page.show("#play-max"))
        assert page.run(press, {}, "And again") is False  # marks of the page are no part of the conversation
        page.wait("return document.querySelector('#play-figures').textContent.includes('3 generated tokens')")
        assert page.count("#play-output .user") == page.count("#play-output .cut") == 2
        assert page.count("#playground .panel-error") == 0
        assert_clean(page, url)


@pytest.mark.usefixtures("without_charts")
def test_the_playground_stops(page: Page) -> None:
    deployment = LargeDeployment(*FEW)
    captions = {
        "text": "in this answer and its prompt",
        "chat": "in this answer alone, without the conversation before it",
    }
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        for mode, caption in captions.items():
            deployment.engine.held_at = 5  # the answer does not end before it is stopped
            page.choose("#play-mode", mode)
            page.run("arguments[0].value = 'Hello'", page.show("#play-prompt"))
            page.click("#play-start")
            page.wait("return document.querySelector('#play-output').textContent.includes('w4')")
            assert page.text("#play-start") == "Stop"
            assert len(deployment.engine.running) == 1
            page.click("#play-start")
            wait_until(lambda: not deployment.engine.running)
            page.wait("return document.querySelector('#play-figures').textContent.includes('stopped')")
            assert page.text("#play-start") == "Generate"
            assert "w4" in page.text("#play-output")
            deployment.engine.held_at = None
            page.wait("return document.querySelector('#play-used').textContent.includes(arguments[0])", caption)

        # Tokens are counted, not the pieces of text, which may take several; one piece has no speed.
        figures = "return document.querySelector('#play-figures').textContent.includes(arguments[0])"
        deployment.engine.tokens_per_piece = 2
        deployment.engine.held_at = 5
        page.choose("#play-mode", "text")
        page.run("arguments[0].value = 'Hello'", page.show("#play-prompt"))
        page.click("#play-start")
        page.wait("return document.querySelector('#play-output').textContent.includes('w3')")
        page.click("#play-start")
        page.wait(figures, "4 generated tokens")
        deployment.engine.held_at = None
        page.run("arguments[0].value = '2'", page.show("#play-max"))
        page.click("#play-start")
        page.wait(figures, "2 generated tokens")
        assert "· – tokens/s" in page.text("#play-figures")
        assert_clean(page, url)
