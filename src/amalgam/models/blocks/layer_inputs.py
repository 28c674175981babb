"""Embeddings of the tokens for each layer (Gemma 3n and 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amalgam.kernels.program import Add, Embed, Emitter, Normalize, Project, Projection, Rows, Scale, SwiGlu
from amalgam.kernels.weights import GEGLU
from amalgam.models.spec import Slot
from amalgam.models.weights import BlockWeights

_BUFFER = "layer_inputs"


@dataclass(frozen=True)
class EmbeddedInputs:
    """Of each token `size` numbers for each layer: (an embedding of its own + a projection of the model's) / √2.

    A layer gates them by what it has computed: x += norm(project(gelu(gate(x)) × input)).
    """

    num_layers: int
    size: int
    vocab_size: int
    norm_eps: float

    @property
    def buffer(self) -> str:
        return _BUFFER

    @property
    def width(self) -> int:
        """Of a token's numbers for all layers."""
        return self.num_layers * self.size

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        width = self.width
        yield Slot("inputs_embedding", (self.vocab_size, width), "embedding")
        yield Slot("inputs_projection", (width, hidden_size), "router")  # small, outside of the layers: kept wide
        yield Slot("inputs_norm", (self.size,), "norm")

    def layer_slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("gate", (self.size, hidden_size), "mlp")
        yield Slot("projection", (hidden_size, self.size), "mlp")
        yield Slot("post_norm", (hidden_size,), "norm")

    def emit_start(self, step: Emitter, x: Rows, weights: BlockWeights) -> None:
        embedding, projection = weights["inputs_embedding"], weights["inputs_projection"]
        inputs, projected = step.rows(_BUFFER, self.width), step.rows("layer_inputs_projected", self.width)
        step.add(
            Embed(embedding, inputs),
            Scale(inputs, self.size**0.5, rounds_factor=True),
            Project(x, (Projection(projection, None, projected),)),
            Scale(projected, x.width**-0.5),
            Normalize(projected, weights["inputs_norm"].dense, projected, self.norm_eps, rounds_last=True),
            Add(inputs, projected),
            Scale(inputs, 2.0**-0.5),
        )

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        (gate,) = step.project(x, (weights["gate"], None, "layer_gate"))
        inputs = step.rows(_BUFFER, self.width).columns(step.layer_id * self.size, self.size)
        joined = step.rows("layer_joined", self.size)
        step.add(SwiGlu(gate, inputs, joined, GEGLU))
        (delta,) = step.project(joined, (weights["projection"], None, "delta"))
        step.add(Normalize(delta, weights["post_norm"].dense, delta, self.norm_eps, rounds_last=True))
        return delta
