"""The one generic decoder: a spec and a weight version make a program, which turns a step's token ids into logits.

    token ids ─ embedding ─┬────────────────┬+──┬──────────┬+── … ── norm ─ hidden ─ head ─ logits
                           └ norm ─ attention┘  └ norm ─ mlp┘
                             (one layer; the blocks are chosen by ModelSpec.layers)

Must never know: requests, files, plans.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from amalgam.kernels.backends import Backend, Compiled, choose_backend
from amalgam.kernels.program import Add, Embed, Emitter, Head, Instruction, Program, Rows
from amalgam.kernels.step import StepContext
from amalgam.models.rope import Rope
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion


class Decoder:
    """Runs steps of any weight version of one model. One thread runs steps; any thread may compile.

    Args:
        choose: who runs the programs.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        choose: Callable[[torch.dtype, torch.device], Backend] = choose_backend,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.ropes = ropes_of(spec)
        self.tables = [rope.tables(max_positions, device) for rope in self.ropes]
        self.backend = choose(dtype, device)
        self._compiled: WeakKeyDictionary[WeightVersion, Compiled] = WeakKeyDictionary()

    def compile(self, weights: WeightVersion) -> Compiled:
        """Make a version ready to run. To be called before it goes live: that takes longer than a step."""
        compiled = self._compiled.get(weights)
        if compiled is None:
            compiled = self.backend.compile(emit(self.spec, weights, self.ropes), self.tables)
            self._compiled[weights] = compiled
        return compiled

    def forward(self, context: StepContext, weights: WeightVersion) -> Tensor:
        """Run one step: float32 logits `[rows, vocabulary]` of the rows that it wants, good until the next step.

        Writes the tokens' keys and values to the cache and shows the routing to the observer.
        """
        return self.compile(weights).run(context)


def ropes_of(spec: ModelSpec) -> tuple[Rope, ...]:
    """The different rotations of a model, in order of use."""
    ropes = (layer.attention.rope for layer in spec.layers)
    return tuple(dict.fromkeys(rope for rope in ropes if rope is not None))


def emit(spec: ModelSpec, weights: WeightVersion, ropes: tuple[Rope, ...]) -> Program:
    """A model with one weight version as a program.

    Args:
        ropes: in the order of the tables that the program will be run with.
    """
    step, norm, outside = Emitter(ropes), spec.norm, weights.block("")
    x, normed = step.rows("x", spec.hidden_size), step.rows("normed", spec.hidden_size)
    step.add(Embed(weights["embedding"], x))
    if spec.has_position_embedding:
        step.add(Embed(weights["positions"], x, by_position=True, adds=True))
    norm.emit(step, x, normed, outside, "layers.0.attention_norm")
    for layer_id in range(spec.num_layers):
        delta = _emit_blocks(spec, layer_id, step, weights, x, normed)
        is_last = layer_id + 1 == spec.num_layers
        norm.emit(step, x, normed, outside, "norm" if is_last else f"layers.{layer_id + 1}.attention_norm", delta)
    step.add(Head(normed, weights["embedding" if spec.has_tied_head else "head"], outside.vector("head_bias")))
    return step.finish()


def emit_layer(
    spec: ModelSpec, layer_id: int, weights: WeightVersion, ropes: tuple[Rope, ...]
) -> tuple[tuple[Instruction, ...], Rows]:
    """One layer alone, and where its instructions find the hidden states and leave what they make of them.

    Args:
        weights: of the layer, others are not asked for.
        ropes: as in `emit`.
    """
    step = Emitter(ropes)
    x, normed = step.rows("x", spec.hidden_size), step.rows("normed", spec.hidden_size)
    spec.norm.emit(step, x, normed, weights.block(""), f"layers.{layer_id}.attention_norm")
    step.add(Add(x, _emit_blocks(spec, layer_id, step, weights, x, normed)))
    return step.instructions, x


def _emit_blocks(spec: ModelSpec, layer_id: int, step: Emitter, weights: WeightVersion, x: Rows, normed: Rows) -> Rows:
    """A layer from its normed input to the result of its MLP, which is still to be added to `x`."""
    step.layer_id, layer, prefix = layer_id, spec.layers[layer_id], f"layers.{layer_id}"
    delta = layer.attention.emit(step, normed, weights.block(f"{prefix}.attention"))
    spec.norm.emit(step, x, normed, weights.block(""), f"{prefix}.mlp_norm", delta)
    return layer.mlp.emit(step, normed, weights.block(f"{prefix}.mlp"))
