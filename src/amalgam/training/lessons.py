"""What a student reads, and in which order.

In: windows of texts, answers that a teacher wrote to prompts. Out: lessons, which are windows as well, and batches of
them without end, the same for one seed at every run. Must never know: models, losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from amalgam.base.strict_json import parse_json
from amalgam.errors import ConfigError
from amalgam.evaluation.texts import Window
from amalgam.text.tokenizer import Tokenizer

_EPOCHS_OF_SEED = 1_000_003  # so that no epoch of another seed has the same order


def read_answers(file: Path, tokenizer: Tokenizer, window: int) -> list[Window]:
    """Answers with their prompts, of which only the answers count: JSONL as `amalgam generate --output` writes it.

    An answer that ended by itself is followed by the token that ends texts. Lines with an error, and prompts that leave
    no room for an answer, give no lesson.

    Args:
        window: most tokens of a lesson; longer answers are cut.

    Raises:
        ConfigError: it cannot be read, or holds no answer.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror or error}).", remedy="Give a file.") from None
    found: list[Window] = []
    for number, line in enumerate(lines, 1):
        try:
            answer = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"Line {number} of {file} is not valid JSON: {error}.") from None
        prompt, text = (answer.get(key) if isinstance(answer, dict) else None for key in ("prompt", "generated_text"))
        if not isinstance(prompt, str) or not isinstance(text, str):
            if isinstance(answer, dict) and answer.get("error") is not None:
                continue
            raise ConfigError(
                f"Line {number} of {file} has no prompt with a generated_text.",
                remedy="Expected what `amalgam generate --input PROMPTS --output ANSWERS` writes of prompts.",
            )
        before = tokenizer.encode(prompt)
        after = [id_ for piece in tokenizer.encode_by_piece(text, add_special_tokens=False) for id_ in piece]
        if answer.get("finish_reason") == "stop" and tokenizer.eos_token_ids:
            after.append(min(tokenizer.eos_token_ids))
        token_ids = (*before, *after)[:window]
        if before and len(token_ids) > len(before):
            found.append(Window("", len(found), token_ids, 0.0, len(before)))
    if not found:
        raise ConfigError(f"{file} holds no answer that a student could learn from.", remedy="Give other prompts.")
    return found


def batches(lessons: Sequence[Window], num_tokens: int, seed: int) -> Iterator[list[Window]]:
    """Batches of about so many tokens, without end: all lessons in an order that is drawn, then all in another one."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * _EPOCHS_OF_SEED + epoch)
        order = torch.randperm(len(lessons), generator=generator).tolist()
        yield from parts_of([lessons[index] for index in order], num_tokens)
        epoch += 1


def parts_of(lessons: Sequence[Window], num_tokens: int) -> Iterator[list[Window]]:
    """Lessons in order, as many together as have `num_tokens` tokens; a longer one alone."""
    part: list[Window] = []
    room = num_tokens
    for lesson in lessons:
        if part and room < len(lesson.token_ids):
            yield part
            part, room = [], num_tokens
        part.append(lesson)
        room -= len(lesson.token_ids)
    yield part
