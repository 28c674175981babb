"""Several tabs with the same conversations: none overwrites what another has written."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.server.browser import Page
from tests.server.chat.saying import CLEAR, answers, prompt, said, say, titles, wait_for_end
from tests.server.scripted import Script, ScriptedModel

STORED = """
    const done = arguments[arguments.length - 1];
    const opening = indexedDB.open("amalgam.chat");
    opening.onsuccess = () => {
        const all = opening.result.transaction("conversations").objectStore("conversations").getAll();
        all.onsuccess = () => { opening.result.close(); done(all.result); };
    };
"""
# Another tab that has not been heard yet: it answers to the conversation's end, and says nothing of it.
STORE_SILENTLY = """
    const done = arguments[arguments.length - 1];
    const opening = indexedDB.open("amalgam.chat");
    opening.onsuccess = () => {
        const transaction = opening.result.transaction("conversations", "readwrite");
        const store = transaction.objectStore("conversations");
        store.getAll().onsuccess = ({target: {result: [conversation]}}) => {
            const node = {id: "unheard", parent: conversation.leaf, role: "user", content: "unheard", at: Date.now()};
            conversation.nodes.unheard = node;
            conversation.leaf = node.id;
            conversation.system = "unheard";
            store.put(conversation);
        };
        transaction.oncomplete = () => { opening.result.close(); done(true); };
    };
"""
MERGE = """
    const [seen, mine, theirs, done] = arguments;
    import(new URL("merge.js", document.querySelector("script[type=module]").src)).then(({apply, merge, partsOf}) => {
        apply(mine, merge(partsOf(seen), partsOf(mine), partsOf(theirs)));
        done(mine);
    });
"""
GROWN = "return [...document.querySelectorAll('.markdown')].at(-1)?.textContent === arguments[0]"
WORD = "return document.querySelector('#send').dataset.word === arguments[0]"


def stored(page: Page) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = page.driver.execute_async_script(STORED)
    return result


def contents(page: Page) -> list[str]:
    """Of all messages in the store, sorted."""
    return sorted(node["content"] for conversation in stored(page) for node in conversation["nodes"].values())


def address(page: Page) -> str:
    result: str = page.driver.current_url
    return result


def rename(page: Page, title: str) -> None:
    page.run("document.querySelector('.entry-rename').click()")
    page.driver.find_element("css selector", ".entry-name").send_keys(*CLEAR, title, Keys.ENTER)


def begin(page: Page, text: str, grown: str) -> None:
    prompt(page).send_keys(text, Keys.ENTER)
    page.wait(GROWN, grown)


def test_what_one_tab_writes_the_other_knows(page: Page, model: ScriptedModel) -> None:
    say(page, "hi")
    model.scripts["slow"] = [Script(["a", "b"], is_held=True)]
    with page.second_tab(address(page)) as (first, second):
        assert answers(page) == ["You said: hi"]
        page.front(first)
        page.click("#settings-open")
        page.driver.find_element("css selector", "#system").send_keys("Be brief.")
        page.driver.find_element("css selector", "#set-temperature").send_keys("0.25", Keys.TAB)
        page.front(second)
        page.wait("return document.querySelector('#set-temperature').value === '0.25'")
        say(page, "from the second")
        assert model.requests[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert model.requests[-1]["temperature"] == 0.25
        assert stored(page)[0]["system"] == "Be brief."

        page.front(first)
        page.wait("return document.querySelectorAll('.message').length === 4")
        begin(page, "slow", "a")
        page.front(second)
        page.wait(WORD, "stop")
        page.wait("return document.querySelectorAll('.message').length === 6")
        assert page.count(".entry .pulse") == 1
        assert page.count(".cut") == 0 and page.count("#thread .do-delete:not(:disabled)") == 0
        prompt(page).send_keys("not yet", Keys.ENTER)
        assert page.run("return document.querySelector('#prompt').value") == "not yet"
        rename(page, "renamed")
        model.is_released.set()
        wait_for_end(page)
        assert answers(page)[-1] == "ab"
        prompt(page).send_keys(*CLEAR)
        say(page, "then")
        page.front(first)
        page.wait("return document.querySelectorAll('.message').length === 8")
        assert said(page) == ["hi", "from the second", "slow", "then"]
        assert titles(page) == ["renamed"]
        page.run("document.querySelector('.user .do-edit').click()")
        page.driver.find_element("css selector", ".editor").send_keys(" kept")
        page.front(second)
        rename(page, "twice")
        page.front(first)
        page.wait(lambda: titles(page) == ["twice"])
        assert page.run("return document.querySelector('.editor').value") == "hi kept"
    said_back = [f"You said: {text}" for text in ("from the second", "hi", "then")]
    assert contents(page) == [*said_back, "ab", "from the second", "hi", "slow", "then"]
    assert stored(page)[0]["title"] == "twice"


def test_answers_are_stopped_removed_and_cut_off_across_tabs(page: Page, model: ScriptedModel, url: str) -> None:
    model.scripts["slow"] = [Script(["a", "b"], is_held=True)]
    begin(page, "slow", "a")
    with page.second_tab(address(page)) as (first, second):
        page.wait(WORD, "stop")  # it began before this tab was there
        page.click("#send")
        page.wait("return document.querySelector('.cut')?.dataset.finish === 'stopped'")
        page.front(first)
        wait_for_end(page)
        assert page.run("return document.querySelector('.cut').dataset.finish") == "stopped"

        num_left = model.num_left
        page.click("#new")
        begin(page, "slow", "a")
        prompt(page).send_keys("a draft")
        page.front(second)
        page.wait("return document.querySelectorAll('.entry .pulse').length === 1")
        page.run("document.querySelector('.entry:has(.pulse) .entry-delete').click()")
        page.run("document.querySelector('.toast').dispatchEvent(new PointerEvent('pointerenter'))")  # which keeps it
        page.wait(partial(model.has_lost, num_left + 1))
        page.front(first)
        page.wait("return document.querySelectorAll('.entry').length === 1")
        page.wait("return document.querySelector('#welcome').checkVisibility()")
        assert page.run("return document.querySelector('#prompt').value") == "a draft"
        assert len(stored(page)) == 1
        page.front(second)
        page.click(".toast button")
        page.front(first)
        page.wait("return document.querySelectorAll('.entry').length === 2")
        page.run("document.querySelectorAll('.entry-title')[0].click()")
        assert (said(page), answers(page)) == (["slow"], ["a"])
        page.wait(lambda: contents(page) == ["a", "a", "slow", "slow"])  # with what came before it was removed

        page.front(second)
        page.run("document.querySelectorAll('.entry-title')[1].click()")
        page.run("document.querySelector('.assistant .do-regenerate').click()")
        page.wait(WORD, "stop")
        page.wait(GROWN, "a")
        page.front(first)
        page.run("document.querySelector('.entry:has(.pulse) .entry-title').click()")
        page.wait(WORD, "stop")
        page.front(second)
        page.driver.close()  # in the midst of its answer
        page.front(first)
        page.wait(WORD, "send")
        page.wait("return document.querySelector('.cut')?.dataset.finish === 'interrupted'")


def test_saving_overwrites_nothing_unseen(page: Page, model: ScriptedModel) -> None:
    say(page, "hi")
    model.scripts["slow"] = [Script(["a", "b"], is_held=True)]
    begin(page, "slow", "a")
    page.wait(lambda: "slow" in contents(page))
    page.driver.execute_async_script(STORE_SILENTLY)
    model.is_released.set()
    wait_for_end(page)
    page.wait(lambda: "ab" in contents(page))
    assert contents(page) == ["You said: hi", "ab", "hi", "slow", "unheard"]
    assert stored(page)[0]["system"] == "unheard"
    page.wait("return document.querySelector('#system').value === 'unheard'")


def node(name: str, parent: str | None, at: int, **fields: Any) -> dict[str, Any]:
    return {"id": name, "parent": parent, "at": at, **fields}


@pytest.fixture(scope="module")
def two_messages() -> dict[str, Any]:
    return {
        "title": "t",
        "sampling": {"seed": 1},
        "nodes": {"a": node("a", None, 1), "b": node("b", "a", 2)},
        "leaf": "b",
    }


def test_copies_become_one(page: Page, two_messages: dict[str, Any]) -> None:
    nodes = two_messages["nodes"]
    answer = node("c", "b", 3, content="answer")
    followed = {**two_messages, "nodes": {**nodes, "c": answer}, "leaf": "c", "sampling": {"seed": 1, "top_k": 5}}
    shorter = {**two_messages, "nodes": {"a": nodes["a"]}, "leaf": "a", "title": "u", "sampling": {"seed": 2}}
    both = {"title": "u", "sampling": {"seed": 2, "top_k": 5}, "nodes": {**nodes, "c": answer}}

    def merge(mine: Any, theirs: Any) -> Any:
        return page.driver.execute_async_script(MERGE, two_messages, mine, theirs)

    assert merge(followed, shorter) == {**both, "leaf": "c"}  # a message that is followed by another one stays
    assert merge(shorter, followed) == {**both, "leaf": "a"}
    assert merge(two_messages, shorter) == shorter
    assert merge(shorter, two_messages) == shorter
    empty = {**two_messages, "nodes": {}, "leaf": None}
    assert merge(empty, followed)["leaf"] == "c"  # something is shown
    assert merge(empty, two_messages) == empty
