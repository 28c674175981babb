"""What a user of the chat page does, and what the page shows then."""

from __future__ import annotations

from typing import Any

from selenium.webdriver.common.keys import Keys

from tests.server.browser import Page

CLEAR = (Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
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
