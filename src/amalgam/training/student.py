"""A model that learns: whole sequences through its program, with a gradient of every weight.

In: a spec, packed weights, which of them learn, token ids. Out: hidden states and logits; gradients of the weights.
Must never know: losses, teachers, files.

A step computes with float32 tensors that are leaves of their own (`Expanded`), so that a batch may go through it in
parts: each part adds to the leaves' gradients, and one pass at the end takes them back to the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amalgam.calibration.frames import linear
from amalgam.kernels.backends.reference.execution import execute
from amalgam.kernels.layouts import dense
from amalgam.kernels.program import Program
from amalgam.kernels.step import SequenceState, StepContext, StepSequence
from amalgam.kernels.weights import PackedWeight
from amalgam.models.decoder import emit, ropes_of, tables_of
from amalgam.models.kv_cache import KVCache
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion
from amalgam.training.operators import TrainingFrame, TrainingOperators, soft_cap
from amalgam.training.weights import Trained

_BLOCK_SIZE = 16


@dataclass(frozen=True, eq=False)
class Expanded:
    """The weights of one step.

    Attributes:
        program: with all of them as float32 tensors.
        values: slot → what a trained weight is now, which its parameters make.
        leaves: slot → the same numbers, as the program has them; gradients gather here.
    """

    program: Program
    values: Mapping[str, Tensor] = field(default_factory=dict)
    leaves: Mapping[str, Tensor] = field(default_factory=dict)

    def backward(self) -> None:
        """Take the gathered gradients to the parameters."""
        pairs = [(self.values[slot], leaf.grad) for slot, leaf in self.leaves.items() if leaf.grad is not None]
        torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])


class Student:
    """A model of which some weights learn.

    Args:
        weights: of every slot, in runtime layouts.
        trained: by slot; the others stay as they are.
        max_tokens: of the longest sequence.

    Attributes:
        parameters: `slot/name` → float32 leaf, in order.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, PackedWeight],
        trained: Mapping[str, Trained],
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.trained = dict(trained)
        self.parameters = {
            f"{slot}/{name}": leaf for slot, weight in trained.items() for name, leaf in weight.parameters.items()
        }
        self._device = device
        self._ropes = ropes_of(spec)
        self._max_tokens = max_tokens
        self._fixed = {
            slot: dense(weight.dequantize(torch.float32).to(device))
            for slot, weight in weights.items()
            if slot not in trained
        }
        self._tables = tables_of(self._ropes, max_tokens, device, self._fixed.get("rope_growth"))

    def expanded(self) -> Expanded:
        """The weights as they are now, for one step with gradients."""
        values = {slot: weight.value() for slot, weight in self.trained.items()}
        leaves = {slot: value.detach().requires_grad_() for slot, value in values.items()}
        return Expanded(self._program(leaves), values, leaves)

    @torch.no_grad()
    def fixed(self) -> Expanded:
        """The weights as they are now, for steps without gradients."""
        return Expanded(self._program({slot: weight.value() for slot, weight in self.trained.items()}))

    def _program(self, values: Mapping[str, Tensor]) -> Program:
        weights = {**self._fixed, **{slot: dense(value) for slot, value in values.items()}}
        return emit(self.spec, WeightVersion(1, weights, {}, {}), self._ropes)

    def hidden(self, weights: Expanded, sequences: Sequence[Sequence[int]]) -> Tensor:
        """float32 `[tokens, hidden]`: what the head reads, of whole sequences one after the other."""
        parts, first = [], 0
        for index, ids in enumerate(sequences):
            assert len(ids) <= self._max_tokens, "a sequence is longer than was said"
            count = -(-len(ids) // _BLOCK_SIZE)
            state = SequenceState.of(index, 0) if self.spec.state_bytes else None
            parts.append(StepSequence(list(ids), 0, range(first, first + count), 0, state))
            first += count
        cache = KVCache.allocate(self.spec, first, _BLOCK_SIZE, torch.float32, self._device, num_states=len(sequences))
        frame = TrainingFrame(StepContext(parts, cache), torch.float32, self._tables, TrainingOperators)
        for instruction in weights.program.instructions:
            execute(instruction, frame)
        return frame.get(weights.program.head.x)

    def logits(self, weights: Expanded, hidden: Tensor) -> Tensor:
        """float32 `[rows, vocabulary]`."""
        head = weights.program.head
        logits = linear(hidden, head.weight, head.bias) * head.scale
        return logits if head.softcap is None else soft_cap(logits, head.softcap)
