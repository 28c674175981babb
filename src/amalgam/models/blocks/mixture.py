"""Mixtures of experts, and the routers that several families share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from amalgam.kernels.program import Add, Emitter, Mix, Project, Projection, Route, Rows, ScaleBySigmoid, WeighInput
from amalgam.kernels.weights import SWIGLU, GatedActivation
from amalgam.models.blocks.mlp import emit_gated, gated_slots
from amalgam.models.spec import Slot
from amalgam.models.weights import BlockWeights


class Router(Protocol):
    """Chooses each token's experts: a frozen dataclass of its sizes. Works in float32 throughout, since which expert
    a token goes to must not hang on a rounding."""

    @property
    def num_experts(self) -> int: ...

    @property
    def num_active_experts(self) -> int: ...

    def slots(self, hidden_size: int) -> Iterator[Slot]: ...

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        """The instruction that does it."""


@dataclass(frozen=True)
class SoftmaxRouter:
    """Probabilities over all experts, the top k kept (Shazeer et al. 2017; Fedus et al. 2022).

    `normalises` divides them by their sum, to which `sum_eps` is added; `scaling` multiplies them then.
    """

    num_experts: int
    num_active_experts: int
    normalises: bool
    sum_eps: float = 0.0
    scaling: float = 1.0

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        router, k = weights["router"], self.num_active_experts
        normalises, sum_eps, scaling = self.normalises, self.sum_eps, self.scaling
        return Route(x, router, layer_id, k, normalises=normalises, sum_eps=sum_eps, scaling=scaling)


@dataclass(frozen=True)
class ExpertGroups:
    """Experts in groups of equal size, of which a token may use the experts of the best `num_kept` only."""

    num_groups: int
    num_kept: int


@dataclass(frozen=True)
class CorrectedRouter:
    """Sigmoid scores; a bias per expert that balances their load takes part in the choice, but not in the weights.

    Groups score by the sum of their two largest corrected scores. `normalises` divides the chosen scores by their sum
    + `sum_eps`. `has_correction` False: there is no such bias.
    """

    num_experts: int
    num_active_experts: int
    groups: ExpertGroups = ExpertGroups(1, 1)
    normalises: bool = True
    scaling: float = 1.0
    sum_eps: float = 1e-20
    has_correction: bool = True

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")
        if self.has_correction:
            yield Slot("router_correction", (self.num_experts,), "router")

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        return Route(
            x,
            weights["router"],
            layer_id,
            self.num_active_experts,
            scoring="sigmoid",
            correction=weights.vector("router_correction"),
            num_groups=self.groups.num_groups,
            num_kept=self.groups.num_kept,
            normalises=self.normalises,
            sum_eps=self.sum_eps,
            scaling=self.scaling,
        )


@dataclass(frozen=True)
class SparseMoe:
    """Mixture of gated experts, perhaps beside shared ones that every token passes.

    Attributes:
        shared_size: width of the shared experts, which are one gated MLP; 0: none.
        has_shared_gate: the shared experts' output is multiplied by a sigmoid of a projection of x (Qwen2-MoE).
        weighs_input: the gate weight of a token's only expert multiplies what goes in, not what comes out (Llama 4).
    """

    router: Router
    intermediate_size: int
    activation: GatedActivation = SWIGLU
    has_bias: bool = False
    shared_size: int = 0
    has_shared_gate: bool = False
    weighs_input: bool = False
    shared_activation: GatedActivation = SWIGLU

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    @property
    def num_active_experts(self) -> int:
        return self.router.num_active_experts

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield from self.router.slots(hidden_size)
        for expert_id in range(self.num_experts):
            prefix = f"experts.{expert_id}."
            yield from gated_slots(prefix, hidden_size, self.intermediate_size, "expert", has_bias=self.has_bias)
        if self.shared_size:
            yield from gated_slots("shared.", hidden_size, self.shared_size, "shared_expert")
        if self.has_shared_gate:
            yield Slot("shared_gate", (1, hidden_size), "router")

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        delta = step.rows("delta", x.width)
        step.add(self.router.route(x, weights, step.layer_id))
        routed = x
        if self.weighs_input:
            routed = step.rows("weighed", x.width)
            step.add(WeighInput(x, routed))
        step.add(Mix(routed, weights.experts, delta, self.activation, weighs=not self.weighs_input))
        if self.shared_size:
            shared = emit_gated(step, x, weights, "shared.", "shared", self.shared_activation)
            if self.has_shared_gate:
                gate = step.rows("shared_gate", 1, is_wide=True)
                step.add(Project(x, (Projection(weights["shared_gate"], None, gate),), widens=True))
                step.add(ScaleBySigmoid(shared, gate))
            step.add(Add(delta, shared))
        return delta
