"""DeepSeek-V2 (`DeepseekV2ForCausalLM`): latent attention, group-limited routing, shared experts, first layers dense.

DeepSeek-AI 2024, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amalgam.kernels.program import AttendLatent, Emitter, Normalize, Route, Rows
from amalgam.models.families.llama import read_model
from amalgam.models.families.mixtral import read_expert_counts
from amalgam.models.layers import DenseMlp, Router, SparseMoe
from amalgam.models.naming import DECODER, EXPERTS, FUSED_EXPERTS, MLP, SHARED_EXPERTS, with_biases
from amalgam.models.rope import Rope, RopeSettings, read_rope, yarn_scale
from amalgam.models.spec import AttentionBlock, ConfigReader, Family, LayerSpec, ModelSpec, Slot
from amalgam.models.weights import BlockWeights

_LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps says


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: keys and values of all heads are projections of one short vector per token.

    Only that latent vector and one rotated key, which all heads share, are cached (section 2.1 of the paper): with
    DeepSeek-V3's sizes 576 numbers per token and layer instead of 40960. See `AttendLatent`.

    Attributes:
        query_rank: the queries' own low rank; None: one full projection.
        scale: of the scores before the softmax.
        is_interleaved: rotary pairs are neighbours in the checkpoint, not halves apart.
    """

    num_heads: int
    query_rank: int | None
    latent_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    scale: float
    is_interleaved: bool
    has_bias: bool

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return 1, self.latent_rank + self.rope_dim, 0

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        query_width = self.num_heads * (self.nope_dim + self.rope_dim)
        if self.query_rank is None:
            yield Slot("q", (query_width, hidden_size), "attention")
        else:
            yield from self._biased("q_a", (self.query_rank, hidden_size))
            yield Slot("q_a_norm", (self.query_rank,), "norm")
            yield Slot("q_b", (query_width, self.query_rank), "attention")
        yield from self._biased("kv_a", (self.latent_rank + self.rope_dim, hidden_size))
        yield Slot("kv_a_norm", (self.latent_rank,), "norm")
        yield Slot("kv_b", (self.num_heads * (self.nope_dim + self.value_dim), self.latent_rank), "attention")
        yield from self._biased("o", (hidden_size, self.num_heads * self.value_dim))

    def _biased(self, name: str, shape: tuple[int, int]) -> Iterator[Slot]:
        yield Slot(name, shape, "attention")
        if self.has_bias:
            yield Slot(f"{name}_bias", shape[:1], "bias")

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        expand, rope = weights["kv_b"], step.rope(self.rope)
        assert rope is not None
        query = self._emit_query(step, x, weights)
        (compressed,) = step.project(x, (weights["kv_a"], weights.vector("kv_a_bias"), "compressed"))
        attended = step.rows("attended", self.num_heads * self.value_dim)
        step.add(
            AttendLatent(
                query,
                compressed,
                attended,
                layer_id=step.layer_id,
                expand=expand,
                norm=weights["kv_a_norm"].dense,
                norm_eps=_LATENT_NORM_EPS,
                num_heads=self.num_heads,
                nope_dim=self.nope_dim,
                rope_dim=self.rope_dim,
                value_dim=self.value_dim,
                rope=rope,
                scale=self.scale,
                is_interleaved=self.is_interleaved,
            )
        )
        (delta,) = step.project(attended, (weights["o"], weights.vector("o_bias"), "delta"))
        return delta

    def _emit_query(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        if self.query_rank is None:
            (query,) = step.project(x, (weights["q"], None, "query"))
            return query
        (low,) = step.project(x, (weights["q_a"], weights.vector("q_a_bias"), "low_query"))
        step.add(Normalize(low, weights["q_a_norm"].dense, low, _LATENT_NORM_EPS))
        (query,) = step.project(low, (weights["q_b"], None, "query"))
        return query


LATENT_ATTENTION = {
    "layers.{}.attention.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.q_b": "model.layers.{}.self_attn.q_b_proj.weight",
    "layers.{}.attention.kv_b": "model.layers.{}.self_attn.kv_b_proj.weight",
    "layers.{}.attention.q_a_norm": "model.layers.{}.self_attn.q_a_layernorm.weight",
    "layers.{}.attention.kv_a_norm": "model.layers.{}.self_attn.kv_a_layernorm.weight",
    **with_biases(
        {
            "layers.{}.attention.q_a": "model.layers.{}.self_attn.q_a_proj.weight",
            "layers.{}.attention.kv_a": "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight",
            "layers.{}.attention.o": "model.layers.{}.self_attn.o_proj.weight",
        }
    ),
}


def read_latent_attention(config: ConfigReader, *, is_interleaved: bool) -> LatentAttention:
    """Latent attention as DeepSeek-V2 and V3 configure it. `head_dim` means something else there and is not read."""
    heads = config.int("num_attention_heads")
    config.expect("num_key_value_heads", heads)
    nope_dim, rope_dim = config.int("qk_nope_head_dim", default=128), config.int("qk_rope_head_dim", default=64)
    settings = RopeSettings(config)
    sharpening = settings.optional("mscale_all_dim")
    magnitude = 1.0 if sharpening is None else yarn_scale(settings.number("factor"), sharpening)
    return LatentAttention(
        num_heads=heads,
        query_rank=None if config.is_null("q_lora_rank") else config.int("q_lora_rank", default=1536),
        latent_rank=config.int("kv_lora_rank", default=512),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=config.int("v_head_dim", default=128),
        rope=read_rope(config, rope_dim),
        scale=(nope_dim + rope_dim) ** -0.5 * magnitude**2,
        is_interleaved=is_interleaved,
        has_bias=config.bool("attention_bias", default=False),
    )


@dataclass(frozen=True)
class ExpertGroups:
    """Experts in groups of equal size, of which a token may use the experts of the best `num_kept` only."""

    num_groups: int
    num_kept: int


def read_groups(config: ConfigReader, default_groups: int, default_kept: int) -> ExpertGroups:
    """`n_group` and `topk_group`."""
    num_experts, num_active = read_expert_counts(config)
    groups = config.int("n_group", default=default_groups)
    kept = config.int("topk_group", default=default_kept)
    if num_experts % groups:
        config.refuse("n_group", groups, f"a divisor of the {num_experts} experts of a layer")
    if not kept <= groups or kept * (num_experts // groups) < num_active:
        enough = f"with at least num_experts_per_tok {num_active} experts in them"
        config.refuse("topk_group", kept, f"at most n_group {groups}, {enough}")
    return ExpertGroups(groups, kept)


@dataclass(frozen=True)
class GroupLimitedRouter:
    """Softmax over all experts; the top k, from the groups with the largest single probabilities (section 2.2.2)."""

    num_experts: int
    num_active_experts: int
    groups: ExpertGroups
    scaling: float

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        return Route(
            x,
            weights["router"],
            layer_id,
            self.num_active_experts,
            num_groups=self.groups.num_groups,
            num_kept=self.groups.num_kept,
            scaling=self.scaling,
        )


def _read_router(config: ConfigReader) -> GroupLimitedRouter:
    config.expect("scoring_func", "softmax")
    # The published code then normalises or scales, never both; today's class always scales. Nobody publishes it.
    config.expect("norm_topk_prob", False)
    config.expect("topk_method", "greedy", "group_limited_greedy")
    is_grouped = config.get("topk_method") == "group_limited_greedy"
    return GroupLimitedRouter(
        *read_expert_counts(config),
        groups=read_groups(config, 1, 1) if is_grouped else ExpertGroups(1, 1),
        scaling=config.float("routed_scaling_factor", default=1.0),
    )


def read_moe_layers(
    config: ConfigReader, attention: AttentionBlock, router: Router, *, default_dense: int, default_shared: int
) -> tuple[LayerSpec, ...]:
    """The first `first_k_dense_replace` layers with a dense MLP, the others with experts and shared ones."""
    config.expect("moe_layer_freq", 1)
    config.expect("mlp_bias", False)
    size = config.int("moe_intermediate_size")
    num_shared = config.int("n_shared_experts", default=default_shared, low=0)
    moe = SparseMoe(router, size, shared_size=size * num_shared)
    dense = DenseMlp(config.int("intermediate_size"))
    num_dense = config.int("first_k_dense_replace", default=default_dense, low=0)
    num_layers = config.int("num_hidden_layers")
    return tuple(LayerSpec(attention, dense if i < num_dense else moe) for i in range(num_layers))


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_latent_attention(config, is_interleaved=True)
    layers = read_moe_layers(config, attention, _read_router(config), default_dense=0, default_shared=2)
    return read_model(config, "deepseek_v2", layers)


FAMILY = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **LATENT_ATTENTION, **MLP, **EXPERTS, **SHARED_EXPERTS},
    fused=FUSED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
)
