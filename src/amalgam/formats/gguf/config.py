"""GGUF's metadata → the config.json that the published checkpoint would have.

In: an opened GGUF checkpoint. Out: a Hugging Face configuration as a mapping. What the converter does not write is
told from the tensors (biases, a tied head, which layers are dense) or is a constant of the architecture, never guessed:
a key that is not understood, and a value that the file cannot tell, are refused.
Must never know: families, specs, plans.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from amalgam.base.fields import REQUIRED, Fields, Required
from amalgam.checkpoint.store import TensorStore
from amalgam.errors import CheckpointError, UnsupportedError, describe
from amalgam.formats.gguf.names import ARCHITECTURE_KEY

Config = dict[str, Any]
# About the file, or written twice; none changes what is computed.
_HARMLESS = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"})
# Of the scaling `yarn`, which reads them; no other does.
_YARN_KEYS = frozenset(
    f"rope.scaling.{key}" for key in ("original_context_length", "yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor")
)
# What converters write for every architecture: understood where it changes nothing and the architecture has no own
# meaning for it. Any other key and value is refused.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "embedding_scale": (1.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
# Groups of experts, and how many may be used, by layers and experts of the models that were converted before the key
# existed (autumn of 2025): DeepSeek V2 and V2-Lite, V3 and R1, Moonlight, Kimi K2; and GLM-4.7-Flash.
_GROUPS = {(60, 160): (8, 3), (27, 64): (1, 1), (61, 256): (8, 4), (61, 384): (1, 1), (47, 64): (1, 1)}
# Llama 3.1 to 3.3 differ in the factor only.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_WITHOUT_MLP = {"Qwen3_5MoeForCausalLM"}
_YARN_FACTORS = ("rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor")
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
_ROPE_KINDS = "none, linear, yarn, and the tables of Llama 3 and of LongRoPE"
# Numbers of llama.cpp.
_UNSAID, _SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN = 0, 1, 2, 3


def read_config(store: TensorStore) -> Config:
    """The configuration that a GGUF checkpoint's metadata describe.

    Raises:
        UnsupportedError: an architecture that is not known, or metadata that are not understood; a config.json beside
            the file takes their place.
        CheckpointError: metadata are missing, of the wrong type, or contradict the tensors.
    """
    architecture = store.metadata[ARCHITECTURE_KEY]
    build = ARCHITECTURES.get(architecture)
    if build is None:
        raise UnsupportedError(
            f"{store.files[0]} is of architecture {describe(architecture)}, whose metadata are not understood.",
            remedy=f"Understood: {', '.join(sorted(ARCHITECTURES))}. Or put the file into a folder with the published "
            "config.json.",
        )
    metadata = _Metadata(store, architecture)
    config = build(metadata)
    metadata.check_all_read()
    config["model_type"] = _MODEL_TYPES[config["architectures"][0]]
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        config[key] = store.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return config


class _Metadata(Fields):
    """Typed access to the keys of an architecture, and to the tensors that tell what they do not."""

    cure = "Or put the file into a folder with the published config.json."

    def __init__(self, store: TensorStore, architecture: str) -> None:
        prefix = f"{architecture}."
        values = {key.removeprefix(prefix): value for key, value in store.metadata.items() if key.startswith(prefix)}
        super().__init__(values, str(store.files[0]), prefix)
        self._store = store
        self.pass_over(_HARMLESS | _YARN_KEYS)

    def has(self, key: str) -> bool:
        return key in self.values

    def get(self, *keys: str, default: Any = None) -> Any:
        """The value; of one value for each layer the one that they share."""
        value = super().get(*keys, default=default)
        if isinstance(value, Sequence) and not isinstance(value, str):
            distinct = set(value)
            if len(distinct) != 1:
                self.unsupported(keys[0], value, "the same value for every layer")
            return distinct.pop()
        return value

    def number(self, key: str, default: float | Required = REQUIRED) -> float:
        """Stored as float32: the shortest decimal fraction that rounds to it is what config.json had."""
        return float(str(np.float32(self.float(key, default=default))))

    def expect_pattern(self, period: int, num_layers: int) -> None:
        """Refuse a choice of layers with a window other than all but every `period`th."""
        key = "attention.sliding_window_pattern"
        value = super().get(key)
        pattern = [(layer + 1) % period != 0 for layer in range(num_layers)]
        is_flags = isinstance(value, Sequence) and not isinstance(value, str) and list(map(bool, value)) == pattern
        if value is not None and value != period and not is_flags:
            self.unsupported(key, value, f"{period}, or the same for each layer")

    def layer_types(self, num_layers: int, default_period: int) -> list[str]:
        """Which layers have a window; where that is not said, all but every `default_period`th."""
        key = "attention.sliding_window_pattern"
        value = super().get(key, default=default_period)
        flags = [(layer + 1) % value != 0 for layer in range(num_layers)] if type(value) is int and value > 0 else value
        if not isinstance(flags, Sequence) or isinstance(flags, str) or len(flags) != num_layers:
            self.unsupported(key, value, f"a period, or true or false for each of {num_layers} layers")
        return ["sliding_attention" if flag else "full_attention" for flag in flags]

    def has_tensor(self, name: str) -> bool:
        return name in self._store

    def has_tensor_like(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in self._store)

    def num_rows(self, name: str) -> int:
        if name not in self._store:
            raise CheckpointError(f"{self._store.files[0]} has no tensor {name!r}.", remedy="Download it again.")
        return self._store[name].shape[0]

    def num_layers(self) -> int:
        """Layers of the decoder; believed only if the file has as many tensors."""
        num_blocks, num_drafts = self.int("block_count"), self.int("nextn_predict_layers", default=0)
        if not num_drafts < num_blocks <= len(self._store):
            self.refuse("block_count", num_blocks, f"at most the {len(self._store)} tensors of the file, and not 0")
        return num_blocks - num_drafts

    def num_groups(self, default: tuple[int, int] | None) -> tuple[int, int]:
        """Groups of experts and how many of them may be used; `default` where neither is written."""
        keys = ("expert_group_count", "expert_group_used_count")
        if default is None or any(map(self.has, keys)):
            for key in keys:
                if not self.has(key):
                    raise UnsupportedError(
                        f"{self.where} has no {self.path}{key}.",
                        remedy="Converters from autumn 2025 on write it. Put the file into a folder with the published "
                        "config.json, which says it; or convert the model again.",
                    )
            return self.int(keys[0]), self.int(keys[1])
        return default

    def width(self, key: str, tensor: str) -> int:
        """Outputs of a projection of the experts, which the oldest files do not write; told from the stack."""
        pattern = re.compile(rf"blk\.\d+\.{tensor}(\.0)?\.weight")
        shape = next((entry.shape for name, entry in self._store.items() if pattern.fullmatch(name)), None)
        return self.int(key, default=REQUIRED if shape is None or len(shape) < 2 else shape[-2])

    def num_experts(self) -> int:
        """Experts of a layer; believed only if its router has as many rows."""
        count = self.int("expert_count")
        routers = (name for name in self._store if name.endswith(".ffn_gate_inp.weight"))
        num_rows = self.num_rows(next(routers, "blk.0.ffn_gate_inp.weight"))
        if count != num_rows:
            self.refuse("expert_count", count, f"the {num_rows} rows of a router")
        return count

    def small_tensor(self, name: str) -> list[float]:
        """A small tensor of float32 numbers."""
        tensor = self._store.read(name)
        if not tensor.is_floating_point() or tensor.dim() != 1:
            raise CheckpointError(f"Tensor {name!r} in {self._store.files[0]} is no list of numbers.")
        return [float(value) for value in tensor]

    def check_all_read(self) -> None:
        """Refuse what may change the model, and what nobody knows."""
        for _, key, value in self.unread():
            neutral = _NEUTRAL.get(key, ())
            if type(value) not in (bool, int, float) or value not in neutral:
                self.unsupported(key, value, " or ".join(map(repr, neutral)) or "nothing under this key")


def _common(metadata: _Metadata, architecture: str, norm_key: str = "layer_norm_rms_epsilon") -> Config:
    """What all but GPT-2 share, without the head's size."""
    heads = metadata.int("attention.head_count")
    return {
        "architectures": [architecture],
        "hidden_size": metadata.int("embedding_length"),
        "num_hidden_layers": metadata.num_layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.int("attention.head_count_kv", default=heads),
        "intermediate_size": metadata.int(
            "feed_forward_length", default=None if architecture in _WITHOUT_MLP else REQUIRED
        ),
        "hidden_act": "silu",
        "rms_norm_eps": metadata.number(f"attention.{norm_key}"),
        "max_position_embeddings": metadata.int("context_length"),
        "vocab_size": metadata.num_rows("token_embd.weight"),
        "tie_word_embeddings": not metadata.has_tensor("output.weight"),
        "attention_bias": metadata.has_tensor("blk.0.attn_q.bias"),
    }


def _decoder(metadata: _Metadata, architecture: str, norm_key: str = "layer_norm_rms_epsilon") -> Config:
    """`_common`, with heads of one size and rotary positions."""
    config = _common(metadata, architecture, norm_key)
    heads = config["num_attention_heads"]
    head_dim = metadata.int("attention.key_length", default=config["hidden_size"] // max(heads, 1))
    metadata.expect("attention.value_length", head_dim)
    rotary_dim = metadata.int("rope.dimension_count", default=head_dim)
    if not 0 < rotary_dim <= head_dim:
        metadata.refuse("rope.dimension_count", rotary_dim, f"1 to {head_dim}, the size of a head")
    config |= {"head_dim": head_dim, "rope_parameters": _rope(metadata, rotary_dim)}
    if rotary_dim != head_dim:
        config["rope_parameters"]["rotary_dim"] = rotary_dim
    return config


def _rope(metadata: _Metadata, rotary_dim: int) -> Config:
    """Scaling is linear unless a type is named, and there is none without a factor."""
    theta = metadata.number("rope.freq_base", 10000.0)
    if metadata.has_tensor("rope_factors_long.weight"):
        return {"rope_type": "longrope", "rope_theta": theta, **_longrope(metadata)}
    kind = metadata.get("rope.scaling.type")
    kind = "linear" if kind is None else kind
    # The second key is the older one; llama.cpp reads it where the first is missing.
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 0.0)) or 1.0
    if kind not in ("none", "linear", "yarn"):
        metadata.unsupported("rope.scaling.type", kind, _ROPE_KINDS)
    is_scaled = kind != "none" and factor != 1.0
    if metadata.has_tensor("rope_freqs.weight"):
        if is_scaled or kind == "yarn":
            metadata.unsupported("rope.scaling.factor", factor, "1, where the tensor rope_freqs.weight scales already")
        return {"rope_type": "llama3", "rope_theta": theta, **_llama3(metadata, theta, rotary_dim)}
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **_yarn(metadata)}
    if is_scaled:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _longrope(metadata: _Metadata) -> Config:
    """Phi-3's and its relatives', whose factors are tensors."""
    metadata.expect("rope.scaling.type", "none", "linear", "longrope")
    metadata.expect("rope.scaling.factor", 0.0, 1.0)
    config: Config = {
        f"{length}_factor": [float(str(np.float32(f))) for f in metadata.small_tensor(f"rope_factors_{length}.weight")]
        for length in ("short", "long")
    }
    config["original_max_position_embeddings"] = metadata.int("rope.scaling.original_context_length")
    if metadata.has("rope.scaling.attn_factor"):
        config["attention_factor"] = metadata.number("rope.scaling.attn_factor")
    return config


def _yarn(metadata: _Metadata) -> Config:
    metadata.expect("rope.scaling.yarn_ext_factor", 1.0, -1.0)  # llama.cpp's sign for: as the type says
    # Where a file does not say what length the model was trained with, it is the length that it has.
    trained = metadata.int("rope.scaling.original_context_length", default=0) or metadata.int("context_length")
    return {
        "original_max_position_embeddings": trained,
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", _YARN["beta_fast"]),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", _YARN["beta_slow"]),
    }


def _llama3(metadata: _Metadata, theta: float, rotary_dim: int) -> Config:
    """`rope_freqs` holds what each frequency is divided by; tell which published scaling made it."""
    divisors = metadata.small_tensor("rope_freqs.weight")
    factor = float(max(divisors, default=0.0))
    wavelengths = [2 * math.pi * theta ** (2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    low, original = _LLAMA3["low_freq_factor"], 8192

    def expected(high: float) -> list[float]:
        turns = [original / wavelength for wavelength in wavelengths]
        smooth = [min(max((t - low) / (high - low), 0.0), 1.0) if high > low else float(t >= low) for t in turns]
        return [1 / ((1 - part) / factor + part) if factor > 0 else 0.0 for part in smooth]

    # The second is Llama 4 Scout's: no passage between divided frequencies and others.
    ends = (_LLAMA3["high_freq_factor"], low)
    fitting = (h for h in ends if len(divisors) == len(wavelengths) and np.allclose(divisors, expected(h), 1e-5, 0))
    high = next(fitting, None)
    if high is None:
        metadata.unsupported("rope_freqs.weight", divisors, "the divisors of Llama 3.1 to 3.3 and Llama 4")
    return {"factor": factor, **_LLAMA3, "high_freq_factor": high}


def _experts(metadata: _Metadata) -> Config:
    """Counts; softmax over all experts without a factor, unless the family says otherwise."""
    count, used = metadata.num_experts(), metadata.int("expert_used_count")
    return {"num_experts": count, "num_local_experts": count, "num_experts_per_tok": used}


def _softmax_experts(metadata: _Metadata) -> Config:
    metadata.expect("expert_gating_func", _UNSAID, _SOFTMAX)
    metadata.expect("expert_weights_scale", 0.0, 1.0)
    return _experts(metadata)


def _llama(metadata: _Metadata) -> Config:
    window = metadata.int("attention.sliding_window", default=0) or None
    if not metadata.int("expert_count", default=0):
        config = _decoder(metadata, "LlamaForCausalLM")
        config["mlp_bias"] = metadata.has_tensor("blk.0.ffn_gate.bias")
        if window is not None:
            config |= {"architectures": ["MistralForCausalLM"], "sliding_window": window}
        return config
    config = _decoder(metadata, "MixtralForCausalLM") | _softmax_experts(metadata)
    metadata.expect("expert_weights_norm", True)
    return config | {"sliding_window": window}


def _plain(architecture: str) -> Callable[[_Metadata], Config]:
    return lambda metadata: _decoder(metadata, architecture)


def _qwen2_moe(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "Qwen2MoeForCausalLM") | _softmax_experts(metadata)
    return config | {
        "qkv_bias": config["attention_bias"],
        "moe_intermediate_size": metadata.width("expert_feed_forward_length", "ffn_gate(_up)?_exps"),
        "shared_expert_intermediate_size": metadata.width("expert_shared_feed_forward_length", "ffn_gate_shexp"),
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=False),
    }


def _qwen3_moe(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "Qwen3MoeForCausalLM") | _softmax_experts(metadata)
    return config | {
        "moe_intermediate_size": metadata.width("expert_feed_forward_length", "ffn_gate(_up)?_exps"),
        # Never written, and always true in the models of this architecture.
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=True),
    }


def _hybrid(metadata: _Metadata, architecture: str) -> Config:
    """Gated delta nets, with attention in every `full_attention_interval`th layer."""
    config = _decoder(metadata, architecture)
    key_heads, value_heads = metadata.int("ssm.group_count", low=1), metadata.int("ssm.time_step_rank", low=1)
    inner = metadata.int("ssm.inner_size", low=1)
    if inner % value_heads:
        metadata.refuse("ssm.inner_size", inner, f"a multiple of ssm.time_step_rank {value_heads}")
    metadata.pass_over(["rope.dimension_sections"])  # of images; a text's tokens have the same position on each axis
    interval = metadata.int("full_attention_interval", default=4, low=1)
    first_full = f"blk.{interval - 1}.attn_q.bias"
    return config | {
        "attention_bias": metadata.has_tensor(first_full),
        "full_attention_interval": interval,
        "linear_conv_kernel_dim": metadata.int("ssm.conv_kernel"),
        "linear_key_head_dim": metadata.int("ssm.state_size"),
        "linear_value_head_dim": inner // value_heads,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
    }


def _hybrid_experts(metadata: _Metadata) -> Config:
    return _softmax_experts(metadata) | {
        "moe_intermediate_size": metadata.width("expert_feed_forward_length", "ffn_gate(_up)?_exps"),
        "shared_expert_intermediate_size": metadata.width("expert_shared_feed_forward_length", "ffn_gate_shexp"),
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=True),
    }


def _qwen3_next(metadata: _Metadata) -> Config:
    config = _hybrid(metadata, "Qwen3NextForCausalLM") | _hybrid_experts(metadata)
    # Until the end of 2025 the converter left queries, keys, values and gates in one projection.
    return config | {"linear_grouped_values": metadata.has_tensor("blk.0.ssm_in.weight")}


def _qwen3_5(metadata: _Metadata) -> Config:
    config = _hybrid(metadata, "Qwen3_5ForCausalLM")
    return config | {"linear_tiled_heads": config["linear_num_value_heads"] != config["linear_num_key_heads"]}


def _qwen3_5_moe(metadata: _Metadata) -> Config:
    config = _hybrid(metadata, "Qwen3_5MoeForCausalLM") | _hybrid_experts(metadata)
    return config | {"linear_tiled_heads": config["linear_num_value_heads"] != config["linear_num_key_heads"]}


def _olmoe(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "OlmoeForCausalLM") | _softmax_experts(metadata)
    if metadata.has("attention.clamp_kqv"):
        config["clip_qkv"] = metadata.number("attention.clamp_kqv")
    return config | {"norm_topk_prob": metadata.bool("expert_weights_norm", default=False)}


def _gemma(metadata: _Metadata, architecture: str, largest: int, period: int) -> Config:
    """Gemma 2 and 3. The largest model of each, told by its number of layers, scales its scores by hidden size per head
    and all others by the size of a head, as llama.cpp has it; no key says so."""
    config = _decoder(metadata, architecture)
    num_layers = config["num_hidden_layers"]
    metadata.expect_pattern(period, num_layers)
    is_largest = num_layers == largest
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if is_largest else config["head_dim"],
        "sliding_window": metadata.int("attention.sliding_window"),
        "layer_types": [
            f"{'full' if (layer + 1) % period == 0 else 'sliding'}_attention" for layer in range(num_layers)
        ],
        **{key: metadata.number(key, 0.0) or None for key in ("attn_logit_softcapping", "final_logit_softcapping")},
    }


def _gemma3(metadata: _Metadata) -> Config:
    config = _gemma(metadata, "Gemma3ForCausalLM", 62, 6)
    local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 10000.0)}
    return config | {"rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local}}


def _phi3(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "Phi3ForCausalLM")
    trained = metadata.int("rope.scaling.original_context_length", default=config["max_position_embeddings"])
    return config | {
        "sliding_window": metadata.int("attention.sliding_window", default=0) or None,
        "original_max_position_embeddings": trained,
    }


def _olmo2(metadata: _Metadata) -> Config:
    """OLMo 3 where there is a window; its scaling is of the layers without one."""
    config = _decoder(metadata, "Olmo2ForCausalLM")
    window = metadata.int("attention.sliding_window", default=0)
    if not window:
        return config
    num_layers, rope = config["num_hidden_layers"], config["rope_parameters"]
    metadata.expect_pattern(4, num_layers)
    if rope["rope_type"] == "yarn" and rope["factor"] > 1:
        # What config.json calls `attention_factor`, under today's key or the older one; 1 says nothing. Nor does the
        # class's default, which float32 has rounded.
        written, default = metadata.number(metadata.present(*_YARN_FACTORS), 1.0), 0.1 * math.log(rope["factor"]) + 1
        if written != 1.0 and not math.isclose(written, default, rel_tol=1e-6):
            rope["attention_factor"] = written
    return config | {
        "architectures": ["Olmo3ForCausalLM"],
        "sliding_window": window,
        "layer_types": [f"{'full' if (layer + 1) % 4 == 0 else 'sliding'}_attention" for layer in range(num_layers)],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": rope["rope_theta"]},
        },
    }


def _smollm3(metadata: _Metadata) -> Config:
    # Every fourth layer without positions, told by the architecture.
    config = _decoder(metadata, "SmolLM3ForCausalLM")
    return config | {"no_rope_layer_interval": 4, "mlp_bias": metadata.has_tensor("blk.0.ffn_gate.bias")}


def _seed_oss(metadata: _Metadata) -> Config:
    return _decoder(metadata, "SeedOssForCausalLM") | {
        "attention_out_bias": metadata.has_tensor("blk.0.attn_output.bias"),
        "mlp_bias": metadata.has_tensor("blk.0.ffn_gate.bias"),
    }


def _mistral3(metadata: _Metadata) -> Config:
    """Ministral 3; Mistral Small 3.1 and 3.2 are of this architecture, too, without a scale that grows."""
    config = _decoder(metadata, "Ministral3ForCausalLM")
    config["sliding_window"] = metadata.int("attention.sliding_window", default=0) or None
    beta = metadata.number("attention.temperature_scale", 0.0)
    if not beta:
        return config | {"architectures": ["MistralForCausalLM"]}
    rope = config["rope_parameters"]
    if rope["rope_type"] != "yarn":
        metadata.unsupported("rope.scaling.type", rope["rope_type"], "yarn, where attention.temperature_scale is")
    metadata.expect("attention.temperature_length", rope["original_max_position_embeddings"])
    # All published models have an equal mscale.
    scale = metadata.number("rope.scaling.yarn_log_multiplier", 1.0)
    rope |= {"mscale": scale, "mscale_all_dim": scale, "llama_4_scaling_beta": beta}
    return config


def _ernie4_5(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "Ernie4_5ForCausalLM")
    return config | {"use_bias": config["attention_bias"]}


def _granite(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "GraniteForCausalLM")
    keys = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    config |= {name: metadata.number(key, 1.0) for name, key in keys.items()}
    return config | {"mlp_bias": metadata.has_tensor("blk.0.ffn_gate.bias")}


def _granite_moe(metadata: _Metadata) -> Config:
    # Softmax over the chosen experts' logits is what a softmax over all comes to when it is normalised.
    config = _granite(metadata) | _softmax_experts(metadata)
    shared = metadata.int("expert_shared_feed_forward_length", default=0)
    kind = "GraniteMoeSharedForCausalLM" if shared else "GraniteMoeForCausalLM"
    return config | {"architectures": [kind], "shared_intermediate_size": shared}


def _starcoder2(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "Starcoder2ForCausalLM", "layer_norm_epsilon")
    return config | {
        "norm_epsilon": config["rms_norm_eps"],
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": config["attention_bias"],
        # Converters do not write it; it is 4096 in all models.
        "sliding_window": metadata.int("attention.sliding_window", default=4096),
    }


def _gpt_oss(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "GptOssForCausalLM") | _experts(metadata)
    # Softmax over the chosen experts' logits, told by the architecture.
    metadata.expect("expert_gating_func", _UNSAID, _SOFTMAX, _SOFTMAX_OF_CHOSEN)
    metadata.expect("rope.freq_base_swa", metadata.number("rope.freq_base", 10000.0))
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False
    metadata.expect_pattern(2, config["num_hidden_layers"])
    types = [f"{('sliding', 'full')[layer % 2]}_attention" for layer in range(config["num_hidden_layers"])]
    return config | {
        "intermediate_size": metadata.int("expert_feed_forward_length", default=config["intermediate_size"]),
        "sliding_window": metadata.int("attention.sliding_window"),
        "layer_types": types,
        "swiglu_limit": 7.0,
    }


def _grouped_experts(metadata: _Metadata, groups: tuple[int, int] | None) -> Config:
    """DeepSeek's experts, with shared ones and dense layers first; `groups` where the file has no key for them."""
    used = metadata.int("expert_used_count")
    num_groups, num_used_groups = metadata.num_groups(groups)
    return {
        "n_routed_experts": metadata.num_experts(),
        "num_experts_per_tok": used,
        "moe_intermediate_size": metadata.width("expert_feed_forward_length", "ffn_gate_exps"),
        "n_shared_experts": metadata.int("expert_shared_count"),
        "first_k_dense_replace": metadata.int("leading_dense_block_count", default=0),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 1.0) or 1.0,
        # llama.cpp's 0 means that there are none.
        "n_group": max(num_groups, 1),
        "topk_group": max(num_used_groups, 1),
        "num_nextn_predict_layers": metadata.int("nextn_predict_layers", default=0),
    }


def _deepseek2(metadata: _Metadata) -> Config:
    gating = metadata.int("expert_gating_func", default=_UNSAID)
    if gating == _UNSAID:  # the first files; a bias per expert corrects sigmoid scores only
        gating = _SIGMOID if metadata.has_tensor_like(r"blk\.\d+\.exp_probs_b\.bias") else _SOFTMAX
    if gating not in (_SOFTMAX, _SIGMOID):
        metadata.unsupported("expert_gating_func", gating, "1 (softmax) or 2 (sigmoid)")
    is_v3 = gating == _SIGMOID
    config = _common(metadata, "DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM")
    config |= _grouped_experts(metadata, _GROUPS.get((config["num_hidden_layers"], metadata.num_experts())))
    rope_dim, latent = metadata.int("rope.dimension_count"), metadata.int("attention.kv_lora_rank")
    # Newer files describe attention as it runs on the latent vector, and the heads under keys of their own.
    is_absorbed = metadata.has("attention.key_length_mla")
    key_dim = metadata.int("attention.key_length_mla" if is_absorbed else "attention.key_length")
    value_dim = metadata.int("attention.value_length_mla" if is_absorbed else "attention.value_length")
    if is_absorbed:
        metadata.expect("attention.key_length", latent + rope_dim)
        metadata.expect("attention.value_length", latent)
    has_query_rank = metadata.has("attention.q_lora_rank")
    rope = _rope(metadata, rope_dim)
    if rope["rope_type"] == "yarn" and metadata.number("rope.scaling.yarn_log_multiplier", 0.0):
        # 0.1 × mscale_all_dim, in this architecture alone; all published models have an equal mscale.
        scale = float(f"{10 * metadata.number('rope.scaling.yarn_log_multiplier'):.6g}")
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    return config | {
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": metadata.int("attention.q_lora_rank") if has_query_rank else None,
        "kv_lora_rank": latent,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": value_dim,
        "rope_parameters": rope,
        "scoring_func": "sigmoid" if is_v3 else "softmax",
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=False),
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if config["n_group"] > 1 else "greedy",
    }


def _glm4_moe(metadata: _Metadata) -> Config:
    # All models of this architecture have one group, which older converters did not write.
    config = _decoder(metadata, "Glm4MoeForCausalLM") | _grouped_experts(metadata, (1, 1))
    metadata.expect("expert_gating_func", _UNSAID, _SIGMOID)
    return config | {
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=True),
        "use_qk_norm": metadata.has_tensor("blk.0.attn_q_norm.weight"),
    }


def _minimax_m2(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "MiniMaxM2ForCausalLM") | _experts(metadata)
    metadata.expect("expert_gating_func", _UNSAID, _SIGMOID)
    size = metadata.int("expert_feed_forward_length", default=config["intermediate_size"])
    return config | {"intermediate_size": size}


def _corrected_experts(metadata: _Metadata) -> Config:
    """`_grouped_experts` without groups, weighed by sigmoids."""
    metadata.expect("expert_gating_func", _UNSAID, _SIGMOID)
    normalises = metadata.bool("expert_weights_norm", default=True)
    return _grouped_experts(metadata, (1, 1)) | {"norm_topk_prob": normalises}


def _dots1(metadata: _Metadata) -> Config:
    # Converters write no window, and none of the models has one.
    return _decoder(metadata, "Dots1ForCausalLM") | _corrected_experts(metadata) | {"sliding_window": None}


def _exaone_moe(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "ExaoneMoeForCausalLM") | _corrected_experts(metadata)
    shared = config["n_shared_experts"]
    metadata.expect("expert_shared_feed_forward_length", shared * config["moe_intermediate_size"])
    config |= {"num_experts": config["n_routed_experts"], "num_shared_experts": shared}
    window = metadata.int("attention.sliding_window", default=0)
    if not window:
        metadata.unsupported("attention.sliding_window", window, "the window that all models of this architecture have")
    types = metadata.layer_types(config["num_hidden_layers"], default_period=4)
    return config | {"sliding_window": window, "layer_types": types}


def _ernie4_5_moe(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "Ernie4_5_MoeForCausalLM")
    metadata.expect("expert_gating_func", _UNSAID, _SOFTMAX)
    size = metadata.int("expert_feed_forward_length")
    shared = metadata.int("expert_shared_count", default=0)
    # What converters write is the width of a dense layer divided by the number of KV heads, whatever is shared.
    metadata.pass_over({"expert_shared_feed_forward_length"})
    if shared and metadata.width("", "ffn_gate_shexp") != shared * size:
        metadata.unsupported("expert_shared_count", shared, f"experts of {size} outputs in ffn_gate_shexp")
    return config | {
        "use_bias": config["attention_bias"],
        "moe_num_experts": metadata.num_experts(),
        "moe_k": metadata.int("expert_used_count"),
        "moe_intermediate_size": size,
        "moe_num_shared_experts": shared,
        "moe_layer_start_index": metadata.int("leading_dense_block_count", default=0),
        "moe_layer_interval": metadata.int("interleave_moe_layer_step", default=1),
    }


def _hunyuan_moe(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "HunYuanMoEV1ForCausalLM") | _softmax_experts(metadata)
    metadata.expect("expert_shared_count", 0, 1)
    metadata.pass_over({"rope.scaling.original_context_length"})  # told with a base that is stretched already
    for key in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
        metadata.expect(key, config["intermediate_size"])
    return config | {"moe_topk": config["num_experts_per_tok"]}


def _llama4(metadata: _Metadata) -> Config:
    config = _decoder(metadata, "Llama4ForCausalLM") | _experts(metadata)
    metadata.expect("expert_gating_func", _UNSAID, _SIGMOID)
    metadata.expect("leading_dense_block_count", 0)
    metadata.pass_over({"attention.sliding_window"})  # llama.cpp takes 8192, and sets the sizes below likewise
    return config | {
        "intermediate_size_mlp": config["intermediate_size"],
        "intermediate_size": metadata.int("expert_feed_forward_length"),
        "interleave_moe_layer_step": metadata.int("interleave_moe_layer_step", default=1),
        "use_qk_norm": config["num_experts"] != 128,
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }


def _gpt2(metadata: _Metadata) -> Config:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": metadata.int("embedding_length"),
        "n_layer": metadata.num_layers(),
        "n_head": metadata.int("attention.head_count"),
        "n_positions": metadata.int("context_length"),
        "n_inner": metadata.int("feed_forward_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "vocab_size": metadata.num_rows("token_embd.weight"),
        "tie_word_embeddings": not metadata.has_tensor("output.weight"),
    }


ARCHITECTURES: Mapping[str, Callable[[_Metadata], Config]] = {
    "llama": _llama,
    "xverse": _plain("XverseForCausalLM"),
    "qwen2": _plain("Qwen2ForCausalLM"),
    "qwen3": _plain("Qwen3ForCausalLM"),
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "qwen3next": _qwen3_next,
    "qwen35": _qwen3_5,
    "qwen35moe": _qwen3_5_moe,
    "gemma2": lambda metadata: _gemma(metadata, "Gemma2ForCausalLM", 46, 2),
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "smollm3": _smollm3,
    "seed_oss": _seed_oss,
    "mistral3": _mistral3,
    "ernie4_5": _ernie4_5,
    "granite": _granite,
    "starcoder2": _starcoder2,
    "olmoe": _olmoe,
    "granitemoe": _granite_moe,
    "minimax-m2": _minimax_m2,
    "dots1": _dots1,
    "exaone-moe": _exaone_moe,
    "ernie4_5-moe": _ernie4_5_moe,
    "hunyuan-moe": _hunyuan_moe,
    "llama4": _llama4,
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek2,
    "glm4moe": _glm4_moe,
    "gpt2": _gpt2,
}
# What transformers calls the architectures.
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "XverseForCausalLM": "xverse",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "SmolLM3ForCausalLM": "smollm3",
    "SeedOssForCausalLM": "seed_oss",
    "Ministral3ForCausalLM": "ministral3",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "GraniteForCausalLM": "granite",
    "Starcoder2ForCausalLM": "starcoder2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
    "GptOssForCausalLM": "gpt_oss",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Glm4MoeForCausalLM": "glm4_moe",
    "GraniteMoeForCausalLM": "granitemoe",
    "GraniteMoeSharedForCausalLM": "granitemoeshared",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "Dots1ForCausalLM": "dots1",
    "ExaoneMoeForCausalLM": "exaone_moe",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "HunYuanMoEV1ForCausalLM": "hunyuan_v1_moe",
    "Llama4ForCausalLM": "llama4_text",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "GPT2LMHeadModel": "gpt2",
}
