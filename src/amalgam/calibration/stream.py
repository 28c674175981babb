"""Texts on their way through a model, one layer after the other.

In: a model's spec, token ids, the weights of one layer at a time. Out: `Inputs` of every group of projections, in the
order in which they run; the hidden states behind each layer. Must never know: files, sources, what is done with inputs.

Only one layer's weights are needed at a time, so that a model larger than memory can be calibrated. What the
instructions mean is said by the reference backend; a product here is one call for all rows, since nobody compares bits
with a server's. Instructions of a layer run one after the other over all tokens, and experts one by one, so that a
caller holds the inputs of one group at a time and may replace its weights before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from amalgam.calibration.frames import frame_of, in_chunks, linear
from amalgam.calibration.inputs import Inputs
from amalgam.kernels.backends.reference.execution import execute
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.backends.reference.latent import normed_latent
from amalgam.kernels.backends.reference.operators import gated
from amalgam.kernels.program import AttendLatent, Emitter, Instruction, Mix, Project, Route, Rows, rows_of
from amalgam.kernels.step import AttentionBatch
from amalgam.kernels.weights import Expert, PackedWeight
from amalgam.models.decoder import embed, emit_layer, ropes_of, tables_of
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import BlockWeights, WeightVersion

# Sees the inputs of a group before they are used, and may give other weights for it, by slot.
See = Callable[[Inputs], Mapping[str, PackedWeight] | None]

_X = "x"


class ExpertWatch(Protocol):
    """Sees how a layer's tokens are sent to its experts, and what these make of them."""

    def routed(self, scores: Tensor) -> None:
        """The router's scores of some tokens, before any choice: float32 `[tokens, experts]`."""

    def added(self, expert_id: int, gates: Tensor, results: Tensor) -> None:
        """What an expert adds to the tokens that it was sent.

        Args:
            gates: `[tokens]`, their gate weights.
            results: `[tokens, hidden]`, gate weights included.
        """


class Stream:
    """Token ids on their way through the layers, as float32 hidden states.

    Args:
        outside: the weights that turn token ids into the first layer's hidden states, and into inputs of all layers.
        chunk_tokens: about how many tokens run together; only memory depends on it.
        min_expert_tokens: an expert that the router sends fewer tokens is shown, beside those, the tokens that come
            nearest to being sent to it. What it does for other tokens' results stays as it is.

    Attributes:
        hidden: float32 `[tokens, hidden]` for each chunk: before layer 0, later behind the last layer that has run.
        num_tokens: all of them.
        chosen: for each chunk, the positions that an indexer chose in the last layer that has one; see `Frame`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        token_ids: Sequence[Sequence[int]],
        outside: Mapping[str, PackedWeight],
        *,
        chunk_tokens: int = 4096,
        min_expert_tokens: int = 0,
    ) -> None:
        self._spec = spec
        self._min_expert_tokens = min_expert_tokens
        self._ropes = ropes_of(spec)
        longest = max(map(len, token_ids), default=0)
        self._tables = tables_of(self._ropes, longest, torch.device("cpu"), outside.get("rope_growth"))
        self._linear_slots = {slot.name for slot in spec.slots if slot.is_linear}
        self._chunks = in_chunks(token_ids, chunk_tokens)
        self.num_tokens = sum(map(len, token_ids))
        self.chosen: list[AttentionBatch | None] = [None] * len(self._chunks)
        x = Rows(_X, spec.hidden_size, 0, spec.hidden_size)
        step = Emitter(self._ropes)
        step.add(*embed(spec, outside["embedding"], outside.get("positions"), x))
        if spec.layer_inputs is not None:
            spec.layer_inputs.emit_start(step, x, BlockWeights(outside))
        self.hidden = []
        self._carried: list[dict[str, Tensor]] = []
        for sequences in self._chunks:
            frame = frame_of(spec, sequences, 0, self._tables)
            for instruction in step.instructions:
                execute(instruction, frame)
            self.hidden.append(frame.get(x))
            self._carried.append(frame.whole(spec.carried))

    @torch.no_grad()
    def run(
        self,
        layer_id: int,
        weights: Mapping[str, PackedWeight],
        see: See | None = None,
        *,
        watch: ExpertWatch | None = None,
        advances: bool = True,
    ) -> None:
        """Run one layer over all tokens.

        Args:
            weights: of the layer, by slot (`layers.3.attention.q`).
            see: is shown the inputs of each group of projections before they are used. The weights that it returns
                take the place of the group's from there on.
            watch: is shown the routing and the experts' results.
            advances: whether `hidden` becomes what the layer makes of it.

        Raises:
            CheckpointError: what `see` asks of inputs that are not finite.
        """
        version = WeightVersion(1, weights, {}, {})
        names = {id(weight): slot for slot, weight in weights.items() if slot in self._linear_slots}
        program, x = emit_layer(self._spec, layer_id, version, self._ropes)
        frames = [frame_of(self._spec, sequences, layer_id, self._tables) for sequences in self._chunks]
        for frame, hidden, chosen, carried in zip(frames, self.hidden, self.chosen, self._carried, strict=True):
            frame.put(x, hidden.clone())
            frame.chosen = chosen
            for buffer, rows in carried.items():
                frame.put(Rows(buffer, rows.shape[1], 0, rows.shape[1]), rows)
        kept = {x.buffer, *self._spec.carried}
        last_use = {rows.buffer: index for index, one in enumerate(program) for rows in rows_of(one)}
        layer = _Layer(names, see, self._min_expert_tokens, watch)
        for index, instruction in enumerate(program):
            layer.execute(instruction, frames)
            for buffer in [name for name, last in last_use.items() if last == index and name not in kept]:
                for frame in frames:
                    frame.forget(buffer)
        if advances:
            self.hidden = [frame.get(x) for frame in frames]
            self._carried = [frame.whole(self._spec.carried) for frame in frames]
            self.chosen = [frame.chosen for frame in frames]


class _Layer:
    """Runs a layer's instructions, one after the other over all frames, and shows what projections read."""

    def __init__(
        self, names: Mapping[int, str], see: See | None, min_expert_tokens: int, watch: ExpertWatch | None
    ) -> None:
        self._names = names
        self._see = see
        self._min_expert_tokens = min_expert_tokens
        self._watch = watch
        self._route: Route | None = None

    def execute(self, instruction: Instruction, frames: Sequence[Frame]) -> None:
        if isinstance(instruction, Mix):
            self._mix(instruction, frames)
            return
        if isinstance(instruction, Route):
            self._route = instruction
        elif isinstance(instruction, Project):
            weights = [projection.weight for projection in instruction.projections]
            found = self._replaced(weights, [frame.get(instruction.x) for frame in frames])
            projections = zip(instruction.projections, found, strict=True)
            instruction = replace(instruction, projections=tuple(replace(p, weight=w) for p, w in projections))
        elif isinstance(instruction, AttendLatent):
            (expand,) = self._replaced([instruction.expand], [normed_latent(instruction, frame) for frame in frames])
            instruction = replace(instruction, expand=expand)
        for frame in frames:
            execute(instruction, frame)
            if isinstance(instruction, Route) and self._watch is not None:
                self._watch.routed(linear(frame.get(instruction.x), instruction.weight, instruction.bias))

    def _replaced(
        self, weights: Sequence[PackedWeight], chunks: Sequence[Tensor], num_routed: int | None = None
    ) -> list[PackedWeight]:
        """The weights, or what the caller gives for them when it has seen their inputs."""
        slots = [self._names.get(id(weight)) for weight in weights]
        named = tuple(slot for slot in slots if slot is not None)
        if self._see is None or not named:
            return list(weights)
        given = self._see(Inputs(named, chunks, num_routed)) or {}
        return [given.get(slot or "", weight) for slot, weight in zip(slots, weights, strict=True)]

    def _mix(self, one: Mix, frames: Sequence[Frame]) -> None:
        x = [frame.get(one.x) for frame in frames]
        routings = [frame.routing for frame in frames]
        totals = [torch.zeros_like(rows) for rows in x]
        for expert_id, expert in enumerate(one.experts.experts):
            chosen = []
            for routing in routings:
                assert routing is not None
                rows, place = (routing[0] == expert_id).nonzero(as_tuple=True)
                chosen.append((rows, routing[1][rows, place] if one.weighs else torch.ones(len(rows))))
            results = self._expert(one, expert, x, [rows for rows, _ in chosen], self._near(expert_id, frames, chosen))
            for total, routing, (rows, share), result in zip(totals, routings, chosen, results, strict=True):
                weighed = result * share.unsqueeze(1)
                total.index_add_(0, rows, weighed)
                if self._watch is not None:
                    assert routing is not None
                    self._watch.added(expert_id, routing[1][routing[0] == expert_id], weighed)
        for frame, total in zip(frames, totals, strict=True):
            frame.put(one.out, total)

    def _expert(
        self, one: Mix, expert: Expert, x: Sequence[Tensor], chosen: Sequence[Tensor], near: Sequence[Tensor]
    ) -> list[Tensor]:
        """An expert's results for the tokens that were sent to it; it is shown with those near it too."""
        counts = [len(rows) for rows in chosen]
        inputs = [part[torch.cat(rows)] for part, *rows in zip(x, chosen, near, strict=True)]
        gate, up = self._replaced([expert.gate, expert.up], inputs, sum(counts))
        joined = [
            gated(linear(part, gate, expert.gate_bias), linear(part, up, expert.up_bias), one.activation)
            for part in inputs
        ]
        (down,) = self._replaced([expert.down], joined, sum(counts))
        parts = (part[:count] for part, count in zip(joined, counts, strict=True))
        return [linear(part, down, expert.down_bias) for part in parts]

    def _near(self, expert_id: int, frames: Sequence[Frame], chosen: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Of a rare expert the rows, in each frame, that came nearest to being sent to it."""
        missing = self._min_expert_tokens - sum(len(rows) for rows, _ in chosen)
        none = torch.empty(0, dtype=torch.int64)
        if missing <= 0 or self._see is None or self._route is None:
            return [none] * len(frames)
        distances = []
        for frame, (rows, _) in zip(frames, chosen, strict=True):
            distance = self._distance(self._route, frame, expert_id)
            distance[rows] = torch.inf  # it has them already
            distances.append(distance)
        together = torch.cat(distances)
        missing = min(missing, int(together.isfinite().sum()))
        nearest = together.sort(stable=True).indices[:missing].sort().values
        found, start = [], 0
        for distance in distances:
            stop = start + len(distance)
            found.append(nearest[(nearest >= start) & (nearest < stop)] - start)
            start = stop
        return found

    def _distance(self, route: Route, frame: Frame, expert_id: int) -> Tensor:
        """How much an expert's score lies below the least that was chosen, for each token."""
        scores = linear(frame.get(route.x), route.weight, route.bias)
        if route.scoring == "sigmoid":
            scores = frame.operators.sigmoid(scores)
        if route.correction is not None:
            scores = scores + route.correction.float()
        assert frame.routing is not None
        return scores.gather(1, frame.routing[0]).amin(1) - scores[:, expert_id]
