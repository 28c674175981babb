"""Texts pass a model once: what each layer changes, what each expert is given and adds, how large each channel is.

In: a wide model, token ids. Out: a `Survey`. Must never know: what is chosen by it.

One layer's weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from amalgam.calibration.inputs import Inputs
from amalgam.calibration.stream import Stream
from amalgam.composition.progress import Progress
from amalgam.composition.wide import WideModel
from amalgam.errors import CheckpointError


@dataclass(eq=False)
class LayerExperts:
    """What the experts of one layer did; each float64 `[experts]`.

    Attributes:
        counts: tokens that each was sent.
        gate_mass: sum of their gate weights.
        norms: sum of the norms of what each added, gate weights included.
        together: `[experts, experts]`, sums of products of the router's probabilities.
    """

    counts: Tensor
    gate_mass: Tensor
    norms: Tensor
    together: Tensor

    @classmethod
    def nothing(cls, num_experts: int) -> LayerExperts:
        counts, gate_mass, norms = torch.zeros(3, num_experts, dtype=torch.float64)
        return cls(counts, gate_mass, norms, torch.zeros(num_experts, num_experts, dtype=torch.float64))

    def routed(self, scores: Tensor) -> None:
        """See `ExpertWatch`."""
        probabilities = scores.softmax(-1).double()
        self.together += probabilities.t() @ probabilities

    def added(self, expert_id: int, gates: Tensor, results: Tensor) -> None:
        """See `ExpertWatch`."""
        self.counts[expert_id] += len(gates)
        self.gate_mass[expert_id] += gates.double().sum()
        self.norms[expert_id] += results.norm(dim=1).double().sum()


@dataclass
class Survey:
    """What texts showed.

    Attributes:
        influence: of each layer, 1 - the mean cosine of a token's hidden state before it and behind it.
        experts: layer → its experts.
        channels: MLP (`layers.3.mlp.experts.5.`) → sums of squares of its channels, float64 `[channels]`.
    """

    num_tokens: int
    influence: list[float] = field(default_factory=list)
    experts: dict[int, LayerExperts] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)

    def see(self, inputs: Inputs) -> None:
        """What a layer's `down` is given are the channels of its MLP."""
        for slot in inputs.slots:
            mlp, _, part = slot.rpartition(".")
            if part == "down":
                self.channels[f"{mlp}."] = inputs.mean_square.double() * inputs.num_tokens


def survey(model: WideModel, token_ids: Sequence[Sequence[int]], progress: Progress | None = None) -> Survey:
    """
    Raises:
        CheckpointError: weights or hidden states hold NaN or infinity.
    """
    stream = Stream(model.spec, token_ids, model.outside())
    found = Survey(stream.num_tokens)
    for layer_id, layer in enumerate(model.spec.layers):
        if progress is not None:
            progress("Reading texts, layer", layer_id, model.spec.num_layers)
        if layer.mlp.num_experts:
            found.experts[layer_id] = LayerExperts.nothing(layer.mlp.num_experts)

        before = stream.hidden
        stream.run(layer_id, model.layer(layer_id), found.see, watch=found.experts.get(layer_id))
        found.influence.append(_influence(before, stream.hidden, layer_id))
    return found


def _influence(before: Sequence[Tensor], behind: Sequence[Tensor], layer_id: int) -> float:
    """Block influence (Men et al. 2024, "ShortGPT", eq. 1)."""
    cosines = torch.cat([functional.cosine_similarity(x, y, dim=1) for x, y in zip(before, behind, strict=True)])
    if not bool(cosines.isfinite().all()):
        raise CheckpointError(
            f"The hidden states behind layer {layer_id} hold NaN or infinity.",
            remedy="The model's weights are damaged, or a text leads it out of range: try other texts.",
        )
    return float(1 - cosines.mean())
