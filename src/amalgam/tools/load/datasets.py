"""What is asked: questions of chosen lengths, or those in a file.

In: lengths in tokens, or JSON lines of prompts, messages or conversations. Out: questions, without end. Must never know
the server.
"""

from __future__ import annotations

import codecs
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from amalgam.base.strict_json import parse_json
from amalgam.errors import ConfigError, describe
from amalgam.tools.load.client import Endpoint, Message, Question

# Common words that most tokenizers have as one token each, after a space.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work night point home water room mother area money story "
    "fact month lot right study book eye job word business issue side kind head house service friend father power hour "
    "game line end member law car city community name president team minute idea body back parent face others level "
    "office door health person art war history party result change morning reason research girl guy moment air teacher "
    "force education"
)
WORDS = tuple(_WORDS.split())
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LENGTH_KEYS = ("output_tokens", "max_tokens", "max_completion_tokens")
_LENGTHS = re.compile("([0-9]{1,9})(?:-([0-9]{1,9}))?")
# Of the body of a batch file's row, what the benchmark chooses itself; the other fields are sent.
_OWN_KEYS = {"model", "stream", "stream_options", "prompt", "messages", *_LENGTH_KEYS}


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, each as likely as the others: `low` to `high`, both of them too."""

    low: int
    high: int

    @classmethod
    def parse(cls, flag: str, text: str) -> Lengths:
        """`512` or `256-1024`.

        Raises:
            ConfigError: it is neither.
        """
        found = _LENGTHS.fullmatch(text)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 0 < low <= high:
            raise ConfigError(f"{flag} is {describe(text)}.", remedy="Expected a number such as 512, or 256-1024.")
        return cls(low, high)

    def draw(self, chances: random.Random) -> int:
        return chances.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Measure:
    """How many tokens a text of words has for the server: `base`, and `per_word` for each word."""

    base: float = 0.0
    per_word: float = 1.0

    @classmethod
    def through(cls, few: tuple[int, int], many: tuple[int, int]) -> Measure:
        """
        Args:
            few, many: words of a text and its tokens.
        """
        per_word = max(0.1, (many[1] - few[1]) / (many[0] - few[0]))
        return cls(many[1] - per_word * many[0], per_word)

    @classmethod
    def of(cls, count: Callable[[str], int]) -> Measure:
        """As a function counts tokens."""
        chances = random.Random(0)
        few, many = ((size, count(text_of(words(chances, size)))) for size in (8, 256))
        return cls.through(few, many)

    def words_for(self, num_tokens: int) -> int:
        return max(1, round((num_tokens - self.base) / self.per_word))


def synthetic(
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    measure: Measure,
    *,
    shared_prefix: int = 0,
    num_prefixes: int = 1,
    seed: int = 0,
    count: Callable[[str], int] | None = None,
) -> Iterator[Question]:
    """Questions of random words.

    Args:
        shared_prefix: tokens at the beginning of each prompt that belong to one of `num_prefixes` texts.
        count: tokens of a text, where that can be told: prompts then have the very length.
    """
    chances = random.Random(seed)
    prefixes = [words(chances, measure.words_for(shared_prefix)) for _ in range(num_prefixes if shared_prefix else 0)]
    while True:
        length = prompt_lengths.draw(chances)
        beginning = prefixes[chances.randrange(num_prefixes)] if prefixes else []
        prompt = beginning + words(chances, max(1, measure.words_for(length) - len(beginning)))
        if count is not None:
            prompt = _of_length(prompt, length, count, chances)
        yield Question(text_of(prompt), output_lengths.draw(chances))


def words(chances: random.Random, count: int) -> list[str]:
    return chances.choices(WORDS, k=count)


def text_of(chosen: Sequence[str]) -> str:
    """Each word after a space, the first one too: so it is the token that it is elsewhere."""
    return "".join(f" {word}" for word in chosen)


def _of_length(prompt: list[str], length: int, count: Callable[[str], int], chances: random.Random) -> list[str]:
    """The prompt, with words taken from its end or added, until it has `length` tokens or another would be too many."""
    while len(prompt) > 1 and count(text_of(prompt)) > length:
        prompt = prompt[:-1]
    while count(text_of(longer := prompt + words(chances, 1))) <= length:
        prompt = longer
    return prompt


def from_file(path: Path, endpoint: Endpoint, output_lengths: Lengths | None, seed: int = 0) -> list[Question]:
    """Questions of a file: JSON lines, or one JSON list.

    A row is a text, or an object with `prompt`, `messages`, ShareGPT's `conversations`, or `body` (a line of OpenAI's
    batch files, whose other fields are sent too). A conversation is asked up to its last user's turn. `output_tokens`
    or `max_tokens` of a row, then `output_lengths`, limit the answer.

    Raises:
        ConfigError: it cannot be read, a row is none of these, or has messages for an endpoint that takes texts.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).", remedy="Check --dataset.") from None
    chances = random.Random(seed)
    questions = []
    for where, row in _rows(path, content):
        prompt, length, fields = _read_row(where, row)
        if not isinstance(prompt, str) and endpoint == "completions":
            raise ConfigError(f"{where} has messages.", remedy="Give --endpoint chat.")
        if length is None and output_lengths is not None:
            length = output_lengths.draw(chances)
        try:
            orjson.dumps((prompt, fields))
        except TypeError:
            raise ConfigError(f"{where} has a number of more than 64 bits.", remedy="Correct it.") from None
        questions.append(Question(prompt, length, fields))
    if not questions:
        raise ConfigError(f"{path} has no rows.", remedy="Expected JSON lines.")
    return questions


def has_messages(path: Path) -> bool:
    """Whether the first row of a file is messages and no text.

    Raises:
        ConfigError: as `from_file`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).", remedy="Check --dataset.") from None
    for where, row in _rows(path, content):
        return not isinstance(_read_row(where, row)[0], str)
    return False


def repeated(questions: Sequence[Question]) -> Iterator[Question]:
    """All of them, in order, again and again."""
    return itertools.cycle(questions)


def _rows(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.lstrip()[:1] == b"[" and (rows := _as_list(content)) is not None:
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number},", row
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number},", parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}, is no JSON: {error}.", remedy="Correct it.") from None


def _as_list(content: bytes) -> list[Any] | None:
    try:
        value = parse_json(content)
    except ValueError:
        return None  # lines that are lists each; or errors, which the lines then name
    return value if isinstance(value, list) else None


def _read_row(where: str, row: Any) -> tuple[str | list[Message], int | None, dict[str, Any]]:
    """The prompt, the length of the answer if the row says it, and what else is to be sent."""
    fields: dict[str, Any] = {}
    if isinstance(row, dict) and isinstance(row.get("body"), dict):
        row = row["body"]
        fields = {name: value for name, value in row.items() if name not in _OWN_KEYS}
    if isinstance(row, str):
        return _text(where, row), None, fields
    if not isinstance(row, dict):
        raise _no_question(where, row)
    length = next((row[key] for key in _LENGTH_KEYS if row.get(key) is not None), None)
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise ConfigError(f"{where} asks for {describe(length)} tokens.", remedy="Expected a whole number above 0.")
    if isinstance(row.get("prompt"), str):
        return _text(where, row["prompt"]), length, fields
    if isinstance(row.get("messages"), list):
        return _messages(where, row["messages"]), length, fields
    if isinstance(row.get("conversations"), list):
        return _messages(where, [_message(where, turn) for turn in row["conversations"]]), length, fields
    raise _no_question(where, row)


def _text(where: str, text: str) -> str:
    if not text:
        raise ConfigError(f"{where} is an empty prompt.", remedy="Remove it.")
    return text


def _message(where: str, turn: Any) -> Message:
    """A turn of ShareGPT."""
    role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
    if role is None or not isinstance(turn.get("value"), str):
        raise _no_question(where, turn)
    return {"role": role, "content": turn["value"]}


def _messages(where: str, messages: Sequence[Any]) -> list[Message]:
    """Up to the last turn of a user."""
    if not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise _no_question(where, messages)
    last = max((index for index, message in enumerate(messages) if message["role"] != "assistant"), default=None)
    if last is None:
        raise ConfigError(f"{where} has no user's turn.", remedy="Remove it.")
    return list(messages[: last + 1])


def _no_question(where: str, row: Any) -> ConfigError:
    return ConfigError(
        f"{where} is {describe(row)}.", remedy="Expected a text, or an object with prompt, messages or conversations."
    )
