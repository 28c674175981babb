"""The chat page in a browser, with a model that answers as it is told."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from amalgam.config.settings import build_settings
from amalgam.runtime.opening import open_deployment
from amalgam.server import page as page_files
from tests.conftest import DEMO
from tests.server.browser import Page
from tests.server.conftest import serving, wait_until_ready
from tests.server.page_files import assert_one_meaning, assert_only_own_files, used_words
from tests.server.scripted import (
    NUM_EXPERTS,
    NUM_LAYERS,
    TOP_K,
    Script,
    ScriptedModel,
    routed,
    routing,
    serving_scripts,
)
from tests.server.test_dashboard_page import UNREADABLE

CLEAR = (Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
OWN = {name: file.content.decode() for name, file in page_files.files().items()}
HOSTILE = r"""<script>window.hit = 1</script> <img src=x onerror="window.hit = 1"> <svg/onload=window.hit=1>
[a](javascript:window.hit=1) [b](JaVaScRiPt:window.hit=1) [c](java&#115;cript:window.hit=1) [d](data:text/html,x)
[e](<javascript:window.hit=1>) <javascript:window.hit=1> [f]( javascript:window.hit=1)
[g](vbscript:x) [h](//evil.example/x)
![i](javascript:window.hit=1) ![j](https://evil.example/pixel.png) [k](https://ok.example/"onmouseover="window.hit=1)
&lt;script&gt;window.hit = 1&lt;/script&gt; [l](file:///etc/passwd) [m](blob:x)
<iframe srcdoc="<script>window.hit=1</script>">

# <img src=x onerror=window.hit=1>

| <b onclick=window.hit=1>x</b> | [n](javascript:1) |
|--|--|
| `<i>` | <style>*{display:none}</style> |

```"><img src=x onerror=window.hit=1>
</code></pre><script>window.hit = 1</script>
```

- <details open ontoggle=window.hit=1>
> <math><mtext></form><form><mglyph><style></math><img src onerror=window.hit=1>
"""
MARKDOWN = """# One
Text with **bold**, *emphasis*, ~~gone~~ and `a < b`.
Second line.

- a
  - b
1. x
2. y

| n | m |
|:-:|--:|
| 1 | a\\|b |

```python
def f():
    return "<b>"
```

> quoted

**中文：**后文 $a_1 * b_1 * c$ and \\(x_1*y*z\\)
"""


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
    browser.open(url + "/")
    yield browser
    model.is_released.set()


def prompt(page: Page) -> Any:
    return page.driver.find_element("css selector", "#prompt")


def wait_for_end(page: Page) -> None:
    page.wait("return document.querySelector('#send').dataset.word === 'send'")


def say(page: Page, text: str) -> None:
    """Type, send with Enter, and wait for the answer's end."""
    prompt(page).send_keys(text, Keys.ENTER)
    wait_for_end(page)


def answers(page: Page) -> list[str]:
    result: list[str] = page.run(
        "return [...document.querySelectorAll('.assistant .markdown')].map((node) => node.textContent)"
    )
    return result


def said(page: Page) -> list[str]:
    result: list[str] = page.run("return [...document.querySelectorAll('.user .said')].map((node) => node.textContent)")
    return result


def titles(page: Page) -> list[str]:
    result: list[str] = page.run(
        "return [...document.querySelectorAll('.entry-title')].map((node) => node.textContent)"
    )
    return result


def test_the_page_holds_no_inline_code_and_names_only_its_own_files() -> None:
    assert_only_own_files(OWN, "static/")


def test_every_word_exists_in_both_languages() -> None:
    assert {"welcome", "copy", "use_experts", "tools_hint"} <= used_words(OWN)


def test_a_chinese_word_has_one_meaning() -> None:
    same = [{"top p"}, {"conversations"}, {"weights v{0}"}, {"prompt {0}"}]
    assert_one_meaning(OWN, same)


def test_files_come_with_a_strict_policy(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        for path in ("/", *(f"/static/{name}" for name in page_files.files())):
            response = client.get(path, headers={"Accept": "text/html"})
            assert response.status_code == 200
            policy = response.headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert not re.search(r"unsafe|data:|\*", policy)
            assert response.headers["x-content-type-options"] == "nosniff"
            assert "Accept-Encoding" in response.headers["vary"]
        assert client.get("/static/../__init__.py").status_code == 404
        assert client.get("/static/%2e%2e/__init__.py").status_code == 404


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
    assert (body["model"], body["stream"], body["stream_options"]) == ("scripted", True, {"include_usage": True})
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
    model.scripts["long"] = [Script(["some", " words", " never"], is_held=True)]
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


def test_markdown(page: Page, model: ScriptedModel) -> None:
    model.scripts["md"] = [Script(re.findall(r"(?s).{1,7}", MARKDOWN))]
    say(page, "md")
    texts = "return [...document.querySelectorAll('.markdown ' + arguments[0])].map((node) => node.textContent)"
    assert page.run(texts, ".size-1") == ["One"]
    assert page.run(texts, "strong") == ["bold", "中文："]
    assert page.run(texts, "em") == ["emphasis"]
    assert page.run(texts, "del") == ["gone"]
    assert page.run(texts, "ul ul li") == ["b"]
    assert page.run(texts, "ol li") == ["x", "y"]
    assert page.run(texts, "th") == ["n", "m"]
    assert page.run(texts, "td") == ["1", "a|b"]
    assert page.run(texts, "blockquote") == ["quoted"]
    assert page.run(texts, "pre code") == ['def f():\n    return "<b>"']
    assert page.text(".code-language") == "python"
    assert page.run(texts, "p")[-1] == "中文：后文 $a_1 * b_1 * c$ and \\(x_1*y*z\\)"
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    page.click(".code .copy")
    page.wait("return document.querySelector('.code .copy').dataset.state === 'copied'")
    paste = "const done = arguments[0]; navigator.clipboard.readText().then(done)"
    assert page.driver.execute_async_script(paste) == 'def f():\n    return "<b>"'


CODE = {
    "python": (
        'def f(x):  # a "comment"\n    return f"{x}" + 1.5e3',
        [("keyword", "def"), ("call", "f"), ("comment", '# a "comment"'), ("keyword", "return"), ("string", '"{x}"'),
         ("number", "1.5e3")],
    ),
    "json": ('{"a": [1, true, "b"]}', [("key", '"a"'), ("number", "1"), ("keyword", "true"), ("string", '"b"')]),
    "diff": ("+new\n-old\n same", [("added", "+new\n"), ("removed", "-old\n")]),
    "c": ("/* a\n*/ int n = 'x';", [("comment", "/* a\n*/"), ("keyword", "int"), ("string", "'x'")]),
    "sql": ("SELECT 1 -- all", [("keyword", "SELECT"), ("number", "1"), ("comment", "-- all")]),
    "unheard-of": ("if 1: 'a'", []),
}  # fmt: skip


def test_code_is_shown_in_colours(page: Page, model: ScriptedModel) -> None:
    model.scripts["code"] = [Script([f"```{name}\n{text}\n```\n" for name, (text, _) in CODE.items()])]
    say(page, "code")
    found = page.run(
        """return [...document.querySelectorAll('.markdown pre code')].map((code) => [code.textContent,
            [...code.querySelectorAll('span')].map((one) => [one.className.replace('code-', ''), one.textContent])])"""
    )
    assert found == [[text, [list(piece) for piece in pieces]] for text, pieces in CODE.values()]


def test_nothing_a_model_writes_is_read_as_html(page: Page, model: ScriptedModel, url: str) -> None:
    hidden: list[dict[str, Any]] = [{"reasoning_content": HOSTILE}]
    hidden.append({"tool_calls": [tool_call(0, "c", HOSTILE, HOSTILE)]})
    model.scripts[HOSTILE.strip()] = [
        Script([HOSTILE[at : at + 9] for at in range(0, len(HOSTILE), 9)]),
        Script(hidden),
    ]
    page.run("document.querySelector('#prompt').value = arguments[0]", HOSTILE.strip())
    page.run("document.querySelector('#composer').requestSubmit()")
    wait_for_end(page)
    page.run("document.querySelector('.do-regenerate').click()")
    wait_for_end(page)
    page.run("document.querySelector('.assistant .do-branch_before').click()")
    found = page.run(
        """const thread = document.querySelector('#thread');
        const attributes = [...thread.querySelectorAll('*')].flatMap((node) => [...node.attributes]);
        return {
            hit: window.hit ?? null,
            tags: [...new Set([...thread.querySelectorAll('.markdown *')].map((node) => node.tagName))],
            handlers: attributes.filter(({name}) => name.startsWith('on') || name === 'srcdoc').length,
            protocols: [...new Set([...thread.querySelectorAll('.markdown a')].map((node) => node.protocol))],
            rel: [...new Set([...thread.querySelectorAll('.markdown a')].map((node) => node.rel))],
        }"""
    )
    assert found["hit"] is None
    assert not set(found["tags"]) & {"SCRIPT", "IMG", "IFRAME", "STYLE", "FORM", "MATH", "OBJECT", "EMBED", "DETAILS"}
    assert found["handlers"] == 0
    assert set(found["protocols"]) <= {"https:", "http:", "mailto:"}
    assert found["rel"] == ["noopener noreferrer"]
    assert page.strangers(url) == set()
    assert page.complaints == []


def test_a_hostile_answer_does_not_stop_the_page(page: Page, model: ScriptedModel) -> None:
    texts = [
        "[" * 50_000,
        "*a **b " * 4_000,
        "`a``b" * 5_000,
        ">" * 5_000,
        "\\(" * 20_000,
        "|a\n|-\n" * 5_000,
        "- " * 20_000,
    ]
    texts += [f"```js\n{text * 5_000}" for text in ('"\\', "`\\`", "/*#")]
    texts.append("\n".join("  " * depth + "- a" for depth in range(1_000)))
    for index, text in enumerate(texts):
        model.scripts[f"q{index}"] = [Script([text])]
        say(page, f"q{index}")
    assert page.count(".assistant") == len(texts)


def tool_call(index: int, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_reasoning_and_tools(page: Page, model: ScriptedModel) -> None:
    pieces: list[dict[str, Any]] = [
        {"reasoning_content": "let me ", "reasoning": "let me "},
        {"reasoning": "look", "reasoning_content": "look"},
        {"tool_calls": [tool_call(0, "c1", "weather", "")]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
        {"tool_calls": [tool_call(1, "c2", "time", "{}")]},
    ]
    model.scripts["ask"] = [Script(pieces, finish="tool_calls")]
    model.scripts["20 °C"] = [Script(["It is ", "warm."])]
    page.click("#settings-open")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    page.driver.find_element("css selector", "#tools").send_keys(json.dumps(tools))
    say(page, "ask")
    assert model.requests[-1]["tools"] == tools
    assert page.text(".thoughts-text") == "let me look"
    assert not page.run("return document.querySelector('.thoughts').open")
    assert page.text(".call h3") == "Calls weather"
    assert json.loads(page.text(".call pre")) == {"city": "Paris"}
    first, second = page.driver.find_elements("css selector", ".call textarea")
    first.send_keys("noon")
    second.send_keys("20 °C")
    page.click(".do-results")
    page.wait("return document.querySelectorAll('.assistant').length === 2")
    wait_for_end(page)
    assert answers(page)[-1] == "It is warm."
    assert model.requests[-1]["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
                {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "noon", "tool_call_id": "c1"},
        {"role": "tool", "content": "20 °C", "tool_call_id": "c2"},
    ]


def test_settings(page: Page, model: ScriptedModel, url: str) -> None:
    page.click("#settings-open")
    assert page.run("return document.querySelector('#set-temperature').placeholder") == "0.7"
    page.driver.find_element("css selector", "#system").send_keys("Be brief.")
    values = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "max_tokens": 33, "seed": 5}
    for name, value in values.items():
        page.driver.find_element("css selector", f"#set-{name}").send_keys(str(value))
    say(page, "x")
    assert model.requests[-1].items() >= values.items()
    assert model.requests[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click(".assistant .do-regenerate")
    page.wait("return document.querySelector('.branches') !== null")
    wait_for_end(page)
    assert model.requests[-1]["seed"] == 6  # another answer, the same each time
    page.run("[...document.querySelectorAll('#settings .row button')][0].click()")  # for new chats
    page.click("#new")
    assert page.run("return document.querySelector('#system').value") == "Be brief."
    page.driver.find_element("css selector", "#set-top_p").clear()
    page.driver.find_element("css selector", "#set-top_p").send_keys("9")
    prompt(page).send_keys("y", Keys.ENTER)
    assert page.run("return !document.querySelector('#set-top_p').checkValidity()")
    assert said(page) == []  # what the server would refuse is not sent


def test_experts_and_precisions_stand_beside_the_answer(page: Page, model: ScriptedModel) -> None:
    num_prompt, num_new = 12, 9
    model.scripts["go"] = [Script(list("abcdefghi"), num_prompt_tokens=num_prompt)]
    say(page, "go")
    trace = routed(num_prompt + num_new - 1)[num_prompt - 1 :]
    assert len(trace) == num_new
    used = sum(len(np.unique(trace[:, layer])) for layer in range(NUM_LAYERS))
    text = f"{used} of {NUM_LAYERS * NUM_EXPERTS} experts in {NUM_LAYERS} layers, {TOP_K} for each token"
    assert page.text(".use > p") == text
    page.click(".use-foot button")
    rows = page.run(
        """return [...document.querySelectorAll('dialog tbody tr')].map((row) => [
            row.cells[0].textContent,
            [...row.querySelectorAll('.expert')].map(({children: [, id, text]}) => [id.textContent, text.textContent]),
        ])"""
    )
    formats = ["bf16", "fp8", "int4"]
    for layer, (name, experts) in enumerate(rows):
        assert name == str(layer + 1)
        ids, counts = np.unique(trace[:, layer], return_counts=True)
        names = [formats[(layer + expert) % 3] for expert in ids.tolist()]
        expected = {
            (str(expert), f"{'int4 + bf16' if (layer, expert) == (0, 1) else name} ×{count}")
            for expert, count, name in zip(ids.tolist(), counts.tolist(), names, strict=True)
        }
        assert {(expert, text) for expert, text in experts} == expected
    assert len(rows) == NUM_LAYERS
    page.click("dialog .ghost")
    parts = page.run(
        "return [...document.querySelectorAll('.use .formats b')].map((node) => parseInt(node.textContent))"
    )
    assert sum(parts) == pytest.approx(100, abs=2)
    assert page.run("return document.querySelector('.use a').getAttribute('href')") == "dashboard#precision"


def test_a_model_without_experts(page: Page, model: ScriptedModel, url: str) -> None:
    model.num_experts = 0
    page.open(url + "/")
    say(page, "hi")
    assert "routed_experts" not in model.requests[-1]
    assert page.text(".use h3") == "Precision of the weights"
    assert "bf16" in page.text(".use .formats")


def test_npy(page: Page) -> None:
    script = """const [text, done] = arguments;
        import(new URL("npy.js", document.querySelector("script[type=module]").src)).then(({readNpy}) => {
            const {shape, values} = readNpy(text);
            done([shape, [...values]]);
        });"""
    shape, values = page.driver.execute_async_script(script, routing(3))
    assert np.array_equal(np.array(values).reshape(shape), routed(3))


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


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (Script(status=503, message="The server is loading.", retry_after=3), "503", "Try again in 3 s"),
        (Script(status=429, message="60 requests a minute.", retry_after=7), "429", "Too many requests"),
        (Script(status=400, message="temperature is 9."), "400", "temperature is 9."),
        (Script(["half"], breaks_off=True), "cut_off", "connection broke"),
        (Script(["half"], error="The engine has stopped."), "server_error", "The engine has stopped."),
    ],
)
def test_errors_are_told_and_can_be_retried(
    page: Page, model: ScriptedModel, script: Script, kind: str, words: str
) -> None:
    model.scripts["q"] = [script, Script(["fine"])]
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


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Page, model: ScriptedModel, url: str) -> None:
    model.key = "sk-right"
    page.driver.get(url + "/")
    page.wait("return document.querySelector('#key-input') !== null")
    page.driver.find_element("css selector", "#key-input").send_keys("sk-wrong", Keys.ENTER)
    page.wait("return document.querySelector('#key-input')?.value === ''")  # asked again
    page.driver.find_element("css selector", "#key-input").send_keys("sk-right", Keys.ENTER)
    page.wait("return document.documentElement.dataset.loaded === 'true'")
    say(page, "hi")
    assert answers(page) == ["You said: hi"]
    assert page.run("return sessionStorage.getItem('amalgam.key')") == "sk-right"
    assert "sk-right" not in page.run("return JSON.stringify(localStorage)")
    page.driver.refresh()
    page.wait("return document.querySelectorAll('.assistant').length === 1")
    page.wait("return document.documentElement.dataset.loaded === 'true'")
    assert page.count("#key-dialog") == 0


class Front(BaseHTTPRequestHandler):
    """A proxy that serves what `back` has under /a/prefix/."""

    back: httpx.Client

    def do_GET(self) -> None:
        self._pass()

    def do_POST(self) -> None:
        self._pass()

    def _pass(self) -> None:
        if not self.path.startswith("/a/prefix/"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {
            name: value for name, value in self.headers.items() if name.lower() in ("accept", "content-type", "host")
        }
        path = self.path.removeprefix("/a/prefix")
        with self.back.stream(self.command, path, content=body, headers=headers) as answer:
            self.send_response(answer.status_code)
            for name in ("content-type", "content-security-policy"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            for chunk in answer.iter_bytes():
                self.wfile.write(chunk)

    def log_message(self, *arguments: Any) -> None:
        pass


def test_behind_a_path_prefix(page: Page, model: ScriptedModel, url: str) -> None:
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Front,), {"back": client})) as front,
    ):
        thread = threading.Thread(target=front.serve_forever)
        thread.start()
        try:
            place = f"http://127.0.0.1:{front.server_port}"
            page.open(f"{place}/a/prefix/")
            say(page, "through")
            assert answers(page) == ["You said: through"]
            page.wait("return document.querySelector('.use-grid canvas') !== null")
            assert page.run("return document.querySelector('#to-dashboard').pathname") == "/a/prefix/dashboard"
            page.driver.refresh()
            page.wait("return document.querySelectorAll('.assistant').length === 1")
            page.wait("return document.documentElement.dataset.loaded === 'true'")
            page.collect()
            paths = {address.removeprefix(place) for address in page.addresses if address.startswith(place)}
            assert {path for path in paths if not path.startswith("/a/prefix/")} == set()
        finally:
            page.driver.get("about:blank")
            front.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def demo_url(derived: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the demo model in two precisions, and keys."""
    mapping = {"model.layers.*.mlp.experts.*": "int4", "model.layers.*.mlp.experts.{0-3}.*": "fp8"}
    mixed = {"fp8_path": str(derived / "fp8"), "int4_path": str(derived / "int4"), "weight_mapping": mapping}
    settings = build_settings(
        {
            "model": {"name": "demo", "base_path": str(DEMO), "mixed_precision": mixed},
            "inference": {"device_map": "cpu", "max_seq_length": 256},
            "engine": {"num_threads": 1},
            "server": {
                "port": 0,
                "export_dir": str(tmp_path_factory.mktemp("exports")),
                "api_keys": "sk-user",
                "admin_key": "sk-admin",
            },
        }
    )
    with serving(settings, lambda: open_deployment(settings)) as url:
        wait_until_ready(url)
        yield url


def test_with_a_real_model_and_a_users_key(browser: Page, demo_url: str) -> None:
    browser.reset()
    browser.driver.get(demo_url + "/")
    browser.wait("return document.querySelector('#key-input') !== null")
    browser.driver.find_element("css selector", "#key-input").send_keys("sk-user", Keys.ENTER)
    browser.wait("return document.querySelector('#model').textContent === 'demo'")
    browser.wait("return document.querySelector('#set-temperature').placeholder !== ''")
    browser.click("#settings-open")
    browser.driver.find_element("css selector", "#set-max_tokens").send_keys("7")
    browser.driver.find_element("css selector", "#set-seed").send_keys("1")
    say(browser, "It was a dark night")
    body = {"messages": [{"role": "user", "content": "It was a dark night"}], "max_tokens": 7, "seed": 1}
    headers = {"Authorization": "Bearer sk-user"}
    answer = httpx.post(
        demo_url + "/v1/chat/completions", json={**body, "routed_experts": True}, headers=headers, timeout=60
    ).json()
    [choice] = answer["choices"]
    kept = """const done = arguments[0];
        import(new URL("app.js", document.querySelector("script[type=module]").src))
            .then(({app}) => done(app.current.nodes[app.current.leaf].content))"""
    assert browser.driver.execute_async_script(kept) == choice["message"]["content"]
    assert f"prompt {answer['usage']['prompt_tokens']}" in browser.text(".figures")

    trace = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))[answer["usage"]["prompt_tokens"] - 1 :]
    used = sum(len(np.unique(trace[:, layer])) for layer in range(trace.shape[1]))
    assert browser.text(".use > p").startswith(f"{used} of 96 experts")
    fp8 = round(100 * float((trace < 4).mean()))
    shown = browser.run(
        """return [...document.querySelectorAll('.use .formats li')].map((row) =>
            [row.querySelector('span').textContent, row.querySelector('b').textContent])"""
    )
    assert dict(shown) == {"fp8": f"{fp8}%", "int4": f"{100 - fp8}%"}
    browser.driver.get(demo_url + "/dashboard")
    browser.wait("return document.querySelector('#key-input') !== null")  # which wants the admin key
    browser.driver.find_element("css selector", "#key-input").send_keys("sk-admin", Keys.ENTER)
    browser.wait("return document.documentElement.dataset.loaded === 'true'")


def test_languages_themes_and_a_telephone(page: Page, model: ScriptedModel) -> None:
    model.scripts["md"] = [Script([MARKDOWN, "\n", "x" * 300])]
    say(page, "md")
    page.click("#language")
    assert page.text("#new") == "新对话"
    assert page.run("return document.documentElement.lang") == "zh-CN"
    assert "词元" in page.text(".figures")
    assert page.run(UNREADABLE) == []
    page.click("#theme")
    assert page.run("return document.documentElement.dataset.theme") == "dark"
    assert page.run(UNREADABLE) == []
    page.emulate(360, 740, is_mobile=True)
    page.wait("return document.querySelector('#sidebar').inert")
    page.wait("return document.documentElement.scrollWidth <= 360")
    overflowing = """return [...document.querySelectorAll('#thread *')].filter((node) =>
        node.getBoundingClientRect().right > 361 && !node.closest('pre, .table-frame, .grid-scroll')).length"""
    page.wait(f"return (() => {{ {overflowing} }})() === 0")
    page.click("#side-open")
    page.wait("return document.activeElement.id === 'side-close'")
    page.run("document.querySelector('#language').click()")
    page.click("#new")
    page.wait("return document.querySelector('#sidebar').inert")
