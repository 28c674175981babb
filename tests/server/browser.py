"""A headless Chromium to open pages with, if the machine has one; nothing is downloaded.

In: an address. Out: the page as a user has it, and what its browser complained about.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # The first keeps the connections of pages left behind, of six to a host; a spare process costs what it may spare.
    "--disable-features=BackForwardCache,SpareRendererForSitePerProcess",
    "--renderer-process-limit=1",
    "--disable-site-isolation-trials",
    "--hide-scrollbars",
)
WAIT_SECONDS = 60.0  # ends what would hang; a busy machine takes some
INTERNAL_SCHEMES = ("about", "blob", "chrome", "data")  # the first page of a new browser is its own


class Page:
    """One tab."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.user_agent: str = driver.execute_cdp_cmd("Browser.getVersion", {})["userAgent"]
        self.complaints: list[str] = []
        self.addresses: list[str] = []

    def reset(self) -> None:
        """As a new browser would be: nothing open, stored or complained of."""
        if self.driver.current_url.startswith("http"):
            self.run("localStorage.clear()")
        self.driver.get("about:blank")
        self.emulate()
        self.collect()
        self.complaints.clear()
        self.addresses.clear()

    @contextmanager
    def second_tab(self, url: str) -> Iterator[tuple[str, str]]:
        """Another tab of the same browser, in front; gives the handles of the first and this one."""
        first: str = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        try:
            self.open(url)
            yield first, self.driver.current_window_handle
        finally:
            for handle in self.driver.window_handles:
                if handle != first:
                    self.driver.switch_to.window(handle)
                    self.driver.close()
            self.driver.switch_to.window(first)

    def front(self, handle: str) -> None:
        """Turn to a tab."""
        self.driver.switch_to.window(handle)

    def open(self, url: str) -> None:
        """Open the dashboard at `url` and wait until its first figures are there."""
        self.driver.get(url)
        self.wait("return document.documentElement.dataset.loaded === 'true'")

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: str | Callable[[], Any], *arguments: Any) -> Any:
        """Wait until a script or a function gives something truthy, and return that."""
        deadline, pause = time.monotonic() + WAIT_SECONDS, 0.02
        while True:
            result = condition() if callable(condition) else self.run(condition, *arguments)
            if result:
                return result
            assert time.monotonic() < deadline, f"waited in vain: {condition}"
            time.sleep(pause)
            pause = min(1.5 * pause, 0.3)  # each look takes the browser some milliseconds

    def text(self, selector: str) -> str:
        """The text of the first element."""
        result: str = self.run("return document.querySelector(arguments[0]).textContent", selector)
        return result

    def count(self, selector: str) -> int:
        """How many elements there are."""
        result: int = self.run("return document.querySelectorAll(arguments[0]).length", selector)
        return result

    def show(self, selector: str) -> Any:
        """Scroll an element into view."""
        element = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        return element

    def click(self, selector: str) -> None:
        """Click as a user does; once more if what was found has been drawn anew meanwhile."""
        from selenium.common.exceptions import StaleElementReferenceException

        try:
            self.show(selector).click()
        except StaleElementReferenceException:
            self.show(selector).click()

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
        self.run(script, self.show(selector), value)

    def type(self, selector: str, text: str) -> None:
        """Have a text in a field instead of what is there."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.run(script, self.show(selector), text)

    def click_cell(self, panel: str, row: int, column: int, *, shift: bool = False) -> None:
        """Click a cell of a panel's grid with the mouse."""
        self.show(f"#{panel} .grid-overlay")
        self.wait("return document.getElementById(arguments[0]).grid.data !== null", panel)
        center = "return document.getElementById(arguments[0]).grid.center(arguments[1], arguments[2])"
        point = self.run(center, panel, row, column)
        fields = {**point, "button": "left", "clickCount": 1, "modifiers": 8 if shift else 0}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, **fields})

    def emulate(
        self,
        width: int = 1440,
        height: int = 900,
        *,
        is_mobile: bool = False,
        is_dark: bool = False,
        language: str = "en",
    ) -> None:
        """Another screen, and another language of the user."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        identity = {"userAgent": self.user_agent, "acceptLanguage": language}
        self.driver.execute_cdp_cmd("Emulation.setUserAgentOverride", identity)

    def collect(self) -> None:
        """Read the browser's logs: complaints (errors, refused content) and all addresses it turned to."""
        for entry in self.driver.get_log("browser"):
            if entry["level"] != "INFO":
                self.complaints.append(entry["message"])
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.addresses.append(message["params"]["request"]["url"])

    def strangers(self, url: str) -> set[str]:
        """Hosts other than that of `url` that the page turned to."""
        self.collect()
        parts = (urlsplit(address) for address in self.addresses)
        return {
            part.geturl()
            for part in parts
            if part.scheme not in INTERNAL_SCHEMES and (part.scheme, part.netloc) != ("http", urlsplit(url).netloc)
        }


@contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile in the folder `profile`. Skips the test if there is none on this machine."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("perfLoggingPrefs", {"enableNetwork": True, "enablePage": False})
    service = webdriver.ChromeService(driver_path, log_output=os.devnull)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(WAIT_SECONDS)
    try:
        page = Page(driver)
        page.emulate()
        yield page
    finally:
        driver.quit()
