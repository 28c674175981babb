"""Training, step by step: a student, its teacher, what both read; a curve, and the student as it was when it did best.

In: a student, a teacher, lessons. Out: `Outcome`. Must never know: files but those that it goes on from, plans.

The same lessons in the same order on the same machine give the same numbers to the bit, also behind a kill: order and
learning rate follow from the step, and what the optimizer remembers is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from amalgam.composition.progress import Progress
from amalgam.errors import ConfigError
from amalgam.evaluation.quality import scored
from amalgam.evaluation.running import Contestant, rows_at_once
from amalgam.evaluation.texts import Window
from amalgam.training.adam import Adam
from amalgam.training.lessons import batches, parts_of
from amalgam.training.losses import DistillationLoss, Losses
from amalgam.training.state import TrainingState, is_begun, load_state, save_state
from amalgam.training.student import Expanded, Student

_LAST_RATE = 0.1  # of the learning rate, at the end
_PLAIN = DistillationLoss()  # what held-out text is measured with


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast.

    Attributes:
        steps: at most.
        batch_tokens: of one step, about; `part_tokens` of them go through the student at once, which only memory feels.
        learning_rate: the largest: it grows over the first `warmup` of the steps and falls as a cosine to a tenth. As a
            share of a weight's values that a step may change them by; see `training.weights`.
        max_norm: of the gradient of all parameters together; a longer one is shortened.
        eval_every: steps from one look at held-out text to the next.
        patience: training ends behind so many looks that found nothing better; 0: never before the last step.
        save_every: steps that a kill may cost.
        seed: of the lessons' order and of low-rank updates.
    """

    steps: int = 200
    batch_tokens: int = 2048
    part_tokens: int = 2048
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_norm: float = 1.0
    eval_every: int = 20
    patience: int = 5
    save_every: int = 20
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        share = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass(frozen=True)
class Point:
    """What a step found on its batch, in nats a token, before it changed anything."""

    step: int
    total_loss: float
    distill_loss: float
    task_loss: float
    learning_rate: float


@dataclass(frozen=True)
class Look:
    """The student on held-out text behind so many steps.

    Attributes:
        divergence: KL(teacher ‖ student), nats a token.
        loss: cross-entropy of the text, nats a token.
    """

    step: int
    divergence: float
    loss: float


@dataclass(frozen=True)
class Outcome:
    """What came of training.

    Attributes:
        num_tokens: that were read, in all runs together.
        num_resumed: steps of earlier runs.
        best_step: where held-out text found the least divergence; of a student that learns from the text alone, loss.
        is_stopped: it found nothing better any more.
    """

    curve: Sequence[Point]
    looks: Sequence[Look]
    best_step: int
    num_tokens: int
    num_resumed: int
    is_stopped: bool
    seconds: float


class Teacher:
    """A plan at work, whose logits are learned from."""

    def __init__(self, contestant: Contestant) -> None:
        self._contestant = contestant
        self.vocab_size = contestant.loader.spec.vocab_size

    def hidden(self, lessons: Sequence[Window]) -> Tensor:
        """`[tokens, hidden]` of lessons one after the other.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        return torch.cat([hidden for _, hidden in self._contestant.hidden(lessons)])

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 `[rows, vocabulary]`."""
        with torch.inference_mode():
            found = self._contestant.compiled.head(hidden.contiguous())
        return found.clone()  # which autograd may keep, and the next call does not write over


@dataclass
class _Progress:
    """Where training is; all of it is saved.

    Attributes:
        goal: what of a look says that the student does best.
    """

    goal: Literal["divergence", "loss"]
    step: int = 0
    num_tokens: int = 0
    curve: list[Point] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)

    @property
    def best(self) -> Look:
        return min(self.looks, key=attrgetter(self.goal))

    def notes(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, notes: dict[str, Any]) -> _Progress:
        curve = [Point(**point) for point in notes["curve"]]
        looks = [Look(**look) for look in notes["looks"]]
        return cls(notes["goal"], notes["step"], notes["num_tokens"], curve, looks)

    def is_stopped(self, patience: int) -> bool:
        return 0 < patience <= len(self.looks) - 1 - self.looks.index(self.best) if self.looks else False


class DistillationTrainer:
    """Trains a student.

    Args:
        teacher: of the same vocabulary.
        held_out: lessons that nothing is learned from.
        on_look: is told each look at held-out text.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        loss: DistillationLoss,
        options: TrainingOptions,
        held_out: Sequence[Window],
        on_look: Callable[[Look], None] = lambda look: None,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._loss = loss
        self._options = options
        self._held_out = held_out
        self._on_look = on_look
        self._kept: list[Tensor] = []  # what the teacher makes of held-out lessons
        self._at_once = rows_at_once(student.spec.vocab_size)
        self._adam = Adam(student.parameters, options.weight_decay)

    def train(
        self, lessons: Sequence[Window], folder: Path, identity: dict[str, Any], progress: Progress | None = None
    ) -> Outcome:
        """All steps, or those that an earlier run has left; the student is then as it was when it did best.

        Args:
            folder: where the state is kept.
            identity: what else the run depends on, JSON values.

        Raises:
            ConfigError: the loss is NaN or infinite.
            CheckpointError: the teacher's hidden states are; there is no room for the state, or it is damaged.
            ConflictError: the folder holds another run.
        """
        started = time.monotonic()
        identity = {**identity, "loss": asdict(self._loss), "training": asdict(self._options)}
        at, best = self._begin(folder, identity)
        num_resumed = at.step
        options = self._options
        order = islice(batches(lessons, options.batch_tokens, options.seed), at.step, None)
        while at.step < options.steps and not at.is_stopped(options.patience):
            batch = next(order)
            at.curve.append(self.train_step(batch, at.step))
            at.step += 1
            at.num_tokens += sum(len(lesson.token_ids) for lesson in batch)
            if progress is not None:
                progress("Training", at.step, options.steps)
            is_last = at.step == options.steps
            if is_last or at.step % options.eval_every == 0:
                best = self._look(at, best)
            if is_last or at.step % options.save_every == 0 or at.is_stopped(options.patience):
                self._save(folder, identity, at, best)
        for name, parameter in self._student.parameters.items():
            parameter.data.copy_(best[name])
        return Outcome(
            tuple(at.curve),
            tuple(at.looks),
            at.best.step,
            at.num_tokens,
            num_resumed,
            at.is_stopped(options.patience),
            time.monotonic() - started,
        )

    def train_step(self, batch: Sequence[Window], step: int) -> Point:
        """One change of the parameters.

        Raises:
            ConfigError: the loss or its gradient is NaN or infinite; nothing has been changed.
        """
        self._adam.forget_gradients()
        weights = self._student.expanded()
        num_rows = sum(lesson.num_rows for lesson in batch)
        sums = torch.zeros(3, dtype=torch.float64)
        for part in parts_of(batch, self._options.part_tokens):
            hidden = self._student.hidden(weights, [lesson.token_ids for lesson in part])
            taught = self._teacher.hidden(part) if self._loss.needs_teacher else None
            leaf = hidden.detach().requires_grad_()
            for found in self._losses(self._loss, weights, leaf, taught, part):
                (found.total_loss / num_rows).backward()
                sums += torch.tensor([float(value.detach()) for value in found], dtype=torch.float64)
            if hidden.requires_grad:  # it does not where the head alone learns
                hidden.backward(leaf.grad)
        weights.backward()
        norm = self._adam.shorten_gradients(self._options.max_norm)
        total, distill, task = (sums / num_rows).tolist()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise ConfigError(
                f"The loss is {total} and its gradient {norm} at step {step + 1}.",
                remedy=f"Choose a learning rate below {self._options.learning_rate:g}, and look for damaged weights.",
            )
        rate = self._options.rate(step)
        self._adam.step(rate)
        return Point(step, total, distill, task, rate)

    @torch.no_grad()
    def look(self, step: int) -> Look:
        """The student on the held-out lessons."""
        weights = self._student.fixed()
        parts = list(parts_of(self._held_out, self._options.part_tokens))
        if not self._kept:
            self._kept = [self._teacher.hidden(part) for part in parts]
        sums = torch.zeros(3, dtype=torch.float64)
        for part, taught in zip(parts, self._kept, strict=True):
            hidden = self._student.hidden(weights, [lesson.token_ids for lesson in part])
            for found in self._losses(_PLAIN, weights, hidden, taught, part):
                sums += torch.tensor([float(value) for value in found], dtype=torch.float64)
        _, divergence, loss = (sums / sum(lesson.num_rows for lesson in self._held_out)).tolist()
        return Look(step, divergence, loss)

    def _losses(
        self, loss: DistillationLoss, weights: Expanded, hidden: Tensor, taught: Tensor | None, part: Sequence[Window]
    ) -> Iterator[Losses]:
        """Of some rows at a time, so that logits of few are in memory."""
        rows, labels = scored(part)
        for some, wanted in zip(rows.split(self._at_once), labels.split(self._at_once), strict=True):
            logits = self._student.logits(weights, hidden[some.to(hidden.device)])
            teacher = None if taught is None else self._teacher.logits(taught[some.to(taught.device)])
            yield loss(logits, teacher, wanted.to(logits.device))

    def _begin(self, folder: Path, identity: dict[str, Any]) -> tuple[_Progress, dict[str, Tensor]]:
        if not is_begun(folder):
            at = _Progress("divergence" if self._loss.needs_teacher else "loss")
            return at, self._look(at, {})
        state = load_state(folder, identity)
        for name, parameter in self._student.parameters.items():
            parameter.data.copy_(state.parameters[name])
        self._adam.restore(state.first, state.second, state.notes["counts"])
        return _Progress.of(dict(state.notes)), dict(state.best)

    def _look(self, at: _Progress, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """Note what held-out text says now; returns the best parameters so far.

        Raises:
            ConfigError: the divergence is NaN or infinite.
        """
        found = self.look(at.step)
        if not math.isfinite(found.divergence):
            raise ConfigError(
                f"The divergence on held-out text is {found.divergence} at step {at.step}.",
                remedy=f"Choose a learning rate below {self._options.learning_rate:g}, and look for damaged weights.",
            )
        at.looks.append(found)
        self._on_look(found)
        if at.best is not found:
            return best
        return {name: parameter.detach().clone() for name, parameter in self._student.parameters.items()}

    def _save(self, folder: Path, identity: dict[str, Any], at: _Progress, best: dict[str, Tensor]) -> None:
        adam, notes = self._adam, {**at.notes(), "counts": self._adam.counts}
        state = TrainingState(self._student.parameters, best, adam.first, adam.second, notes)
        save_state(folder, identity, state)
