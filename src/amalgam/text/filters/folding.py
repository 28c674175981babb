"""Characters → those that are compared, so that one text has one spelling; and how characters stand to words.

In: characters. Out: none, one or several characters for each. Must never know: what is looked for.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Literal

Unicode = Literal["none", "nfkc", "loose"]

_VARIATION_SELECTORS = (range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))
_JOINER = "\u034f"  # shown as nothing, and a mark by its category
_UNSPACED = (  # scripts that put no space between words
    "CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO", "YI ",
)  # fmt: skip

IN_WORD, IN_SPACED_WORD = 1, 2  # what `word_class` is made of


class Folding(dict[str, str]):
    """One character → what stands for it in comparisons. Whatever it was written with, equal texts become equal.

    Characters are taken apart (NFKD), since they come one by one and what composes them may come later: full-width
    digits become digits, ligatures letters, `é` an `e` and its accent. What is shown as nothing, such as zero-width
    spaces and soft hyphens, becomes nothing.

    Args:
        unicode: `none` leaves all characters as they are; `loose` drops accents and other marks too.
        ignores_case: case folding as the Unicode standard has it (`ß` is `ss`).
    """

    def __init__(self, unicode: Unicode, *, ignores_case: bool) -> None:
        super().__init__()
        self._unicode = unicode
        self._ignores_case = ignores_case

    def __missing__(self, char: str) -> str:
        text = char
        if self._unicode != "none":
            text = "".join(self._kept(unicodedata.normalize("NFKD", char)))
        if self._ignores_case:
            text = text.casefold()
            if self._unicode != "none":
                text = "".join(self._kept(unicodedata.normalize("NFKD", text)))
        self[char] = text
        return text

    def of(self, text: str) -> str:
        """A whole text."""
        return "".join(self[char] for char in text)

    def _kept(self, text: str) -> Iterator[str]:
        for char in text:
            category = unicodedata.category(char)
            is_shown = category != "Cf" and char != _JOINER and not any(ord(char) in r for r in _VARIATION_SELECTORS)
            if is_shown and not (self._unicode == "loose" and category[0] == "M"):
                yield char


class _WordClasses(dict[str, int]):
    def __missing__(self, char: str) -> int:
        is_word = char == "_" or char.isalnum() or unicodedata.category(char)[0] == "M"
        found = IN_WORD if is_word else 0
        if is_word and not unicodedata.name(char, "").startswith(_UNSPACED):
            found |= IN_SPACED_WORD
        self[char] = found
        return found


word_class = _WordClasses()
"""Of a character: whether words have it (`\\w`), and whether they are words with a border around them. Chinese has
words without one: there, a character before a word says nothing."""
