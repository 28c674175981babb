"""What a student reads, of files of texts and of answers: lessons, and what is held out of them.

In: files, a tokenizer. Out: `Material`. Must never know: models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from amalgam.base.counting import counted
from amalgam.errors import ConfigError
from amalgam.evaluation.texts import DEFAULT_WINDOW, Sample, Window, read_texts, sample_of
from amalgam.text.tokenizer import Tokenizer
from amalgam.training.lessons import read_answers

HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class TextsToLearn:
    """Which files, and how much of them.

    Attributes:
        texts, answers: to learn from; of answers, those that a teacher wrote to prompts.
        held_out: files that say when to stop, and what was gained; empty: a fifth of the documents, not learned from.
        window: tokens of a text that are computed together.
        max_tokens: of the texts, as many of each; None: all.
        max_held_out: tokens of what is held out, which is read at every look.
    """

    texts: Sequence[str] = ()
    answers: Path | None = None
    held_out: Sequence[str] = ()
    window: int = DEFAULT_WINDOW
    max_tokens: int | None = None
    max_held_out: int = 8192
    seed: int = 0


@dataclass(frozen=True)
class Material:
    """What is learned from, and what is not."""

    lessons: Sequence[Window]
    held_out: Sample

    @property
    def digest(self) -> str:
        """Names all of the tokens."""
        tokens = [[(one.token_ids, one.first) for one in part] for part in (self.lessons, self.held_out.windows)]
        own = hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]
        return f"{own}-{self.held_out.digest}"

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(lesson.token_ids) for lesson in (*self.lessons, *self.held_out.windows))


def read_material(files: TextsToLearn, tokenizer: Tokenizer, max_positions: int) -> Material:
    """
    Raises:
        ConfigError: files that cannot be read or hold too little, or none; a window longer than `max_positions`.
    """
    if files.window > max_positions:
        raise ConfigError(
            f"The window is {files.window} tokens, and the models have {max_positions} positions.",
            remedy="Choose a smaller one.",
        )
    if not files.texts and files.answers is None:
        raise ConfigError("Nothing is given to learn from.", remedy="Give --text FILE or --prompts FILE.")
    texts = _sample(files.texts, files, tokenizer, files.max_tokens) if files.texts else None
    answers = [] if files.answers is None else read_answers(files.answers, tokenizer, files.window)
    if files.held_out:
        held_out = _sample(files.held_out, files, tokenizer, files.max_held_out)
    elif texts is not None:
        texts, held_out = texts.split(HELD_OUT_SHARE, files.seed)
    else:
        order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(files.seed)).tolist()
        count = round(HELD_OUT_SHARE * len(answers))
        held_out = Sample(tuple(answers[index] for index in order[:count]), "answers")
        answers = [answers[index] for index in order[count:]]
    lessons = [*([] if texts is None else texts.windows), *answers]
    if not lessons or not held_out.windows:
        raise ConfigError(
            f"There is text for {counted(len(lessons), 'window')} to learn from, and for "
            f"{len(held_out.windows)} to hold out.",
            remedy="Give more text, or text to hold out (--heldout).",
        )
    return Material(lessons, _some(held_out, files.max_held_out, files.seed))


def _sample(names: Sequence[str], files: TextsToLearn, tokenizer: Tokenizer, max_tokens: int | None) -> Sample:
    documents = read_texts(names)
    return sample_of(documents, tokenizer, window=files.window, max_tokens=max_tokens, seed=files.seed)


def _some(sample: Sample, max_tokens: int, seed: int) -> Sample:
    """Windows drawn from a sample, in its order; one at least."""
    order = torch.randperm(len(sample.windows), generator=torch.Generator().manual_seed(seed)).tolist()
    taken: set[int] = set()
    room = max_tokens
    for index in order:
        size = len(sample.windows[index].token_ids)
        if size <= room or not taken:
            taken.add(index)
            room -= size
    return Sample(tuple(window for index, window in enumerate(sample.windows) if index in taken), sample.unit)
