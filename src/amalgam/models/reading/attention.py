"""Attention of Llama's and DeepSeek's relatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.latent_attention import Indexer, LatentAttention
from amalgam.models.reading.rope import RopeSettings, read_rope
from amalgam.models.rope import yarn_scale
from amalgam.models.spec import ConfigReader

NORM_EPS = 1e-6
A = TypeVar("A", bound=Attention)
_WINDOW, _FIRST_WINDOW = 4096, 28  # Qwen's defaults, where a key is missing


def read_attention(
    config: ConfigReader,
    *,
    default_theta: float = 10000.0,
    default_head_dim: int | None = None,
    default_kv_heads: int | None = None,
    default_eps: float = NORM_EPS,
    default_rotary: float | None = None,
    has_bias: bool = False,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    rope_settings: frozenset[str] = frozenset(),
) -> Attention:
    """The attention that Llama's relatives share; a family changes what differs with `dataclasses.replace`.

    Args:
        default_kv_heads: where the key is missing; None: as many as there are heads, which null means everywhere.
        default_rotary: share of a head that turns; None: the class turns whole heads, see `read_rope`.
        layer_type, theta_key: see `read_rope`.
        rope_settings: those that the family reads itself.
    """
    heads = config.int("num_attention_heads")
    kv_heads = config.int(
        "num_key_value_heads",
        default=heads if default_kv_heads is None or config.is_null("num_key_value_heads") else default_kv_heads,
    )
    head_dim = config.int("head_dim", default=default_head_dim or max(1, config.int("hidden_size") // heads))
    if heads % kv_heads:
        config.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=read_rope(
            config,
            head_dim,
            default_theta,
            default_rotary,
            layer_type=layer_type,
            theta_key=theta_key,
            others=rope_settings,
        ),
        norm_eps=config.float("rms_norm_eps", default=default_eps, low=0),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )


def read_normed_attention(
    config: ConfigReader,
    default_head_dim: int | None = None,
    default_kv_heads: int | None = None,
    default_rotary: float | None = None,
) -> Attention:
    """Attention with a norm on every query and key head, without a window: Qwen3's, dense and mixture alike."""
    common = read_attention(
        config,
        has_bias=config.bool("attention_bias", default=False),
        default_head_dim=default_head_dim,
        default_kv_heads=default_kv_heads,
        default_rotary=default_rotary,
    )
    return replace(common, has_head_norm=True)


def read_window(config: ConfigReader, default: int | None = None) -> int | None:
    """`sliding_window` of all layers; null means none."""
    if config.is_null("sliding_window") or config.get("sliding_window", default=default) is None:
        return None
    return config.int("sliding_window", default=default)


def read_used_window(config: ConfigReader) -> int | None:
    """`sliding_window` if `use_sliding_window` says so; null means none."""
    return read_window(config, default=_WINDOW) if config.bool("use_sliding_window", default=False) else None


def by_layer_type(
    config: ConfigReader,
    attention: A,
    window: int | None,
    default_types: list[str],
    full: A | None = None,
) -> tuple[A, ...]:
    """One attention per layer, as `layer_types` says: full, or with a window if there is one.

    Args:
        full: attention of the full layers; None: as that of the others, without the window.
    """
    types = config.get("layer_types", default=default_types)
    known = {"full_attention": attention if full is None else full}
    if window is not None:
        known["sliding_attention"] = replace(attention, window=window)
    if (
        not isinstance(types, list)
        or len(types) != len(default_types)
        or not all(kind in tuple(known) for kind in types)
    ):
        config.refuse("layer_types", types, f"{len(default_types)} of {', '.join(known)}")
    return tuple(known[kind] for kind in types)


def every_nth_full(config: ConfigReader, n: int) -> list[str]:
    """Layer types: windows in all layers but every `n`-th."""
    count = config.int("num_hidden_layers")
    return ["full_attention" if i % n == 0 else "sliding_attention" for i in range(1, count + 1)]


def windowed(config: ConfigReader, attention: Attention) -> tuple[Attention, ...]:
    """`with_upper_windows` where `use_sliding_window` says so, in no layer otherwise."""
    return with_upper_windows(config, attention, read_used_window(config), _FIRST_WINDOW)


def with_upper_windows(
    config: ConfigReader, attention: Attention, window: int | None, default_first: int
) -> tuple[Attention, ...]:
    """One attention per layer: `layer_types` decides, else windows from layer `max_window_layers` on."""
    num_layers, first = config.int("num_hidden_layers"), config.int("max_window_layers", default=default_first, low=0)
    types = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(num_layers)]
    return by_layer_type(config, attention, window, types)


@dataclass(frozen=True)
class LatentDefaults:
    """What a configuration class takes where a key of latent attention is missing; DeepSeek-V3's."""

    query_rank: int = 1536
    latent_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128


def read_latent_attention(
    config: ConfigReader,
    *,
    is_interleaved: bool,
    defaults: LatentDefaults = LatentDefaults(),
    says_share: bool = False,
    rope_settings: frozenset[str] = frozenset(),
) -> LatentAttention:
    """Latent attention as DeepSeek-V2 and V3 configure it. `head_dim` means something else there and is not read.

    Args:
        says_share: the settings may say which share of a whole head turns, which `qk_rope_head_dim` says already.
        rope_settings: those that the family reads itself.
    """
    heads = config.int("num_attention_heads")
    config.expect("num_key_value_heads", heads)
    nope_dim = config.int("qk_nope_head_dim", default=defaults.nope_dim)
    rope_dim = config.int("qk_rope_head_dim", default=defaults.rope_dim)
    settings = RopeSettings(config)
    sharpening = settings.optional("mscale_all_dim")
    magnitude = 1.0 if sharpening is None else yarn_scale(settings.number("factor"), sharpening)
    width = nope_dim + rope_dim if says_share else rope_dim
    rope = read_rope(config, width, default_fraction=rope_dim / width if says_share else None, others=rope_settings)
    if rope.rotary_dim != rope_dim:
        config.refuse(
            "partial_rotary_factor", rope.rotary_dim / width, f"{rope_dim / width:g}, as qk_rope_head_dim says"
        )
    has_query_rank = not config.is_null("q_lora_rank")
    return LatentAttention(
        num_heads=heads,
        query_rank=config.int("q_lora_rank", default=defaults.query_rank) if has_query_rank else None,
        latent_rank=config.int("kv_lora_rank", default=defaults.latent_rank),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=config.int("v_head_dim", default=defaults.value_dim),
        rope=rope,
        scale=(nope_dim + rope_dim) ** -0.5 * magnitude**2,
        is_interleaved=is_interleaved,
        has_bias=config.bool("attention_bias", default=False),
    )


def with_indexer(
    config: ConfigReader,
    attention: LatentAttention,
    *,
    default_heads: int,
    default_interleaved: bool,
    reads_stream: bool = False,
) -> LatentAttention:
    """Latent attention over the positions that DeepSeek-V3.2's indexer chooses.

    Args:
        default_heads, default_interleaved: of the indexer.
        reads_stream: its queries are not made of the attention's queries at low rank, which there are none of.
    """
    dim = config.int("index_head_dim", default=128)
    if dim < attention.rope_dim:
        config.refuse("index_head_dim", dim, f"at least qk_rope_head_dim {attention.rope_dim}")
    if attention.query_rank is None and not reads_stream:
        config.refuse("q_lora_rank", None, "a number: the indexer reads the queries' low rank")
    indexer = Indexer(
        num_heads=config.int("index_n_heads", default=default_heads),
        head_dim=dim,
        num_chosen=config.int("index_topk", default=2048),
        is_interleaved=config.bool("indexer_rope_interleave", default=default_interleaved),
    )
    return replace(attention, is_indexed=True, indexer=indexer)


def read_indexers(config: ConfigReader) -> list[bool]:
    """Whether each layer has an indexer of its own: `indexer_types`, else `index_topk_pattern`, else every
    `index_topk_freq`-th layer from `index_skip_topk_offset` on. The others attend to what the last one before them has
    chosen (arXiv:2603.12201)."""
    known = {"full": True, "shared": False}
    count = config.int("num_hidden_layers")
    every = max(config.int("index_topk_freq", default=1, low=0), 1)
    offset = config.int("index_skip_topk_offset", default=2, low=0)
    types = ["full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in range(count)]
    key = next((key for key in ("indexer_types", "index_topk_pattern") if config.get(key) is not None), None)
    if key is not None:
        types = config.get(key)
        if isinstance(types, str):
            types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in types]
    if not isinstance(types, list) or len(types) != count or not all(kind in tuple(known) for kind in types):
        config.refuse(key or "index_topk_freq", types, f"{count} of {', '.join(known)}")
    if types[0] != "full":
        config.refuse(key or "index_skip_topk_offset", types[0], "full in the first layer, which none is before")
    return [known[kind] for kind in types]
