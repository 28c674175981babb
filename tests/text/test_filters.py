"""Filters over texts: the same however a text is cut, and what a reference says that tries every place."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from amalgam.config.filters import FiltersSettings
from amalgam.config.settings import build_settings
from amalgam.errors import ConfigError
from amalgam.text.filters.contract import FilterFailedError, Finding
from amalgam.text.filters.folding import Folding
from amalgam.text.filters.passing import TextFilter
from amalgam.text.filters.personal import KINDS, has_id_check, has_luhn
from amalgam.text.filters.rules import Rule, make_rules
from tests.errors import raises


def rules_of(*rules: dict[str, Any]) -> tuple[Rule, ...]:
    named = [{"name": f"rule{index}", **rule} for index, rule in enumerate(rules)]
    return make_rules(FiltersSettings.model_validate({"rules": named}))


def passed(rules: Sequence[Rule], pieces: Sequence[str], context: str = "") -> tuple[str, bool, list[str]]:
    """The text that leaves, whether it was blocked, and what has left after each piece."""
    passing, text, after = TextFilter(rules, context), "", []
    for piece in pieces:
        passing.push(piece)
        released = passing.release()
        text += released.text
        after.append(text)
        if released.blocked_by is not None:
            return text, True, after
    passing.end()
    last = passing.release()
    return text + last.text, last.blocked_by is not None, after


def whole(rules: Sequence[Rule], text: str) -> str:
    return passed(rules, [text])[0]


def cut(text: str, generator: random.Random) -> list[str]:
    places = sorted(generator.sample(range(len(text) + 1), min(len(text), generator.randint(0, 12))))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


PII = rules_of({"pii": list(KINDS)})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mail john.smith+a@mail.example.co.uk, now", "mail [EMAIL], now"),
        ("张三john@x.com的邮箱", "张三[EMAIL]的邮箱"),
        ("call 13812345678 or +86 138 1234 5678.", "call [PHONE] or [PHONE]."),
        ("电话１３８１２３４５６７８，办公室0571-88886666", "电话[PHONE]，办公室[PHONE]"),
        ("at +44 20 7946 0958 or (415) 555-2671", "at [PHONE] or [PHONE]"),
        ("身份证11010519491231002X。", "身份证[ID_CARD]。"),
        ("110105194912310021 has a wrong check digit", "110105194912310021 has a wrong check digit"),
        ("card 4111 1111 1111 1111, 6222-0212-3456-7895?", "card [BANK_CARD], 6222-0212-3456-7895?"),
        ("4111 1111 1111 1111 20 of them", "[BANK_CARD] 20 of them"),
        ("not 4111111111111112, not 41111111111111111111111", "not 4111111111111112, not 41111111111111111111111"),
        ("192.168.1.1, fe80::1, 999.1.1.1, 12:34:56, std::vector", "[IP], [IP], 999.1.1.1, 12:34:56, std::vector"),
        ("sk-abcdefghijklmnopqrstuvwxyz0123 and AKIAIOSFODNN7EXAMPLE.", "[API_KEY] and [API_KEY]."),
        ("on 2026-11-29 at 12:34, 3.14159 of 1000000 in v1.2", "on 2026-11-29 at 12:34, 3.14159 of 1000000 in v1.2"),
        ('{"a": "\\u0061\\u0040b.com", "b": "x\\njohn@x.com"}', '{"a": "[EMAIL]", "b": "x[EMAIL]"}'),
    ],
)  # fmt: skip
def test_personal_data_is_found_however_the_text_comes(text: str, shown: str) -> None:
    assert whole(PII, text) == shown
    for seed in range(12):
        assert passed(PII, cut(text, random.Random(seed)))[0] == shown
    assert passed(PII, list(text))[0] == shown


def test_check_digits_are_those_of_their_standards() -> None:
    assert has_luhn("4111 1111 1111 1111") and has_luhn("6222021234567890128")
    assert not any(has_luhn(f"411111111111111{digit}") for digit in range(10) if digit != 1)
    assert has_id_check("11010519491231002x")
    assert not any(has_id_check(f"11010519491231002{digit}") for digit in range(10))


WORDS = {"words": ["bad", "坏人", "straße", "two words"], "action": "block"}


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("this is Bad.", "this is "), ("是坏人吗", "是"), ("he is bad坏", "he is "), ("die STRASSE", "die "),
        ("b\u200ba\u00add", ""), ("ｂａｄ", ""), ("b\\u0061d", ""), ("say \\nbad", "say \\n"), ("my Two Words", "my "),
        ("badly embadded, two  words, BAD_", None), ("ba", None), ("坏", None), ("straß", None), ("bad\u0301", None),
    ],
)  # fmt: skip
def test_words_block_as_soon_as_they_are_there(text: str, before: str | None) -> None:
    rules = rules_of(WORDS)
    for pieces in ([text], list(text), cut(text, random.Random(3))):
        left, is_blocked, _ = passed(rules, pieces)
        assert (left, is_blocked) == ((text, False) if before is None else (before, True))


def test_settings_say_what_equal_words_are() -> None:
    assert whole(rules_of({"words": ["bad"], "case_sensitive": True}), "Bad bad") == "Bad [REMOVED]"
    assert whole(rules_of({"words": ["bad"], "whole_words": False}), "embadded") == "em[REMOVED]ded"
    assert whole(rules_of({"words": ["cafe"]}), "café") == "café"
    assert whole(rules_of({"words": ["cafe"], "unicode": "loose"}), "câfé café") == "[REMOVED] [REMOVED]"
    assert whole(rules_of({"words": ["bad"], "unicode": "none"}), "ｂａｄ bad") == "ｂａｄ [REMOVED]"
    assert Folding("nfkc", ignores_case=True).of("ﬁ①Ａ") == "fi1a"


PATTERNS = [
    r"a+b", r"(?:ab|ba){2,3}", r"[ab]c[^a]", r"a.{0,3}c", r"(?:a|ab)(?:c|bcd)", r"\bab\b", r"(?i)AB?C", r"[a-c]{2}d|bb",
    r"(?:a*)*b", r"\Bb\B", r"\p{Lu}\w*", r"(?<name>a)(?:b|\s)+?c",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_expressions_find_the_longest_match_at_every_place(pattern: str) -> None:
    """As Python's own engine does where it is asked for each end, the longest first."""
    rules = rules_of(
        {"regexes": [pattern], "action": "replace", "replacement": "#", "unicode": "none", "case_sensitive": True}
    )
    reference = pattern.replace(r"\p{Lu}", "[A-Z]").replace("(?<name>", "(?P<name>")
    generator = random.Random(pattern)
    for _ in range(150):
        text = "".join(generator.choice("aabbccd  A") for _ in range(generator.randint(0, 16)))
        is_found = [False] * len(text)
        for start in range(len(text)):
            ends = (end for end in range(len(text), start, -1) if matches(reference, text, start, end))
            for place in range(start, next(ends, start)):
                is_found[place] = True
        kept = "".join(char for char, found in zip(text, is_found, strict=True) if not found)
        assert whole(rules, text).replace("#", "") == kept, text
        assert passed(rules, cut(text, generator))[0] == whole(rules, text), text


def matches(pattern: str, text: str, start: int, end: int) -> bool:
    """Exactly there, in its surroundings, which slicing would change."""
    flags, body = (re.IGNORECASE, pattern[4:]) if pattern.startswith("(?i)") else (re.NOFLAG, pattern)
    return re.compile(rf"(?:{body})(?=[\s\S]{{{len(text) - end}}}\Z)", flags).match(text, start) is not None


def test_no_character_leaves_that_a_match_may_have_begun_with() -> None:
    """And no other is held back."""
    rules = rules_of({"words": ["forbidden words"], "action": "block"})
    _, is_blocked, after = passed(rules, list("a forbidden word is fine, but forbidden words"))
    assert is_blocked and after[-1] == "a forbidden word is fine, but "
    assert after[len("a forbidden word") - 1] == "a "
    assert after[len("a forbidden word ") - 1] == "a forbidden word "


def test_what_begins_in_a_prompt_and_ends_in_its_answer_is_found() -> None:
    rules = rules_of({"words": ["secret"]})
    assert passed(rules, ["ret", " is it"], context="the sec")[0] == "[REMOVED] is it"
    assert passed(rules, [" is it"], context="the secret")[0] == " is it"
    assert passed(rules_of(WORDS), ["d is it"], context="ba")[1]


def test_matches_without_end_are_held_back_for_so_long_only() -> None:
    """What has matched until then is replaced all the same, once, and so is what follows."""
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEabc/+=\n" * 200 + "-----END RSA PRIVATE KEY-----"
    assert passed(PII, cut(f"key {key} tail", random.Random(1)))[0] == "key [API_KEY] tail"
    rules = rules_of({"regexes": ["<.*>"], "max_chars": 8})
    left, _, after = passed(rules, list("<" + "x" * 50))
    assert left == "<" + "x" * 50 and len(after[-1]) == 51 - 8
    assert passed(rules_of({"regexes": ["<.*>"], "max_chars": 8, "action": "block"}), list("<" + "x" * 50 + ">"))[1]


def test_time_is_linear_where_backtracking_is_not() -> None:
    """An engine that backtracks never comes back from this one. The first rule has 10,000 words."""
    many = rules_of({"words": [f"word{index}" for index in range(10_000)]}, {"regexes": [r"(?:a*)*b", r"(?:x+x+)+y"]})
    started = time.process_time()
    assert whole(many, "a" * 5000 + "x" * 5000 + " word9999").endswith("x [REMOVED]")
    assert time.process_time() - started < 60


@pytest.mark.parametrize(
    "pattern",
    [
        "a*", "(?=a)b", "(?<!a)b", r"(a)\1", "^a", "a$", r"\Aa", "(a", "a)", "[a", "a{2", "a{3,2}", "*a", "a++",
        r"\q", r"\p{Nonsense}", "[b-a]", r"(?:(?:a{1000}){1000}){9}", "[[:alpha:]]", "[é]", "(?x)a", "(" * 99 + "a",
    ],
)  # fmt: skip
def test_expressions_that_cannot_be_used_are_refused_by_rule(pattern: str) -> None:
    with raises(ConfigError, "rule0"):
        rules_of({"regexes": [pattern]})


@pytest.mark.parametrize(
    "rule",
    [
        {}, {"words": ["a"], "pii": ["email"]}, {"words": ["a"], "where": []}, {"words": ["a"], "action": "replace"},
        {"words": ["a"], "replacement": "b"}, {"hook": "x", "where": ["logs"]}, {"words": ["a"], "options": {"b": 1}},
        {"pii": ["shoe_size"]}, {"words": ["a"], "name": "No Name"},
    ],
)  # fmt: skip
def test_rules_that_say_nothing_or_too_much_are_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_settings({"model": {"base_path": "x"}, "filters": {"rules": [{"name": "rule", **rule}]}})


def test_files_of_words_and_their_faults(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("# a list\n\nbad word\n坏人\n", "utf-8")
    assert whole(rules_of({"words_file": str(file)}), "a bad word, # a list") == "a [REMOVED], # a list"
    file.write_bytes(b"\xff\xfe\xfd")
    for rule in ({"words_file": str(file)}, {"words_file": str(tmp_path / "none")}, {"words": ["\u200b"]},
                 {"words": ["abc" * 100]}, {"hook": "nobody-offers-this"}):  # fmt: skip
        with raises(ConfigError, "rule0"):
            rules_of(rule)


class Vowels:
    """A hook: stretches of `oo`."""

    max_chars = 5

    def find(self, text: str, where: str) -> list[Finding]:
        return [Finding(match.start(), match.end(), "VOWELS") for match in re.finditer("o{2,5}", text)]


def hooked(action: str = "redact") -> list[Rule]:
    [rule] = rules_of({"words": ["x"], "action": action})
    return [Rule("hooked", rule.where, rule.action, None, Vowels.max_chars, rule.folding, hook=Vowels())]


@pytest.mark.parametrize("seed", range(8))
def test_hooks_see_every_stretch_of_their_length_before_it_leaves(seed: int) -> None:
    text = "a look at the book, zoooom and on, to a good moon; " * 2
    passing, left = TextFilter(hooked()), ""
    for piece in [*cut(text, random.Random(seed)), None]:
        passing.end() if piece is None else passing.push(piece)
        for look in passing.looks():
            assert look.rule.hook is not None
            passing.take(look, look.rule.hook.find(look.text, "answers"))
        left += passing.release().text
    assert left == re.sub("o{2,5}", "[VOWELS]", text)


def test_findings_outside_of_the_text_are_a_fault_of_the_hook() -> None:
    passing = TextFilter(hooked())
    passing.push("some text")
    passing.end()
    [look] = passing.looks()
    for finding in (Finding(-1, 2), Finding(2, 2), Finding(0, 100), "nonsense"):
        with raises(FilterFailedError, "hooked"):
            passing.take(look, [finding])  # type: ignore[list-item]
