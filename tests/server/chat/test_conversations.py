"""Conversations in a browser: sent, stopped, branched, kept, and what is told when they fail."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from selenium.webdriver.common.keys import Keys

from tests.server.browser import Page
from tests.server.chat.saying import CLEAR, answers, prompt, said, say, titles, wait_for_end
from tests.server.scripted import Script, ScriptedModel


def test_send_stream_and_figures(page: Page, model: ScriptedModel, url: str) -> None:
    model.scripts["Hello"] = [Script(["Good ", "day", " to you"], is_held=True)]
    page.click(".suggestion")
    assert page.run("return document.querySelector('#prompt').value") == page.text(".suggestion")
    prompt(page).send_keys(*CLEAR)
    assert page.run("return document.querySelector('#send').disabled")
    prompt(page).send_keys("Hel", Keys.SHIFT, Keys.ENTER, Keys.NULL)
    assert page.run("return document.querySelector('#prompt').value") == "Hel\n"
    prompt(page).send_keys(Keys.BACKSPACE, "lo", Keys.ENTER)
    page.wait("return document.querySelector('.assistant .markdown').textContent === 'Good day'")
    assert page.run("return document.querySelector('#thread').getAttribute('aria-busy')") == "true"
    model.is_released.set()
    wait_for_end(page)
    assert (said(page), answers(page)) == (["Hello"], ["Good day to you"])
    assert titles(page) == ["Hello"]
    figures = page.text(".assistant .figures")
    assert "3 tokens" in figures and "tokens/s" in figures and "first token after" in figures and "8 cached" in figures
    [body] = model.requests
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert (body["model"], body["stream"]) == ("scripted", True)
    assert not body.keys() & {"temperature", "top_p", "top_k", "seed", "max_tokens", "tools"}  # the server's defaults
    say(page, "again")
    assert [message["role"] for message in model.requests[-1]["messages"]] == ["user", "assistant", "user"]
    assert page.strangers(url) == set()
    assert page.complaints == []


def test_enter_that_ends_a_chinese_word_does_not_send(page: Page, model: ScriptedModel) -> None:
    page.run("document.querySelector('#prompt').value = '你好'")
    for fields in ("isComposing: true", "keyCode: 229"):
        page.run(
            f"""document.querySelector('#prompt').dispatchEvent(
                new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true, cancelable: true, {fields}}}))"""
        )
    assert said(page) == [] and model.requests == []


def test_stop_keeps_what_has_come(page: Page, model: ScriptedModel) -> None:
    model.scripts["long"] = [Script(["some", " words", " never"], is_held=True, tokens_per_delta=7)]
    for stop in ("button", "escape"):
        num_left = model.num_left
        prompt(page).send_keys("long", Keys.ENTER)
        page.wait("return [...document.querySelectorAll('.markdown')].at(-1)?.textContent === 'some words'")
        if stop == "button":
            page.click("#send[data-word=stop]")
        else:
            prompt(page).send_keys(Keys.ESCAPE)
        wait_for_end(page)
        page.wait(partial(model.has_lost, num_left + 1))
        assert page.run("return [...document.querySelectorAll('.cut')].at(-1).dataset.finish") == "stopped"
    assert answers(page) == ["some words", "some words"]
    figures = page.run("return [...document.querySelectorAll('.figures')].map((node) => node.textContent)")
    assert all("14 tokens" in text and "prompt 12" in text for text in figures)


def test_regenerate_edit_and_branches(page: Page, model: ScriptedModel) -> None:
    model.scripts["q"] = [Script(["one"]), Script(["two"])]
    say(page, "q")
    page.click(".assistant .do-regenerate")
    page.wait("return document.querySelector('.markdown').textContent === 'two'")
    wait_for_end(page)
    assert "2/2" in page.text(".assistant .branches")
    page.click(".assistant .do-branch_before")
    assert answers(page) == ["one"]
    say(page, "next")
    assert model.requests[-1]["messages"][1] == {"role": "assistant", "content": "one"}

    page.click(".user .do-edit")
    editor = page.driver.find_element("css selector", ".user .editor")
    editor.clear()
    editor.send_keys("other", Keys.ENTER)
    page.wait("return document.querySelectorAll('.message').length === 2")
    wait_for_end(page)
    assert (said(page), answers(page)) == (["other"], ["You said: other"])
    assert model.requests[-1]["messages"] == [{"role": "user", "content": "other"}]
    page.click(".user .do-branch_before")
    assert (said(page), answers(page)) == (["q", "next"], ["one", "You said: next"])

    page.click(".assistant .do-edit")
    editor = page.driver.find_element("css selector", ".assistant .editor")
    editor.clear()
    editor.send_keys("mine")
    page.click(".assistant .do-save")
    assert answers(page) == ["mine"]
    assert "3/3" in page.text(".assistant .branches")
    page.click(".assistant .do-delete")
    assert answers(page) == ["two"]
    page.click(".toast button")
    assert answers(page) == ["mine"]


def test_undo_brings_back_and_takes_nothing(page: Page) -> None:
    say(page, "one")
    say(page, "two")
    page.run("[...document.querySelectorAll('.user .do-delete')].at(-1).click()")
    assert said(page) == ["one"]
    page.run("document.querySelector('.toast').dispatchEvent(new PointerEvent('pointerenter'))")  # which keeps it
    say(page, "instead")
    page.click(".toast button")
    assert (said(page), answers(page)) == (["one", "instead"], ["You said: one", "You said: instead"])
    page.run("[...document.querySelectorAll('.user .do-branch_before')].at(-1).click()")
    assert (said(page), answers(page)) == (["one", "two"], ["You said: one", "You said: two"])


# Toasts leave after this while.
COUNT_TIMERS = """
    window.timers = new Set();
    const [set, clear] = [setTimeout, clearTimeout];
    window.setTimeout = (run, ms) => {
        const id = set(run, ms);
        if (ms === 6000) window.timers.add(id);
        return id;
    };
    window.clearTimeout = (id) => { window.timers.delete(id); clear(id); };
"""


def test_undo_stays_while_it_has_the_focus(page: Page) -> None:
    say(page, "hi")
    page.run(COUNT_TIMERS)
    page.run("document.querySelector('.entry-delete').click()")
    count = "return window.timers.size"
    assert page.run(count) == 1
    page.run("document.querySelector('.toast').dispatchEvent(new PointerEvent('pointerenter'))")
    assert page.run(count) == 0
    page.run("document.querySelector('.toast button').focus()")
    page.run("document.querySelector('.toast').dispatchEvent(new PointerEvent('pointerleave'))")
    assert page.run(count) == 0
    prompt(page).send_keys("x")
    assert page.run(count) == 1
    page.run("document.querySelector('.toast button').focus()")
    assert page.run(count) == 0
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert titles(page) == ["hi"]
    assert page.run("return document.activeElement.id") == "scroller"


def test_escape_does_one_thing(page: Page, model: ScriptedModel) -> None:
    model.scripts["slow"] = [Script(["a", "b"], is_held=True)]
    prompt(page).send_keys("slow", Keys.ENTER)
    page.wait("return document.querySelector('.markdown')?.textContent === 'a'")
    search = page.driver.find_element("css selector", "#search")
    search.send_keys("nothing")
    assert titles(page) == []
    search.send_keys(Keys.ESCAPE)
    assert titles(page) == ["slow"] and search.get_attribute("value") == ""
    assert page.run("return document.querySelector('#send').dataset.word") == "stop"
    page.emulate(360, 740, is_mobile=True)
    page.wait("return document.querySelector('#sidebar').inert")
    page.click("#side-open")
    page.wait("return document.activeElement.id === 'side-close'")
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert page.run("return document.querySelector('#sidebar').inert")
    assert page.run("return document.querySelector('#send').dataset.word") == "stop"
    prompt(page).send_keys(Keys.ESCAPE)
    wait_for_end(page)


def test_what_is_being_written_stays(page: Page, model: ScriptedModel) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    model.scripts["ask"] = [Script([{"tool_calls": [call]}], finish="tool_calls")]
    say(page, "ask")
    page.driver.find_element("css selector", ".call textarea").send_keys("half a res")
    page.click(".user .do-edit")
    page.driver.find_element("css selector", ".user .editor").send_keys(" and more")
    written = (
        """return [document.querySelector('.user .editor').value, document.querySelector('.call textarea').value]"""
    )
    page.click("#theme")
    assert page.run(written) == ["ask and more", "half a res"]
    page.run("localStorage.removeItem('amalgam.theme')")
    page.driver.find_element("css selector", ".user .editor").send_keys("!")
    page.emulate(is_dark=True)
    page.wait("return document.documentElement.dataset.theme === 'dark'")
    page.driver.switch_to.active_element.send_keys("!")  # the caret is where it was
    page.click("#language")
    assert page.text(".user .do-save") == "保存并发送"
    assert page.run(written) == ["ask and more!!", "half a res"]
    page.click("#new")
    page.click(".entry-title")
    assert page.run(written) == ["ask and more!!", "half a res"]
    page.click(".do-results")
    page.wait("return document.querySelectorAll('.assistant').length === 2")
    wait_for_end(page)
    assert model.requests[-1]["messages"][-1]["content"] == "half a res"

    model.scripts["slow"] = [Script(["a", "b"], is_held=True)]
    prompt(page).send_keys("slow", Keys.ENTER)
    page.wait("return [...document.querySelectorAll('.markdown')].at(-1)?.textContent === 'a'")
    page.driver.find_element("css selector", ".user .editor").send_keys(Keys.ENTER)  # not while another is answered
    assert page.run("return document.querySelector('.user .editor').value") == "ask and more!!"
    model.is_released.set()
    wait_for_end(page)
    page.click(".user .do-save")
    page.wait("return document.querySelectorAll('.message').length === 2")
    wait_for_end(page)
    assert said(page) == ["ask and more!!"] and page.count(".editor") == 0


def test_conversations_stay(page: Page, model: ScriptedModel, url: str) -> None:
    model.scripts["first"] = [Script([{"reasoning_content": "hm"}, "**yes**"])]
    say(page, "first")
    page.click("#new")
    assert page.count(".message") == 0
    say(page, "second thing")
    page.open(url + "/")
    page.driver.refresh()
    page.wait("return document.documentElement.dataset.loaded === 'true'")
    assert titles(page) == ["second thing", "first"]
    page.run("[...document.querySelectorAll('.entry-title')][1].click()")
    assert (said(page), answers(page)) == (["first"], ["yes"])
    page.driver.refresh()  # the same conversation is shown again
    page.wait("return document.querySelectorAll('.message').length === 2")
    assert page.text(".thoughts-text") == "hm"
    assert page.count(".use-grid canvas") == 2  # with its experts

    page.run("document.querySelector('.entry:has([aria-current]) .entry-rename').click()")
    field = page.driver.find_element("css selector", ".entry-name")
    field.send_keys(*CLEAR, "<i>renamed</i>", Keys.ENTER)
    assert "<i>renamed</i>" in titles(page)
    page.driver.find_element("css selector", "#search").send_keys("SECOND")
    assert titles(page) == ["second thing"]
    page.run("const s = document.querySelector('#search'); s.value = ''; s.dispatchEvent(new Event('input'))")
    page.run("document.querySelector('.entry:has([aria-current]) .entry-delete').click()")
    assert titles(page) == ["second thing"]
    page.click(".toast button")
    assert len(titles(page)) == 2
    page.run("document.querySelector('.entry:has([aria-current]) .entry-delete').click()")
    page.wait("return document.querySelectorAll('.entry').length === 1")
    page.driver.refresh()
    page.wait("return document.querySelectorAll('.entry').length === 1")


def test_an_answer_goes_on_while_another_conversation_is_shown(page: Page, model: ScriptedModel) -> None:
    model.scripts["slow"] = [Script(["a", "b"], is_held=True)]
    prompt(page).send_keys("slow", Keys.ENTER)
    page.wait("return document.querySelector('.markdown')?.textContent === 'a'")
    page.click("#new")
    say(page, "quick")
    assert answers(page) == ["You said: quick"]
    assert page.count(".entry .pulse") == 1
    model.is_released.set()
    page.wait("return document.querySelectorAll('.entry .pulse').length === 0")
    page.run("[...document.querySelectorAll('.entry-title')].find((node) => node.textContent === 'slow').click()")
    assert answers(page) == ["ab"]


def test_export_and_import(page: Page, tmp_path: Path) -> None:
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    say(page, "to keep")
    page.click("#export")
    file = tmp_path / "amalgam-conversations.json"
    page.wait(lambda: file.exists() and not list(tmp_path.glob("*.crdownload")))
    [conversation] = json.loads(file.read_text())["conversations"]
    page.run("document.querySelector('.entry-delete').click()")
    page.wait("return document.querySelectorAll('.entry').length === 0")
    page.driver.find_element("css selector", "#import-file").send_keys(str(file))
    page.wait("return document.querySelectorAll('.entry').length === 1")
    page.click(".entry-title")
    assert answers(page) == ["You said: to keep"]
    assert page.count(".use-grid canvas") == 2

    [node, *_] = conversation["nodes"].values()
    ring = {**conversation, "nodes": {"null": {**node, "parent": "null"}}, "leaf": "null"}
    wrong: dict[str, Any] = {
        "not JSON": "{",
        "no conversations": "[]",
        "another version": {"format": "amalgam-conversations", "version": 99, "conversations": []},
        "damaged": {"format": "amalgam-conversations", "version": 1, "conversations": [ring]},
    }
    for content in wrong.values():
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        before = page.count(".toast")
        page.driver.find_element("css selector", "#import-file").send_keys(str(file))
        page.wait("return document.querySelectorAll('.toast').length > arguments[0]", before)
        assert page.count(".entry") == 1


def test_without_a_chat_template(page: Page, model: ScriptedModel, url: str) -> None:
    model.has_chat_template = False
    model.scripts["Once upon"] = [Script([" a time", ","])]
    page.open(url + "/")
    page.wait("return document.querySelector('#banner').dataset.word === 'continuing'")
    say(page, "Once upon")
    assert answers(page) == [" a time,"]
    assert model.requests[-1]["prompt"] == "Once upon"
    say(page, " there")
    assert model.requests[-1]["prompt"] == "Once upon a time, there"


FAILURES = (
    (Script(status=503, message="The server is loading.", retry_after=3), "503", "Try again in 3 s"),
    (Script(status=429, message="60 requests a minute.", retry_after=7), "429", "Too many requests"),
    (Script(status=400, message="temperature is 9."), "400", "temperature is 9."),
    (Script(["half"], breaks_off=True), "cut_off", "connection broke"),
    (Script(["half"], is_cut=True), "cut_off", "connection broke"),
    (Script(["half"], error="The engine has stopped."), "server_error", "The engine has stopped."),
)


def test_errors_are_told_and_can_be_retried(page: Page, model: ScriptedModel) -> None:
    for script, kind, words in FAILURES:
        model.scripts["q"] = [script, Script(["fine"])]
        page.click("#new")
        say(page, "q")
        assert page.run("return document.querySelector('.problem').dataset.status") == kind
        assert words in page.text(".problem")
        page.click(".do-retry")
        page.wait("return document.querySelector('.markdown').textContent === 'fine'")
        wait_for_end(page)
        assert page.count(".problem") == 0
        assert len(model.requests[-1]["messages"]) == 1


def test_a_server_that_cannot_be_reached(page: Page) -> None:
    page.driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        say(page, "q")
        assert page.run("return document.querySelector('.problem').dataset.status") == "network"
        page.wait("return document.querySelector('#banner').dataset.word === 'disconnected'")
    finally:
        online = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", online)
    page.wait("return document.querySelector('#banner').hidden")
    page.click(".do-retry")
    page.wait("return document.querySelector('.markdown').textContent === 'You said: q'")
