"""The loss, against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch

from amalgam.errors import ConfigError
from amalgam.training.losses import DistillationLoss
from tests.errors import raises

STUDENT = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]])
TEACHER = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.5]])
LABELS = torch.tensor([2, 0])


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(first: list[float], second: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_it_is_the_papers_sum(temperature: float, direction: str) -> None:
    found = DistillationLoss(temperature, 0.7, direction)(STUDENT, TEACHER, LABELS)  # type: ignore[arg-type]
    distill = task = 0.0
    for student, teacher, label in zip(STUDENT.tolist(), TEACHER.tolist(), LABELS.tolist(), strict=True):
        pair = softmax(teacher, temperature), softmax(student, temperature)
        distill += temperature**2 * divergence(*(pair if direction == "forward" else pair[::-1]))
        task -= math.log(softmax(student, 1.0)[label])
    assert float(found.distill_loss) == pytest.approx(distill, rel=1e-5)
    assert float(found.task_loss) == pytest.approx(task, rel=1e-5)
    assert float(found.total_loss) == pytest.approx(0.7 * distill + 0.3 * task, rel=1e-5)


def test_a_hot_gradient_is_that_of_matching_logits() -> None:
    """For large T the gradient of T² KL is (z - v) / N, with both logits centred (Hinton et al. 2015, equation 4)."""
    student = STUDENT.clone().requires_grad_()
    DistillationLoss(100.0, 1.0)(student, TEACHER, LABELS).total_loss.backward()
    centred = [logits - logits.mean(1, keepdim=True) for logits in (STUDENT, TEACHER)]
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / 3, rtol=0.05, atol=0.01)


def test_the_text_alone_needs_no_teacher() -> None:
    loss = DistillationLoss(alpha=0.0)
    assert not loss.needs_teacher
    found = loss(STUDENT, None, LABELS)
    assert float(found.total_loss) == float(found.task_loss) and float(found.distill_loss) == 0


@pytest.mark.parametrize(
    ("values", "named"),
    [({"temperature": 0.0}, "0.0"), ({"alpha": 1.5}, "1.5"), ({"direction": "sideways"}, "sideways")],
)
def test_what_is_out_of_range_is_named(values: dict[str, object], named: str) -> None:
    with raises(ConfigError, named):
        DistillationLoss(**values)  # type: ignore[arg-type]
