"""Mamba-2: a state space instead of keys and values (Dao & Gu 2024, "Transformers are SSMs: Generalized Models and
Efficient Algorithms Through Structured State Space Duality")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amalgam.kernels.program import Convolve, Emitter, Normalize, Rows, ScanStates, Split, SwiGlu
from amalgam.models.blocks.recurrent import RecurrentBlock
from amalgam.models.spec import Slot, StateShape
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class StateSpace(RecurrentBlock):
    """One projection gives gates, x, B, C and steps; x, B and C go through a short convolution, and the states are
    scanned. What comes out is gated and then normed, group by group.

    Attributes:
        num_groups: of heads that share B and C, and of channels that are normed together.
        kernel_size: rows that the convolution sees, the newest included.
        has_bias, has_convolution_bias: of the projections, and of the convolution.
        limits: see `ScanStates`.
    """

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    kernel_size: int
    norm_eps: float
    has_bias: bool = False
    has_convolution_bias: bool = True
    limits: tuple[float, float] = (0.0, float("inf"))

    @property
    def state_shape(self) -> StateShape:
        return StateShape((self.kernel_size - 1, self._channels), (self.num_heads, self.state_dim, self.head_dim))

    @property
    def _width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def _states(self) -> int:
        return self.num_groups * self.state_dim

    @property
    def _channels(self) -> int:
        return self._width + 2 * self._states

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        width = self._width + self._channels + self.num_heads
        yield Slot("in", (width, hidden_size), "linear_attention")
        if self.has_bias:
            yield Slot("in_bias", (width,), "bias")
        yield Slot("convolution", (self._channels, 1, self.kernel_size), "convolution")
        if self.has_convolution_bias:
            yield Slot("convolution_bias", (self._channels,), "bias")
        for name in ("log_rate", "step_bias", "skip"):
            yield Slot(name, (self.num_heads,), "bias")
        yield Slot("norm", (self._width,), "norm")
        yield Slot("out", (hidden_size, self._width), "linear_attention")
        if self.has_bias:
            yield Slot("out_bias", (hidden_size,), "bias")

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        (together,) = step.project(x, (weights["in"], weights.vector("in_bias"), "state_space"))
        gate, mixed = together.columns(0, self._width), together.columns(self._width, self._channels)
        seen, scanned, gated = (
            step.rows("convolved", self._channels),
            step.rows("scanned", self._width),
            step.rows("gated", self._width),
        )
        kernel, kernel_bias = weights["convolution"].dense.flatten(1), weights.vector("convolution_bias")
        step.add(
            Convolve(mixed, kernel, seen, step.layer_id, bias=kernel_bias),
            ScanStates(
                seen.columns(self._width, self._states),
                seen.columns(self._width + self._states, self._states),
                seen.columns(0, self._width),
                together.columns(self._width + self._channels, self.num_heads),
                scanned,
                layer_id=step.layer_id,
                num_groups=self.num_groups,
                num_heads=self.num_heads,
                log_rate=weights["log_rate"].dense.float(),
                step_bias=weights["step_bias"].dense.float(),
                skip=weights["skip"].dense.float(),
                limits=self.limits,
            ),
            SwiGlu(gate, scanned, gated),
        )
        self._emit_norm(step, gated, weights)
        (delta,) = step.project(gated, (weights["out"], weights.vector("out_bias"), "delta"))
        return delta

    def _emit_norm(self, step: Emitter, gated: Rows, weights: BlockWeights) -> None:
        weight, size = weights["norm"].dense, self._width // self.num_groups
        if self.num_groups == 1:
            step.add(Normalize(gated, weight, gated, self.norm_eps))
            return
        groups = tuple(step.rows(f"gated_group_{group}", size) for group in range(self.num_groups))
        step.add(Split(gated, 1, groups))
        for start, rows in zip(range(0, self._width, size), groups, strict=True):
            step.add(
                Normalize(rows, weight[start : start + size].contiguous(), rows, self.norm_eps),
                Split(rows, 1, (gated.columns(start, size),)),
            )
