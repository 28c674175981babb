"""The one generic decoder: a spec and a weight version make a program, which turns a step's token ids into logits.

    token ids ─ embedding ─┬────────────────┬+──┬──────────┬+── … ── norm ─ hidden ─ head ─ logits
                           └ norm ─ attention┘  └ norm ─ mlp┘
                             (one layer; the blocks are chosen by ModelSpec.layers, where norms are by ModelSpec.norms)

Must never know: requests, files, plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from amalgam.kernels.backends import Backend, Compiled, Tables, choose_backend
from amalgam.kernels.backends.split.experts import Splitter
from amalgam.kernels.backends.split.traffic import Traffic
from amalgam.kernels.devices import torch_device
from amalgam.kernels.program import Add, Embed, Emitter, Head, Instruction, Program, Rows, Scale
from amalgam.kernels.step import Cache, StepContext
from amalgam.kernels.weights import PackedWeight
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
        self.max_positions = max_positions
        self.ropes = ropes_of(spec)
        self.backend = choose(dtype, device)
        self._splitter = Splitter(self.backend, lambda name: choose(dtype, torch_device(name)))
        self._compiled: WeakKeyDictionary[WeightVersion, Compiled] = WeakKeyDictionary()
        # Of versions that have learned some.
        self._tables: WeakKeyDictionary[PackedWeight, Tables] = WeakKeyDictionary()
        self._fixed: Tables | None = None

    def compile(self, weights: WeightVersion) -> Compiled:
        """Make a version ready to run. To be called before it goes live: that takes longer than a step."""
        compiled = self._compiled.get(weights)
        if compiled is None:
            program = self._splitter.split(emit(self.spec, weights, self.ropes))
            compiled = self.backend.compile(program, self.tables(weights))
            self._compiled[weights] = compiled
        return compiled

    def prepare(self, weights: WeightVersion, kv: Cache) -> None:
        """Let a version's first step over a cache take no longer than others. Any thread, before it goes live."""
        self.compile(weights).warm_up(kv)

    @property
    def traffic(self) -> Mapping[str, Traffic]:
        """What went to each other device that experts lie on, and came back."""
        return self._splitter.traffic

    def tables(self, weights: WeightVersion) -> Tables:
        """Of the rotations; versions that turn alike share them."""
        growth = weights["rope_growth"] if self.spec.rope_growth else None
        found = self._fixed if growth is None else self._tables.get(growth)
        if found is None:
            found = tables_of(self.ropes, self.max_positions, self.device, growth)
            if growth is None:
                self._fixed = found
            else:
                self._tables[growth] = found
        return found

    def forward(self, context: StepContext, weights: WeightVersion) -> Tensor:
        """Run one step: float32 logits `[rows, vocabulary]` of the rows that it wants, good until the next step.

        Writes the tokens' keys and values to the cache and shows the routing to the observer.
        """
        return self.compile(weights).run(context)


def ropes_of(spec: ModelSpec) -> tuple[Rope, ...]:
    """The different rotations of a model, in order of use."""
    ropes = (layer.attention.rope for layer in spec.layers)
    return tuple(dict.fromkeys(rope for rope in ropes if rope is not None))


def tables_of(
    ropes: tuple[Rope, ...], num_positions: int, device: torch.device, growth: PackedWeight | None
) -> list[tuple[Tensor, Tensor]]:
    """cos and sin of each rotation; growth: the weight of that name, if the model has it."""
    return [rope.tables(num_positions, device, None if growth is None else growth.dense) for rope in ropes]


def emit(spec: ModelSpec, weights: WeightVersion, ropes: tuple[Rope, ...]) -> Program:
    """A model with one weight version as a program.

    Args:
        ropes: in the order of the tables that the program will be run with.
    """
    step, outside = Emitter(ropes), weights.block("")
    x, normed = step.rows("x", spec.hidden_size), step.rows("normed", spec.hidden_size)
    step.add(*embed(spec, weights["embedding"], weights.get("positions"), x))
    if spec.layer_inputs is not None:
        spec.layer_inputs.emit_start(step, x, outside)
    delta: Rows | None = None
    for layer_id in range(spec.num_layers):
        delta = _emit_blocks(spec, layer_id, step, weights, x, delta)
    spec.norm.emit(step, x, normed, outside, "norm", delta)
    head, bias = weights["embedding" if spec.has_tied_head else "head"], outside.vector("head_bias")
    step.add(Head(normed, head, bias, spec.logits_scale, spec.logits_softcap))
    return step.finish()


def embed(spec: ModelSpec, embedding: PackedWeight, positions: PackedWeight | None, x: Rows) -> Iterator[Embed | Scale]:
    """What turns token ids into the hidden states before the first layer."""
    yield Embed(embedding, x)
    if spec.embedding_scale != 1.0:
        yield Scale(x, spec.embedding_scale, rounds_factor=spec.rounds_embedding_scale)
    if positions is not None:
        yield Embed(positions, x, by_position=True, adds=True)


def emit_layer(
    spec: ModelSpec, layer_id: int, weights: WeightVersion, ropes: tuple[Rope, ...]
) -> tuple[tuple[Instruction, ...], Rows]:
    """One layer alone, and where its instructions find the hidden states and leave what they make of them.

    Args:
        weights: of the layer, others are not asked for.
        ropes: as in `emit`.
    """
    step = Emitter(ropes)
    x = step.rows("x", spec.hidden_size)
    delta = _emit_blocks(spec, layer_id, step, weights, x, None)
    if delta is not None:
        step.add(Add(x, delta))
    return step.instructions, x


def _emit_blocks(
    spec: ModelSpec, layer_id: int, step: Emitter, weights: WeightVersion, x: Rows, delta: Rows | None
) -> Rows | None:
    """A layer from `x`, to which `delta` is added first, to the result of its MLP, which is still to be added; None
    where nothing is."""
    step.layer_id, layer, outside = layer_id, spec.layers[layer_id], weights.block("")
    for name, block in (("attention", layer.attention), ("mlp", layer.mlp)):
        slot = f"layers.{layer_id}.{name}"
        read = x
        if spec.norms.is_before:
            read = step.rows("normed", spec.hidden_size)
            spec.norm.emit(step, x, read, outside, f"{slot}_norm", delta)
        elif delta is not None:
            step.add(Add(x, delta))
        delta = block.emit(step, read, weights.block(slot))
        if spec.norms.is_behind:
            spec.norm.emit(step, delta, delta, outside, f"{slot}_post_norm")
        if spec.residual_scale != 1.0:
            step.add(Scale(delta, spec.residual_scale))
    assert delta is not None
    if spec.layer_inputs is None and not spec.has_layer_scalars:
        return delta
    step.add(Add(x, delta))
    if spec.layer_inputs is not None:
        step.add(Add(x, spec.layer_inputs.emit(step, x, weights.block(f"layers.{layer_id}.inputs"))))
    if spec.has_layer_scalars:
        step.add(Scale(x, float(outside[f"layers.{layer_id}.scalar"].dense)))
    return None
