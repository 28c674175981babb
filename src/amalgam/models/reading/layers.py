"""Whole models, and which layers have experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from amalgam.base.fields import REQUIRED, Required
from amalgam.models.blocks.mixture import CorrectedRouter, ExpertGroups, Router, SparseMoe
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.blocks.norms import RmsNorm
from amalgam.models.reading.attention import NORM_EPS
from amalgam.models.spec import AttentionBlock, ConfigReader, LayerSpec, MlpBlock, ModelSpec

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)


_ACTIVE = "num_experts_per_tok"


def read_model(
    config: ConfigReader,
    family: str,
    layers: tuple[LayerSpec, ...],
    *,
    default_eps: float = NORM_EPS,
    default_tied: bool = False,
    activations: tuple[str, ...] = SILU,
    activation_key: str = "hidden_act",
) -> ModelSpec:
    """The parts of a spec that do not depend on the blocks.

    Args:
        activations: what `activation_key` may name.
    """
    config.expect(activation_key, *activations)
    return ModelSpec(
        family=family,
        hidden_size=config.int("hidden_size"),
        vocab_size=config.int("vocab_size"),
        max_positions=config.int("max_position_embeddings"),
        norm=RmsNorm(config.float("rms_norm_eps", default=default_eps, low=0)),
        has_tied_head=config.bool("tie_word_embeddings", default=default_tied),
        layers=layers,
    )


def with_draft_layers(config: ConfigReader, spec: ModelSpec) -> ModelSpec:
    """The spec, knowing of the layers for multi-token prediction that checkpoints hold behind the last one."""
    return replace(spec, num_draft_layers=config.int("num_nextn_predict_layers", default=1, low=0))


def with_multipliers(config: ConfigReader, spec: ModelSpec) -> ModelSpec:
    """The spec with Granite's factors on the embedding, on what the blocks add, and on the logits."""
    divisor = config.float("logits_scaling", default=1.0)
    if divisor <= 0:
        config.refuse("logits_scaling", divisor, "a number above 0")
    return replace(
        spec,
        embedding_scale=config.float("embedding_multiplier", default=1.0),
        residual_scale=config.float("residual_multiplier", default=1.0),
        logits_scale=1.0 / divisor,
    )


def read_expert_counts(
    config: ConfigReader,
    active_key: str = _ACTIVE,
    *count_keys: str,
    default_experts: int | Required = REQUIRED,
    default_active: int | Required = REQUIRED,
) -> tuple[int, int]:
    """Experts of a layer, and how many of them a token goes to, which may be called `active_key`.

    Args:
        count_keys: what else the number of experts may be called.
    """
    num_experts = config.int(
        *count_keys, "num_experts", "num_local_experts", "n_routed_experts", default=default_experts
    )
    num_active = config.int(*dict.fromkeys((active_key, _ACTIVE)), default=default_active)
    if num_active > num_experts:
        config.refuse(active_key, num_active, f"at most the {num_experts} experts of a layer")
    return num_experts, num_active


def _is_sparse(config: ConfigReader, layer_id: int) -> bool:
    """Whether a layer has experts: not listed in `mlp_only_layers`, and every `decoder_sparse_step`-th."""
    step = config.int("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers", default=[])
    if not isinstance(dense, list):
        config.refuse("mlp_only_layers", dense, "a list of layer numbers")
    return layer_id not in dense and (layer_id + 1) % step == 0


def read_sparse_layers(
    config: ConfigReader, attentions: Sequence[AttentionBlock], moe: SparseMoe
) -> tuple[LayerSpec, ...]:
    """`moe` in the layers that have experts, a dense MLP in the others."""
    dense = DenseMlp(config.int("intermediate_size"))
    return tuple(
        LayerSpec(attention, moe if _is_sparse(config, layer_id) else dense)
        for layer_id, attention in enumerate(attentions)
    )


def read_moe_layers(
    config: ConfigReader,
    attention: AttentionBlock | Sequence[AttentionBlock],
    router: Router,
    *,
    default_dense: int,
    default_shared: int,
    shared_key: str = "n_shared_experts",
) -> tuple[LayerSpec, ...]:
    """The first `first_k_dense_replace` layers with a dense MLP, the others with experts and shared ones; or as
    `mlp_layer_types` says.

    Args:
        attention: of all layers, or of each.
        shared_key: how many shared experts there are.
    """
    config.expect("moe_layer_freq", 1)
    config.expect("mlp_bias", False)
    num_layers = config.int("num_hidden_layers")
    size = config.int("moe_intermediate_size")
    moe = SparseMoe(router, size, shared_size=size * config.int(shared_key, default=default_shared, low=0))
    dense = DenseMlp(config.int("intermediate_size"))
    # K-EXAONE's first revision has the second name.
    num_dense = config.int("first_k_dense_replace", "first_last_k_dense_replace", default=default_dense, low=0)
    kinds = config.get("mlp_layer_types", default=["dense" if i < num_dense else "sparse" for i in range(num_layers)])
    known: dict[str, MlpBlock] = {"dense": dense, "sparse": moe}
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in tuple(known) for kind in kinds):
        config.refuse("mlp_layer_types", kinds, f"{num_layers} of {', '.join(known)}")
    attentions = attention if isinstance(attention, Sequence) else (attention,) * num_layers
    return tuple(LayerSpec(one, known[kind]) for one, kind in zip(attentions, kinds, strict=True))


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


def read_corrected_router(
    config: ConfigReader,
    *,
    default_groups: int = 1,
    default_kept: int = 1,
    default_scaling: float = 1.0,
    default_normalises: bool = True,
    scoring_names: tuple[str, ...] = ("sigmoid",),
) -> CorrectedRouter:
    """The router of DeepSeek-V3 and GLM-4.5.

    Args:
        scoring_names: what a config may call sigmoid scores.
    """
    config.expect("scoring_func", *scoring_names)
    config.expect("topk_method", "noaux_tc")
    num_experts, num_active = read_expert_counts(config)
    groups = read_groups(config, default_groups, default_kept)
    if num_experts < 2 * groups.num_groups:
        config.refuse("n_group", groups.num_groups, f"groups of at least two of the {num_experts} experts")
    return CorrectedRouter(
        num_experts,
        num_active,
        groups,
        normalises=config.bool("norm_topk_prob", default=default_normalises),
        scaling=config.float("routed_scaling_factor", default=default_scaling),
    )
