"""Tokens drawn in Triton, interpreted, are those that the engine's sampler draws on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from amalgam.engine.params import SamplingParams
from amalgam.engine.sampler import choose

pytest.importorskip("triton")

from amalgam.kernels.backends.triton import sampling

VOCABULARY = 100


def expected(logits: Tensor, top_k: int, temperature: float, top_p: float, min_p: float, u: float) -> int:
    """As the sampler does it for one row."""
    if not temperature:
        return int(logits.argmax())
    scores = logits.numpy()
    bound = np.sort(scores)[-top_k] if 0 < top_k < len(scores) else -np.inf
    candidates = np.flatnonzero(scores >= bound)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return int(candidates[choose(scores[candidates].astype(np.float64), params, u)])


def test_as_the_host_draws() -> None:
    rows = [
        (0, 1.0, 1.0, 0.0),
        (5, 0.7, 1.0, 0.0),
        (0, 1.3, 0.8, 0.0),
        (0, 1.0, 1.0, 0.05),
        (40, 2.0, 0.9, 0.02),
        (VOCABULARY + 7, 1.0, 0.3, 0.0),
        (1, 1.0, 1.0, 0.0),
        (0, 1e-6, 0.5, 0.0),
        (0, 0.0, 1.0, 0.0),
    ]
    numbers = (0.3, 1.0 - 2.0**-53, 0.0)
    parameters = [(*row, numbers[index % 3]) for index, row in enumerate(rows)]
    logits = 3 * torch.randn(len(parameters), VOCABULARY)
    logits[::2] = logits[::2].round().clamp(max=5.0)  # many are equal
    assert sampling.supports(logits)
    assert sampling.draw(logits, parameters) == [
        expected(row, *some) for row, some in zip(logits, parameters, strict=True)
    ]


def test_extremes() -> None:
    """A temperature that float32 does not have, huge logits, and the smallest top_p, where all are equally likely."""
    logits = torch.randn(3, 70)
    logits[1] *= 1e30
    logits[2] = 7.25
    logits[0, [5, 60]] = 9.0  # of equal ones u chooses, where the first would be taken without a temperature
    rows = [(0, 1e-300, 1.0, 0.0, 0.9), (0, 1.0, 0.9, 0.1, 0.9), (0, 1.0, 1e-300, 0.0, 0.2)]
    assert sampling.draw(logits, rows) == [expected(row, *some) for row, some in zip(logits, rows, strict=True)]


def test_of_equal_logits_the_first_is_taken_and_none_where_one_is_not_finite() -> None:
    logits = torch.zeros(5, 70)
    logits[0, [9, 3, 60]] = 2.0
    logits[1, 69], logits[2, 4], logits[3, 0] = torch.nan, torch.inf, -torch.inf
    rows = [(0, 0.0, 1.0, 0.0, 0.5)] * 4 + [(0, 1.0, 0.5, 0.0, 0.0)]
    # Of equal weights those with smaller ids go first.
    assert sampling.draw(logits, rows) == [3, -1, -1, -1, 35]
