"""What a student is to lessen: how far its distributions are from its teacher's, and how it predicts the text.

In: logits of both and the tokens that follow. Out: sums over the rows. Must never know: models, how it is lessened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor
from torch.nn import functional

from amalgam.errors import ConfigError

Direction = Literal["forward", "reverse"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


class Losses(NamedTuple):
    """Sums over rows, in nats; the divergence is T² KL."""

    total_loss: Tensor
    distill_loss: Tensor
    task_loss: Tensor


@dataclass(frozen=True)
class DistillationLoss:
    """`alpha × T² × KL + (1 - alpha) × cross-entropy` (Hinton et al. 2015).

    Attributes:
        temperature: T, by which the logits of both are divided before the softmax of the divergence. T² keeps its
            gradients as large as those of the cross-entropy.
        alpha: 1: the teacher alone; 0: the text alone.
        direction: of the divergence. forward: KL(teacher ‖ student), the student covers all that the teacher would say.
            reverse: KL(student ‖ teacher), it keeps to what the teacher finds likely (Gu et al. 2024).

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    alpha: float = 1.0
    direction: Direction = "forward"

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= 100:
            raise ConfigError(f"temperature is {self.temperature}.", remedy="Allowed: above 0, at most 100.")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}.", remedy="Allowed: from 0 to 1.")
        if self.direction not in DIRECTIONS:
            raise ConfigError(f"direction is {self.direction!r}.", remedy=f"Allowed: {', '.join(DIRECTIONS)}.")

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Losses:
        """
        Args:
            student_logits, teacher_logits: float32 `[rows, vocabulary]`; None: the text alone counts.
            labels: int64 `[rows]`, the tokens that follow.
        """
        task = functional.cross_entropy(student_logits, labels, reduction="sum")
        if teacher_logits is None:
            assert not self.needs_teacher
            return Losses(task, task.new_zeros(()), task)
        square = self.temperature**2
        student = (student_logits / self.temperature).log_softmax(-1)
        teacher = (teacher_logits / self.temperature).log_softmax(-1)
        first, second = (teacher, student) if self.direction == "forward" else (student, teacher)
        distill = square * functional.kl_div(second, first, reduction="sum", log_target=True)
        return Losses(self.alpha * distill + (1 - self.alpha) * task, distill, task)
