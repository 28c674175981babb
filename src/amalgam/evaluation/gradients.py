"""What the loss feels of each projection's output: inputs and gradients of every projection, layer by layer.

In: a model's weights, token ids. Out: `Seen` of every projection, from the last layer to the first. Must never know:
sources, formats, what is made of it.

Let z be the logits of a text and p = softmax(z). A small change Δ of a projection's output changes the next tokens'
distributions by a KL divergence of ½ E[(g · Δ)²], where g is the gradient of log p(y) with labels y drawn from p itself
(Amari 1998; Kunstner et al. 2019: these labels, and not the text's own, make it the Fisher matrix). So a few backward
passes tell what every rounding of every weight would do, and no further pass is needed for any of them.

Hidden states are kept between layers and one layer is computed again at a time, so that no more than one layer's
weights are expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from amalgam.calibration.frames import frame_of, in_chunks, linear
from amalgam.calibration.stream import Stream
from amalgam.errors import CheckpointError, UnsupportedError
from amalgam.kernels.backends import Tables
from amalgam.kernels.backends.reference.execution import execute
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.backends.reference.latent import attention_of, latent_query, normed_latent, shared_key
from amalgam.kernels.backends.reference.operators import changed_logits, gated
from amalgam.kernels.program import AttendLatent, Emitter, Instruction, Mix, Project
from amalgam.kernels.step import AttentionBatch, LayerCache
from amalgam.kernels.weights import PackedWeight
from amalgam.models.decoder import emit_layer, ropes_of, tables_of
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion

# The weights of a layer by slot, or with -1 those outside of the layers.
LoadLayer = Callable[[int], Mapping[str, PackedWeight]]
OUTSIDE = -1
_HEAD_ROWS = 256


@dataclass(frozen=True, eq=False)
class Seen:
    """One projection in some of the texts.

    Attributes:
        slot: `layers.0.attention.q`.
        inputs: float32 `[tokens, in]`, of an expert those tokens only that were sent to it.
        gradients: float32 `[draws, tokens, out]`, of the log-likelihood of labels drawn from the model.
        sequences: int64 `[tokens]`: which sequence each token is of.
        gate_mass: of an expert, the sum of its gate weights; else the number of tokens.
    """

    slot: str
    inputs: Tensor
    gradients: Tensor
    sequences: Tensor
    gate_mass: float


@dataclass
class _Recorder:
    """Runs a layer's instructions and keeps what its projections read and give."""

    names: Mapping[int, str]
    sequences: Tensor
    inputs: list[tuple[str, Tensor, Tensor, float]] = field(default_factory=list)  # slot, x, sequences, gate mass
    outputs: list[Tensor] = field(default_factory=list)

    def project(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, rows: Tensor, mass: float) -> Tensor:
        y = linear(x, weight, bias)
        name = self.names.get(id(weight))
        if name is not None and len(x):
            if not y.requires_grad:
                y.requires_grad_()
            self.inputs.append((name, x.detach(), self.sequences[rows], mass))
            self.outputs.append(y)
        return y

    def execute(self, one: Instruction, frame: Frame) -> None:
        if isinstance(one, Project):
            x = frame.get(one.x)
            rows = torch.arange(len(x))
            for projection in one.projections:
                wide = x.float() if one.widens else x
                frame.put(projection.out, self.project(wide, projection.weight, projection.bias, rows, float(len(x))))
        elif isinstance(one, Mix):
            self._mix(one, frame)
        elif isinstance(one, AttendLatent):
            self._attend_latent(one, frame)
        else:
            execute(one, frame)

    def _attend_latent(self, one: AttendLatent, frame: Frame) -> None:
        """With keys and values of every head, so that the projection to them has outputs to take gradients of."""
        latent = normed_latent(one, frame)
        rows = torch.arange(len(latent))
        wide = self.project(latent, one.expand, None, rows, float(len(latent))).unflatten(1, (one.num_heads, -1))
        key = torch.cat((wide[..., : one.nope_dim], shared_key(one, frame).expand(-1, one.num_heads, -1)), dim=-1)
        value = wide[..., one.nope_dim :]
        num_slots = len(frame.step.kv.layers[one.layer_id].keys)
        cache = LayerCache(*(part.new_zeros(num_slots, *part.shape[1:]) for part in (key, value)))
        frame.operators.write_kv(cache, key, value, frame.step.slot_ids)
        query = torch.cat(latent_query(one, frame), dim=-1)
        attended = frame.operators.paged_attention(query, cache, attention_of(one, frame), scale=one.scale)
        frame.put(one.out, attended.flatten(1))

    def _mix(self, one: Mix, frame: Frame) -> None:
        assert frame.routing is not None
        x, (expert_ids, gate_weights) = frame.get(one.x), frame.routing
        total = torch.zeros_like(x)
        for expert_id, expert in enumerate(one.experts.experts):
            rows, place = (expert_ids == expert_id).nonzero(as_tuple=True)
            if not len(rows):
                continue
            share = gate_weights[rows, place] if one.weighs else torch.ones(len(rows))
            mass = float(share.detach().sum())
            part = x[rows]
            gate = self.project(part, expert.gate, expert.gate_bias, rows, mass)
            up = self.project(part, expert.up, expert.up_bias, rows, mass)
            down = self.project(gated(gate, up, one.activation), expert.down, expert.down_bias, rows, mass)
            total = total.index_add(0, rows, down * share.unsqueeze(1))
        frame.put(one.out, total)


class Gradients:
    """Texts on their way through the model and back.

    Raises:
        UnsupportedError: layers read more than the stream.

    Args:
        load: gives a layer's weights; called twice for each layer.
        draws: backward passes, each with labels of its own.
        chunk_tokens: about how many tokens run together; only memory depends on it.

    Attributes:
        outside: the weights outside of the layers.
        head_inputs: `[tokens, hidden]` for each chunk, what the head reads; once `layers` has given the first.
        at_start: `[draws, tokens, hidden]` for each chunk, gradients at the first layer's start; once it has ended.
    """

    def __init__(
        self,
        spec: ModelSpec,
        token_ids: Sequence[Sequence[int]],
        load: LoadLayer,
        *,
        draws: int = 2,
        seed: int = 0,
        chunk_tokens: int = 2048,
        done: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        if spec.carried:
            raise UnsupportedError(
                f"Layers of {spec.family} share keys or inputs, through which gradients do not go here.",
                remedy="Name the precisions by rules, or let `amalgam fit` choose among whole checkpoints.",
            )
        self._spec = spec
        self._load = load
        self._draws = draws
        self._generator = torch.Generator().manual_seed(seed)
        self._ropes = ropes_of(spec)
        self._longest = max(map(len, token_ids))
        self._tables: Tables = []
        self._linear_slots = {slot.name for slot in spec.slots if slot.is_linear}
        self._chunks = in_chunks(token_ids, chunk_tokens)
        self._chunk_tokens = chunk_tokens
        self._done = done
        self.num_tokens = sum(map(len, token_ids))
        self.outside: Mapping[str, PackedWeight] = {}
        self.head_inputs: list[Tensor] = []
        self.at_start: list[Tensor] = []

    def layers(self) -> Iterator[tuple[int, Iterator[list[Seen]]]]:
        """Each layer, the last first, with what its projections see: a list for each chunk of the texts.

        The inner iterator has to be exhausted before the next layer is asked for.

        Raises:
            CheckpointError: hidden states hold NaN or infinity; names the layer.
        """
        outside = self.outside = self._load(OUTSIDE)
        self._tables = tables_of(self._ropes, self._longest, torch.device("cpu"), outside.get("rope_growth"))
        kept: list[tuple[list[Tensor], list[AttentionBatch | None]]] = []
        stream = self._stream(outside)
        for layer_id in range(self._spec.num_layers):
            kept.append((self._together(stream.hidden), stream.chosen))
            stream.run(layer_id, self._load(layer_id))
            for hidden in stream.hidden:
                if not bool(hidden.isfinite().all()):
                    raise CheckpointError(
                        f"The hidden states behind layer {layer_id} hold NaN or infinity.",
                        remedy="A weight of that layer is damaged.",
                    )
            self._done(self.num_tokens)
        upstream = [self._behind(hidden, outside) for hidden in self._together(stream.hidden)]
        del stream
        for layer_id in reversed(range(self._spec.num_layers)):
            yield layer_id, self._layer(layer_id, *kept.pop(), upstream)
        self.at_start = upstream

    def embedded(self, outside: Mapping[str, PackedWeight]) -> list[Tensor]:
        """`[tokens, hidden]` for each chunk: the first layer's start with other weights outside of the layers."""
        return self._together(self._stream(outside).hidden)

    def sequences(self) -> list[Tensor]:
        """int64 `[tokens]` for each chunk: which sequence each token is of."""
        found, first = [], 0
        for chunk in self._chunks:
            lengths = torch.tensor([len(ids) for ids in chunk])
            found.append(torch.arange(len(chunk)).repeat_interleave(lengths) + first)
            first += len(chunk)
        return found

    def _stream(self, outside: Mapping[str, PackedWeight]) -> Stream:
        token_ids = [ids for chunk in self._chunks for ids in chunk]
        return Stream(self._spec, token_ids, outside, chunk_tokens=self._chunk_tokens)

    def _together(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """One tensor for each of our chunks."""
        rows = torch.cat(list(hidden))
        return list(rows.split([sum(map(len, chunk)) for chunk in self._chunks]))

    def _behind(self, hidden: Tensor, outside: Mapping[str, PackedWeight]) -> Tensor:
        """`[draws, tokens, hidden]`: the gradient at the last layer's end."""
        spec = self._spec
        version = WeightVersion(1, outside, {}, {})
        step = Emitter(self._ropes)
        x, normed = step.rows("x", spec.hidden_size), step.rows("normed", spec.hidden_size)
        spec.norm.emit(step, x, normed, version.block(""), "norm")
        frame = frame_of(spec, [], 0, self._tables)
        start = hidden.clone().requires_grad_()
        with torch.enable_grad():
            frame.put(x, start)
            for instruction in step.instructions:
                execute(instruction, frame)
            result = frame.get(normed)
        self.head_inputs.append(result.detach())
        head = outside["embedding" if spec.has_tied_head else "head"].dequantize(torch.float32)
        bias = version.block("").vector("head_bias")
        slopes = torch.empty((self._draws, *hidden.shape))
        for first in range(0, len(hidden), _HEAD_ROWS):
            rows = slice(first, first + _HEAD_ROWS)
            logits = functional.linear(result.detach()[rows], head, None if bias is None else bias.float())
            logits = changed_logits(logits, spec.logits_scale, spec.logits_softcap)
            growth = torch.full_like(logits, spec.logits_scale)  # of a logit with the product that it is made of
            if spec.logits_softcap is not None:
                growth *= 1.0 - (logits / spec.logits_softcap) ** 2
            p = logits.softmax(-1)
            labels = torch.multinomial(p, self._draws, replacement=True, generator=self._generator)
            mean = (p * growth) @ head
            for draw in range(self._draws):
                label = labels[:, draw]
                slopes[draw, rows] = head[label] * growth.gather(1, label.unsqueeze(1)) - mean
        found = [torch.autograd.grad(result, start, slope, retain_graph=True)[0] for slope in slopes]
        return torch.stack(found)

    def _layer(
        self, layer_id: int, hidden: list[Tensor], chosen: list[AttentionBatch | None], upstream: list[Tensor]
    ) -> Iterator[list[Seen]]:
        weights = self._load(layer_id)
        version = WeightVersion(1, weights, {}, {})
        names = {id(weight): slot for slot, weight in weights.items() if slot in self._linear_slots}
        program, x = emit_layer(self._spec, layer_id, version, self._ropes)
        first_sequence = 0
        for index, sequences in enumerate(self._chunks):
            lengths = torch.tensor([len(ids) for ids in sequences])
            numbers = torch.arange(len(sequences)).repeat_interleave(lengths) + first_sequence
            first_sequence += len(sequences)
            recorder = _Recorder(names, numbers)
            start = hidden[index].clone().requires_grad_()
            with torch.enable_grad():
                frame = frame_of(self._spec, sequences, layer_id, self._tables)
                frame.put(x, start)
                frame.chosen = chosen[index]
                for instruction in program:
                    recorder.execute(instruction, frame)
                end = frame.get(x)
            slopes, below = [], []
            for gradient in upstream[index]:
                below_, *own = torch.autograd.grad(
                    end, [start, *recorder.outputs], gradient, retain_graph=True, allow_unused=True
                )
                below.append(below_)
                slopes.append(own)
            upstream[index] = torch.stack(below)
            self._done(sum(map(len, sequences)))
            yield [
                Seen(slot, inputs, torch.stack([own[number] for own in slopes]), rows, mass)
                for number, (slot, inputs, rows, mass) in enumerate(recorder.inputs)
            ]
