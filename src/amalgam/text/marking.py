"""Special tokens that stand in a message stay text, and those of the template are tokens.

In: a chat prompt's values, the text that a template makes of them, a tokenizer of the tokenizers library. Out: marked
values, token ids. Must never know: templates, requests.

Who writes `<|im_end|>` in a message must not end it. Wherever a special token begins in a string, or could go on in
what follows it, a mark is put before it: a character that occurs nowhere else, and that templates carry along. In the
template's text no special token begins at a mark; what other special tokens it has are the template's own.

Such a text goes to a second tokenizer, which shares the model of the first and knows no special token. It has a secret
name for each of them instead, so that they are found where they stand and cut the text as they would.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from amalgam.errors import RequestError
from amalgam.text.pieces import PIECE_CHARS, token_ids_by_piece

# Chat templates cut the assistant's messages at these.
_OF_REASONING = frozenset({"<think>", "</think>", "[THINK]", "[/THINK]"})
# Marks are letters, so that nothing shows them escaped: rare ideographs, of which some text would have to have most.
_RARE = range(0x20000, 0x2A6D7)
_MAX_TRIES = 64


class SpecialTokenFinder:
    """Finds texts of special tokens in a text, in time that does not depend on how many there are."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = {text for text in texts if text}
        self._prefixes = {text[:length] for text in self._texts for length in range(1, len(text))}
        self._longest = max(map(len, self._texts), default=0)
        self.expression = _expression(self._texts) if self._texts else "(?!)"
        self._anywhere = re.compile(f"(?={self.expression})")
        self._match = re.compile(self.expression)

    def places(self, text: str, exempt: frozenset[str] = frozenset()) -> list[int]:
        """Where a special token begins, the last place where one may have begun that goes on behind it included."""
        found = [match.start() for match in self._anywhere.finditer(text)] if self._texts else []
        if exempt:
            found = [place for place in found if self._at(text, place) not in exempt]
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            place = len(text) - length
            if text[place:] in self._prefixes and place not in found:
                found.append(place)
        return sorted(found)

    def _at(self, text: str, place: int) -> str:
        match = self._match.match(text, place)
        return "" if match is None else match[0]


class Marks:
    """Marks for the strings of one prompt.

    Attributes:
        mark: the character; empty if no string needs one.
        end: another one, which occurs nowhere either.
    """

    def __init__(self, prompt: Any, source: str, finder: SpecialTokenFinder | None) -> None:
        values = (prompt.messages, prompt.tools, prompt.documents, dict(prompt.variables))
        strings = {source, *_strings(values)}
        self._finder = finder
        self.end = _unused(strings)
        mark = _unused({*strings, self.end})
        needs_mark = finder is not None and any(finder.places(string) for string in _strings(values))
        self.mark = mark if needs_mark else ""

    def in_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        exempt = _OF_REASONING if message.get("role") == "assistant" else frozenset()
        return {name: self.in_value(value, exempt) for name, value in message.items()}

    def in_value(self, value: Any, exempt: frozenset[str] = frozenset()) -> Any:
        """A copy of a JSON-like value, its strings marked."""
        if isinstance(value, str):
            return self._in_string(value, exempt)
        if isinstance(value, Mapping):
            return {self._in_string(key, exempt): self.in_value(item, exempt) for key, item in value.items()}
        return [self.in_value(item, exempt) for item in value] if isinstance(value, list | tuple) else value

    def _in_string(self, text: str, exempt: frozenset[str]) -> str:
        if not self.mark or self._finder is None:
            return text
        places = self._finder.places(text, exempt)
        parts = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
        return self.mark.join(parts)


class MarkedEncoder:
    """Encodes texts in which marks stand. Any thread may use it.

    Args:
        backend: a `tokenizers.Tokenizer`.
        special_tokens: ids → texts.
        finder: of these texts.
    """

    def __init__(self, backend: Any, special_tokens: Mapping[int, str], finder: SpecialTokenFinder) -> None:
        from tokenizers import AddedToken, Tokenizer

        self._finder = finder
        self._special_ids = frozenset(special_tokens)
        self._texts = dict(special_tokens)
        self._backend = Tokenizer(backend.model)  # which both share
        for part in ("normalizer", "pre_tokenizer"):
            if (found := getattr(backend, part)) is not None:
                setattr(self._backend, part, found)
        secret = secrets.token_hex(16)
        self._names: dict[str, str] = {}
        added, ids = [], {}
        for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
            text = token.content
            if token_id in special_tokens:
                text = self._names[token.content] = f"\uf8ff{secret}:{token_id}\uf8ff"
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            added.append(AddedToken(text, **flags, special=False))
            ids[text] = token_id
        self._backend.add_tokens(added)
        self._ids = {self._backend.token_to_id(text): token_id for text, token_id in ids.items()}

    def pieces(self, text: str, mark: str) -> Iterator[list[int]]:
        """The ids of a marked text, in portions of bounded work."""
        named = self._named(text, mark)
        if len(named) <= PIECE_CHARS:
            yield self._to_ids(self._backend.encode_batch_fast([named], add_special_tokens=False)[0].ids)
            return
        for ids in token_ids_by_piece(self._backend, named):
            yield self._to_ids(ids)

    def _named(self, text: str, mark: str) -> str:
        """The text without marks, and with secret names for the special tokens that it has."""
        return re.compile(f"{mark}(.)|{self._finder.expression}", re.DOTALL).sub(self._name, text)

    def _name(self, match: re.Match[str]) -> str:
        return match[1] if match[1] is not None else self._names[match[0]]

    def _to_ids(self, ids: list[int]) -> list[int]:
        found: list[int] = []
        for token_id in ids:
            if token_id in self._special_ids and token_id not in self._ids:  # a word of the model, too
                found += self._spelled(self._texts[token_id])
            else:
                found.append(self._ids.get(token_id, token_id))
        return found

    def _spelled(self, text: str) -> list[int]:
        """A special token's text in tokens that are not special."""
        ids = [token_id for part in (text[:1], text[1:]) if part
               for token_id in self._backend.encode(part, add_special_tokens=False).ids]  # fmt: skip
        return [token_id for token_id in ids if token_id not in self._special_ids]


def _unused(strings: Collection[str]) -> str:
    """A character that none of the strings has."""
    for _ in range(_MAX_TRIES):
        char = chr(secrets.choice(_RARE))
        if not any(char in string for string in strings):
            return char
    raise RequestError(
        "The messages have most of the characters that there are.", remedy="Leave out rare ideographs (U+20000 on)."
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _expression(texts: set[str]) -> str:
    """A regular expression for the longest of the texts at a place, which looks at each character once."""
    by_first: dict[str, set[str]] = {}
    for text in texts:
        if text:
            by_first.setdefault(text[0], set()).add(text[1:])
    branches = []
    for first, rests in sorted(by_first.items()):
        prefix = first
        while len(rests) == 1 and (rest := next(iter(rests))):
            prefix, rests = prefix + rest, {""}
        rest_expression = "" if rests == {""} else _expression(rests)
        branches.append(re.escape(prefix) + rest_expression)
    return f"(?:{'|'.join(branches)})" + ("?" if "" in texts else "")
