"""Files of the chat page."""

from __future__ import annotations

import re

import httpx

from amalgam.server import page as page_files
from tests.server.page_files import assert_one_meaning, assert_only_own_files, used_words

OWN = {name: file.content.decode() for name, file in page_files.files().items()}


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
