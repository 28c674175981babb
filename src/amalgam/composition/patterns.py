"""Patterns of weight names: shell-like, and they match whole names.

`*` any characters (dots too), `?` one character, `[abc]` and `[0-9]` one of them, `{a,b}` alternatives, `{0-15}` whole
numbers in a range. In: a pattern, or names. Out: a regular expression, or patterns. Must never know: what names mean.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from itertools import chain

from amalgam.errors import PlanError, describe

_BRACES = re.compile(r"\{([^}]*)\}")
_WILDCARDS = frozenset("*?[{")
_MAX_RANGE = 65536
_MAX_STARS = 8
_MAX_NAMED = 12


def is_exact(pattern: str) -> bool:
    """Whether a pattern is a plain name."""
    return _WILDCARDS.isdisjoint(pattern)


def specificity(pattern: str) -> int:
    """How many characters of a pattern stand for themselves."""
    return len(re.sub(r"\*|\?|\[[^\]]*\]|\{[^}]*\}", "", pattern))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A shell-like pattern as a regular expression for `fullmatch`, with a group for each pair of braces.

    Raises:
        PlanError: a bracket or brace is not closed, or a range is empty or too long.
    """
    # A run of stars means one star. More than a few would make matching exponential.
    pattern = re.sub(r"\*+", "*", pattern)
    if pattern.count("*") > _MAX_STARS:
        raise PlanError(
            f"Pattern {describe(pattern)} holds {pattern.count('*')} stars.", remedy="At most 8 are allowed."
        )
    parts: list[str] = []
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character in "[{":
            close = pattern.find("]" if character == "[" else "}", position + 1)
            if close < 0:
                raise PlanError(f"Pattern {describe(pattern)} does not close its {character!r}.")
            body = pattern[position + 1 : close]
            parts.append(_one_of(pattern, body) if character == "[" else _alternatives(pattern, body))
            position = close + 1
            continue
        parts.append({"*": ".*", "?": "."}.get(character) or re.escape(character))
        position += 1
    return re.compile("".join(parts), re.DOTALL)


def _one_of(pattern: str, body: str) -> str:
    if not re.fullmatch(r"!?[A-Za-z0-9_.-]+", body):
        raise PlanError(f"Pattern {describe(pattern)} holds [{body}].", remedy="Allowed: letters, digits, _ . and a-z.")
    negated, characters = body.startswith("!"), body.removeprefix("!")
    try:
        re.compile(f"[{characters}]")
    except re.error as error:
        raise PlanError(f"Pattern {describe(pattern)} holds [{body}]: {error}.") from None
    return f"[{'^' if negated else ''}{characters}]"


def _alternatives(pattern: str, body: str) -> str:
    return f"({'|'.join(map(re.escape, chain.from_iterable(_options(pattern, body).values())))})"


def _options(pattern: str, body: str) -> dict[str, list[str]]:
    """The alternatives of a pair of braces → what each stands for: itself, or all numbers of its range."""
    options: dict[str, list[str]] = {}
    for option in map(str.strip, body.split(",")):
        bounds = re.fullmatch(r"(\d{1,9})-(\d{1,9})", option)
        if bounds is None:
            options[option] = [option]
            continue
        low, high = int(bounds[1]), int(bounds[2])
        if not low <= high < low + _MAX_RANGE:
            raise PlanError(
                f"Pattern {describe(pattern)} holds the range {option}.", remedy="Give low-high, low first."
            )
        options[option] = list(map(str, range(low, high + 1)))
    return options


def idle_alternative(pattern: str, names: Iterable[str], all_names: Iterable[str]) -> str | None:
    """The first alternative of a pattern's braces with which it matches none of `all_names`; None: there is none.

    A range is one alternative: the same rule may serve models of different sizes.

    Args:
        names: are looked at first, each once; best those that it matches.
    """
    braces = [_options(pattern, body) for body in _BRACES.findall(pattern)]
    alternatives = [{option: one for one, options in each.items() for option in options} for each in braces]
    whole = compile_pattern(pattern)
    for name in names:
        if not any(braces):
            return None
        if (match := whole.fullmatch(name)) is not None:
            for left, of_option, option in zip(braces, alternatives, match.groups(), strict=True):
                left.pop(of_option[option], None)
    for braced, left in zip(_BRACES.finditer(pattern), braces, strict=True):
        for one in left:  # which may match where another one was taken for a name
            narrow = compile_pattern(f"{pattern[: braced.start()]}{{{one}}}{pattern[braced.end() :]}")
            if not any(map(narrow.fullmatch, all_names)):
                return one
    return None


def patterns_of(names: Set[str], all_names: Set[str]) -> str:
    """Patterns of rules that match some weights and no others."""
    wanted, known = _by_layer(names), _by_layer(all_names)
    patterns = sorted(wanted.pop(("", ""), ()))
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (before, layer), below in wanted.items():
        for pattern in _collapsed(below, known[before, layer]):
            found[before, pattern].append(layer)
    for (before, pattern), layers in found.items():
        is_everywhere = len(layers) == sum(other == before for other, _ in known)
        patterns.append(f"{before}{'*' if is_everywhere else _numbers(layers)}{pattern}")
    rest = len(patterns) - _MAX_NAMED
    return ", ".join(patterns[:_MAX_NAMED]) + (f" and {rest} patterns more of this kind" if rest > 0 else "")


def _by_layer(names: Set[str]) -> dict[tuple[str, str], set[str]]:
    """Names by what stands before the first number and by that number, which is the layer's."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in sorted(names):
        before, layer, rest = ("", "", name)
        if (match := re.fullmatch(r"(.*?\.)(\d+)(\..+)", name)) is not None:
            before, layer, rest = match.groups()
        found[before, layer].add(rest)
    return found


def _collapsed(wanted: Set[str], known: Set[str]) -> list[str]:
    """Dotted names as patterns: `.*` where all that is known is wanted, numbers that go on alike together."""
    if wanted == known and len(known) > 1:
        return [".*"]
    found: dict[str, list[str]] = defaultdict(list)
    for first in sorted(
        {name.split(".")[1] for name in wanted}, key=lambda part: (not part.isdigit(), len(part), part)
    ):
        stem = f".{first}"
        below, beside = ({n[len(stem) :] for n in each if f"{n}.".startswith(f"{stem}.")} for each in (wanted, known))
        for rest in _collapsed(below, beside) if below != {""} else [""]:
            found[rest if first.isdigit() else f"{stem}{rest}"].append(first)
    return [f".{_numbers(firsts)}{rest}" if firsts[0].isdigit() else rest for rest, firsts in found.items()]


def _numbers(numbers: Sequence[str]) -> str:
    """`3`, or `{0,3}`, as the patterns of rules have it."""
    return numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}"
