"""What holds for the files of every page: no inline code, no addresses elsewhere, and all words in both languages."""

from __future__ import annotations

import re
from collections.abc import Mapping

from amalgam.server.web.files import PAGE

WORD_FILES = ("words.js", "common.js")


def assert_only_own_files(own: Mapping[str, str], prefix: str) -> None:
    """The page loads its own files alone, and its scripts make no element from text.

    Args:
        own: name → text of the page's files.
        prefix: where they are served.
    """
    page = own[PAGE]
    for pattern in (r"<script(?![^>]*\ssrc=)", r"<style", r"\sstyle=", r"\son\w+=", r"https?://", r"//"):
        assert not re.search(pattern, page), pattern
    found = re.findall(rf'(?:src|href)="{prefix}([^"]+)"', page)
    assert found
    assert set(found) <= set(own)
    scripts = {name: text for name, text in own.items() if name.endswith(".js")}
    for name, text in scripts.items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://", text
        ), name
        for path in re.findall(r'from "([^"]+)"', text):
            folder = name.rpartition("/")[0]
            parts = [part for part in f"{folder}/{path}".split("/") if part not in ("", ".")]
            while ".." in parts:
                index = parts.index("..")
                del parts[index - 1 : index + 1]
            assert "/".join(parts) in scripts, (name, path)


def words_of(own: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Word → English, Chinese."""
    row = re.compile(r'^  (\w+): \["((?:[^"\\]|\\.)*)", "((?:[^"\\]|\\.)*)"\],$', re.MULTILINE)
    return {word: (english, chinese) for name in WORD_FILES for word, english, chinese in row.findall(own[name])}


def used_words(own: Mapping[str, str]) -> set[str]:
    """The words that the page asks for by name. Every word that exists is used, and every one used exists."""
    words = words_of(own)
    for english, chinese in words.values():
        assert english and chinese
        assert sorted(re.findall(r"\{\d\}", english)) == sorted(re.findall(r"\{\d\}", chinese)), english
    texts = "\n".join(text for name, text in own.items() if name not in WORD_FILES)
    used = {word for argument in re.findall(r"\bt\(([^()]*)\)", texts) for word in re.findall(r'"(\w+)"', argument)}
    used.update(re.findall(r'\bt\("(\w+)"', texts))
    used.update(re.findall(r'(?:data-i18n(?:-\w+)?=|i18n\w*: )"(\w+)"', texts))
    used.update(re.findall(r'control\("(\w+)"', texts))
    for title, hint in re.findall(r'frame\("\w+", "(\w+)", (?:"(\w+)"|null),', texts):
        used.update({title, hint} - {""})
    assert used - set(words) == set()

    prefixes = set(re.findall(r"`(\w+_)\$\{", texts))  # of words that are put together: `status_${status}`
    assert all(any(word.startswith(prefix) for word in words) for prefix in prefixes)
    literals = set(re.findall(r'"(\w+)"', texts))
    assert {word for word in words if word not in literals and not word.startswith(tuple(prefixes))} == set()
    assert re.findall(r'(?:"aria-label"|title|placeholder): "[^"]+"', texts) == []  # English whatever the language
    return used


def assert_one_meaning(own: Mapping[str, str], one_notion: list[set[str]]) -> None:
    """Terms that differ in English differ in Chinese: 提示 was a prompt here and a hint there.

    Args:
        one_notion: English words, in lower case, that are one word in Chinese.
    """
    meanings: dict[str, set[str]] = {}
    for english, chinese in words_of(own).values():
        meanings.setdefault(chinese, set()).add(english.lower())
    assert [found for found in meanings.values() if len(found) > 1 and found not in one_notion] == []
    assert [chinese for _, chinese in words_of(own).values() if re.search("提示(?!词)", chinese)] == []
