"""Which single weights become zero.

In: a layer's weights, what they are given. Out: the same weights with zeros. Must never know: files.

Criteria, the least of which become zero:

    wanda      |weight| × the norm of its input over the texts, compared within a row (Sun et al. 2024, "A Simple and
               Effective Pruning Approach for Large Language Models")
    magnitude  |weight|, compared within the matrix

With a pattern n:m both compare within m neighbours along the inputs. What no token reached goes by magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from amalgam.calibration.inputs import Inputs
from amalgam.calibration.stream import Stream
from amalgam.errors import ConfigError
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.models.spec import ModelSpec
from amalgam.pruning.amounts import Sparsity

WeightCriterion = Literal["wanda", "magnitude"]
WEIGHT_CRITERIA: tuple[WeightCriterion, ...] = get_args(WeightCriterion)


def check_pattern(spec: ModelSpec, sparsity: Sparsity) -> None:
    """
    Raises:
        ConfigError: a weight's inputs are not a multiple of the pattern's length.
    """
    if sparsity.pattern is None:
        return
    _, length = sparsity.pattern
    for slot in spec.slots:
        if slot.is_linear and slot.role != "head" and slot.shape[1] % length:
            raise ConfigError(
                f"{slot.name} has {slot.shape[1]} inputs, no multiple of the {length} of {sparsity.text}.",
                remedy="Choose another pattern, or a share.",
            )


def with_zeros(weight: Tensor, sparsity: Sparsity, norms: Tensor | None = None) -> Tensor:
    """A matrix `[out, in]` with zeros, in its type.

    Args:
        norms: of the inputs, `[in]`; None: by magnitude.
    """
    score = weight.float().abs()
    if norms is not None:
        score = score * norms.to(score)
    if sparsity.pattern is not None:
        kept, length = sparsity.pattern
        groups = score.unflatten(1, (-1, length))
        lowest = groups.sort(dim=-1, stable=True).indices[..., : length - kept]
        is_zero = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, lowest, True).flatten(1)
    elif norms is not None:
        lowest = score.sort(dim=1, stable=True).indices[:, : round(sparsity.share * score.shape[1])]
        is_zero = torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)
    else:
        lowest = score.flatten().sort(stable=True).indices[: round(sparsity.share * math.prod(score.shape))]
        is_zero = torch.zeros(score.numel(), dtype=torch.bool).scatter_(0, lowest, True).view(score.shape)
    return weight.masked_fill(is_zero, 0.0)


def sparse_layer(
    spec: ModelSpec,
    layer_id: int,
    weights: Mapping[str, PackedWeight],
    sparsity: Sparsity,
    stream: Stream | None,
    on_done: Callable[[str], None] = lambda slot: None,
) -> dict[str, Tensor]:
    """A layer's linear weights with zeros, by slot; a stream goes on behind the layer.

    What later weights of the layer are given has then passed through the earlier ones' zeros.

    Args:
        stream: None: by magnitude.

    Raises:
        CheckpointError: inputs that are not finite.
    """
    slots = [slot.name for slot in spec.slots if slot.name in weights and slot.is_linear]
    found: dict[str, Tensor] = {}

    def see(inputs: Inputs) -> Mapping[str, PackedWeight]:
        norms = inputs.mean_square.sqrt() if inputs.num_tokens else None
        for slot in inputs.slots:
            found[slot] = with_zeros(weights[slot].dense, sparsity, norms)
            on_done(slot)
        return {slot: dense(found[slot]) for slot in inputs.slots}

    if stream is not None:
        stream.run(layer_id, weights, see)
    for slot in slots:
        if slot not in found:
            found[slot] = with_zeros(weights[slot].dense, sparsity)
            on_done(slot)
    return found
