"""The chat page's settings, keys, screens, and what stands in front of it."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from amalgam.config.settings import build_settings
from amalgam.runtime.opening import open_deployment
from tests.conftest import DEMO
from tests.server.browser import Page
from tests.server.chat.saying import MARKDOWN, answers, prompt, said, say, wait_for_end
from tests.server.conftest import serving, wait_until_ready
from tests.server.readable import UNREADABLE
from tests.server.scripted import Script, ScriptedModel


def test_settings(page: Page, model: ScriptedModel, url: str) -> None:
    page.click("#settings-open")
    placeholder = "return document.querySelector(`#set-${arguments[0]}`).placeholder"
    names = ("temperature", "top_p", "top_k", "max_tokens", "seed")
    # The model has a temperature of its own; of the rest holds what a chat makes of nothing.
    assert [page.run(placeholder, name) for name in names] == ["0.7", "1", "0", "as many as fit", "random"]
    page.click("#language")
    assert page.run(placeholder, "max_tokens") == "不限"
    page.click("#language")
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
    assert page.run("return document.querySelector('#prompt').value") == "y"

    page.run("[...document.querySelectorAll('#settings .row button')][1].click()")  # reset
    prompt(page).send_keys(Keys.ENTER)
    page.wait("return document.querySelectorAll('.assistant .do-regenerate').length === 1")
    num_requests = len(model.requests)
    for name, value in (("#tools", "[{bad"), ("#set-top_p", "7")):
        field = page.driver.find_element("css selector", name)
        field.send_keys(value, Keys.TAB)
        page.click("#settings .ghost")
        page.click(".assistant .do-regenerate")
        assert page.run("return document.activeElement === arguments[0]", field)
        assert len(model.requests) == num_requests and page.count(".problem") == 0
        field.clear()
    page.click(".assistant .do-regenerate")
    page.wait(lambda: len(model.requests) == num_requests + 1)


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Page, model: ScriptedModel, url: str) -> None:
    model.key = "sk-right"
    page.driver.get(url + "/")
    page.wait("return document.querySelector('#key-input') !== null")
    assert page.count("#key-refused") == 0
    page.driver.find_element("css selector", "#key-input").send_keys("密钥", Keys.ENTER)  # which no header may hold
    assert not page.run("return document.querySelector('#key-input').checkValidity()")
    page.run("sessionStorage.setItem('amalgam.key', '密钥')")  # as earlier versions kept it
    page.driver.refresh()
    page.wait("return document.querySelector('#key-input') !== null")
    page.driver.find_element("css selector", "#key-input").send_keys("sk-wrong", Keys.ENTER)
    page.wait("return document.querySelector('#key-input')?.value === ''")  # asked again
    assert page.text("#key-refused") == "The server has refused the key."
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
    name = "look_up_the_weather_of_tomorrow_" * 8
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": name, "arguments": "{}"}}
    model.scripts["md"] = [Script([MARKDOWN, "\n", "x" * 300, {"tool_calls": [call]}], finish="tool_calls")]
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
    assert page.run("const head = document.querySelector('.call h3'); return head.scrollWidth <= head.clientWidth")
    page.click("#side-open")
    page.wait("return document.activeElement.id === 'side-close'")
    page.emulate(360, 225, is_mobile=True)  # at four times the size
    for selector in (".entry", "#export", "#new"):
        in_view = """const {top, bottom} = arguments[0].getBoundingClientRect();
            return bottom > top && top >= 0 && bottom <= 225"""
        page.wait(in_view, page.show(selector))
    page.emulate(360, 740, is_mobile=True)
    page.run("document.querySelector('#language').click()")
    page.click("#new")
    page.wait("return document.querySelector('#sidebar').inert")
