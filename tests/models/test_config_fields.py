"""Every field of a config.json, set to something else: we compute what the Hugging Face class computes, or refuse it.

The fields are those of the class itself, as it would save them, and some that other classes have: one that a class
ignores must not change our result either.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.errors import AmalgamError, CheckpointError, UnsupportedError
from amalgam.models.decoder import Decoder
from amalgam.models.registry import all_families, read_spec
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion
from tests.errors import is_named, raises
from tests.models.harness import CPU, Runner, load_model
from tests.models.test_families import config_of
from tests.models.tiny import HuggingFace, class_config, model_with, random_model, tiny_model

FAMILIES = {family.name: family for family in all_families() if family.name != "xverse"}
PROMPT = list(range(3, 43))
# Of these the logits of a given prompt do not hang.
NOT_OF_THE_DECODER = {
    *("architectures", "dtype", "model_type", "transformers_version", "_name_or_path", "problem_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "is_encoder_decoder"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("initializer_range", "router_aux_loss_coef", "chunk_size_feed_forward"),
}
# Where a class has more than a text part, which it takes long to make, only what is its own.
OWN_FIELDS = {
    "mistral_large4": (
        *("final_logit_softcapping", "first_k_dense_replace", "head_dim", "index_topk", "kv_source_layers"),
        "no_rope_layers",
    )
}
_WINDOWED = {"use_sliding_window": True, "sliding_window": 4}
_WINDOW_FIELDS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
# Starting points other than the tiny configuration, and the fields whose meaning depends on them.
BASES: dict[str, list[tuple[dict[str, Any], tuple[str, ...]]]] = {
    "qwen2": [(_WINDOWED, _WINDOW_FIELDS), ({**_WINDOWED, "max_window_layers": 1}, _WINDOW_FIELDS)],
    "qwen3": [(_WINDOWED, _WINDOW_FIELDS), ({**_WINDOWED, "max_window_layers": 1}, _WINDOW_FIELDS)],
    "qwen3_moe": [(_WINDOWED, _WINDOW_FIELDS)],
    "qwen2_moe": [({**_WINDOWED, "layer_types": ["sliding_attention", "full_attention"]}, _WINDOW_FIELDS)],
    "mixtral": [({"sliding_window": 4}, _WINDOW_FIELDS)],
    "phimoe": [({"sliding_window": 4}, _WINDOW_FIELDS)],
    "mistral": [({"sliding_window": None}, _WINDOW_FIELDS)],
    "phi3": [({"sliding_window": 4}, _WINDOW_FIELDS)],
    "starcoder2": [({"sliding_window": 4}, _WINDOW_FIELDS)],
    "ministral3": [({"sliding_window": 4}, _WINDOW_FIELDS)],
    "smollm3": [
        (_WINDOWED, (*_WINDOW_FIELDS, "no_rope_layers")),
        ({"no_rope_layers": None, "layer_types": None}, ("no_rope_layers", "no_rope_layer_interval")),
    ],
    "deepseek_v2": [
        (
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
            ("topk_method", "n_group", "topk_group", "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob"),
        )
    ],
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
SLIDING, FULL = "sliding_attention", "full_attention"
# Or not at all.
PARTLY_ROTATED = {
    "glm4_moe",
    "gpt2",
    "minimax_m2",
    "mistral4",
    "phi3",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
}
# Of any class: fields → values to try.
VALUES: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "relu"],
    "activation_function": ["relu", "gelu"],
    "use_sliding_window": [True],
    "sliding_window": [3, None],
    "max_window_layers": [0, 1, 2],
    "layer_types": [[SLIDING, FULL], [FULL, SLIDING], [SLIDING, SLIDING], [FULL, FULL], None],
    "rope_parameters": [_LINEAR, {**_PLAIN, "rope_theta": 500.0}, {**_PLAIN, "partial_rotary_factor": 0.5}, None],
    "rope_scaling": [{"type": "linear", "factor": 3.0}],
    "rope_theta": [500.0],
    "partial_rotary_factor": [0.5, 1.0],
    "original_max_position_embeddings": [8],
    "max_position_embeddings": [16],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "qkv_bias": [True, False],
    "use_qk_norm": [True, False],
    "tie_word_embeddings": [True, False],
    "attn_logit_softcapping": [2.0],
    "final_logit_softcapping": [2.0],
    "attention_multiplier": [0.3],
    "embedding_multiplier": [3.0],
    "logits_scaling": [2.0],
    "residual_multiplier": [0.5],
    "hidden_activation": ["gelu", "relu"],
    "query_pre_attn_scalar": [7],
    "use_bidirectional_attention": [True],
    "no_rope_layers": [[0, 1], [1, 1], [0, 0], [1, 1, 0, 1]],
    "kv_source_layers": [[0, 0, 2, 3]],
    "no_rope_layer_interval": [1, 2, 3],
    "use_bias": [True, False],
    "attention_out_bias": [True, False],
    "pretraining_tp": [2],
    "clip_qkv": [0.3, None],
    "swiglu_limit": [0.3],
    "swiglu_alpha": [1.1],
    "norm_topk_prob": [True, False, None],
    "scoring_func": ["sigmoid", "softmax"],
    "topk_method": ["greedy", "group_limited_greedy", "noaux_tc"],
    "routed_scaling_factor": [3.0],
    "router_jitter_noise": [0.1],
    "input_jitter_noise": [0.4],
    "n_group": [1, 2],
    "topk_group": [1],
    "num_experts_per_tok": [1, 3],
    "moe_top_k": [1],
    "num_experts_per_token": [1],
    "mlp_only_layers": [[0], [0, 1], None],
    "decoder_sparse_step": [2],
    "first_k_dense_replace": [0, 2],
    "moe_layer_freq": [2],
    "rope_interleave": [False, None],
    "num_nextn_predict_layers": [0, 1],
    "scale_attn_weights": [False],
    "scale_attn_by_inverse_layer_idx": [True],
    "reorder_and_upcast_attn": [True],
    "add_cross_attention": [True],
}


pytestmark = pytest.mark.usefixtures("brief_configs")


@pytest.fixture(scope="module", autouse=True)
def no_generation() -> Iterator[None]:
    """How a class would generate takes a third of the making of a model, and nothing here generates."""
    from transformers import GenerationConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationConfig, "from_model_config", lambda config: GenerationConfig())
        yield


def alternatives(key: str, value: Any) -> list[Any]:
    """What else a field could hold."""
    if key in VALUES:
        return VALUES[key]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value]
    if isinstance(value, float):
        return [2 * value + 0.1]
    return [2] if value is None else []


def changes(config: dict[str, Any], fields: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key in fields or sorted((config.keys() | VALUES.keys()) - NOT_OF_THE_DECODER):
        for value in alternatives(key, config.get(key)):
            if key not in config or config[key] != value:
                yield key, value


def is_same(logits: Tensor, expected: Tensor) -> bool:
    """A token whose routing hangs on a rounding may differ."""
    differences = (logits - expected).abs().amax(-1)
    return bool(differences.quantile(0.85) < 1e-4)


class Case:
    """A starting point of a family: its class's model, and ours."""

    def __init__(self, name: str, folder: Path, base: dict[str, Any]) -> None:
        import transformers

        self.family, self.folder = FAMILIES[name], folder
        model = tiny_model(self.family, **base)
        model.save_pretrained(folder)
        self.weights = model.state_dict()
        self.config: dict[str, Any] = json.loads(json.dumps(config_of(name, **base)))
        (folder / "config.json").write_text(json.dumps(self.config))
        self.decoder, self.version = load_model(folder)
        self.model_class = getattr(transformers, self.family.architectures[0])
        assert is_same(self.run(self.decoder, self.version), HuggingFace(model).logits(PROMPT))

    def of_the_class(self, config: dict[str, Any]) -> tuple[Any, bool, Tensor] | None:
        """A model of the class under another config, with our weights if it can have them; whether it has them; and
        its logits. None if the class cannot have the config."""
        for make in (partial(model_with, self.weights), random_model):
            with contextlib.suppress(Exception):  # its complaints have many types
                model = make(self.model_class, class_config(self.model_class, copy.deepcopy(config)))
                if model is not None:
                    return model, make is not random_model, HuggingFace(model).logits(PROMPT)
        return None

    def of_us(self, config: dict[str, Any], model: Any, is_alike: bool) -> Tensor:
        _, spec = read_spec(config, "config.json")
        if is_alike and spec.slots == self.decoder.spec.slots:
            weights = {slot: self.version[slot] for slot in self.version.origins}
            version = WeightVersion(2, weights, self.version.origins, self.version.keys)
            return self.run(Decoder(spec, 256, torch.float32, CPU), version)
        changed = self.folder / "changed"
        model.save_pretrained(changed)
        (changed / "config.json").write_text(json.dumps(config))
        return self.run(*load_model(changed))

    def run(self, decoder: Decoder, version: WeightVersion) -> Tensor:
        return Runner(decoder, version, num_sequences=1).step({0: PROMPT})[0]

    def spec_of(self, key: str, value: Any) -> ModelSpec | None:
        """What we read; None if it is refused, which has to name a key."""
        config = {**self.config, key: value}
        try:
            return read_spec(config, "config.json")[1]
        except AmalgamError as error:
            message = str(error)
        assert any(name in message for name in (*config, *(value if isinstance(value, dict) else ()))), message
        return None

    def reads_nothing_of(self, changes: dict[str, Any]) -> bool:
        try:
            return read_spec({**self.config, **changes}, "config.json")[1] == self.decoder.spec
        except AmalgamError:
            return False

    def compare(self, changes: dict[str, Any]) -> str | None:
        """What is wrong with the result under other fields; empty if nothing, None if there is none to compare."""
        config = {**self.config, **changes}
        found = self.of_the_class(config)
        if found is None:
            return None
        *model, expected = found
        return "" if is_same(self.of_us(config, *model), expected) else f"{changes}: computed otherwise"

    def compare_together(self, changes: dict[str, Any]) -> list[tuple[str, int]]:
        """What is wrong, of how many fields; by halves if the class cannot have them all or together they are read."""
        is_one = len(changes) == 1
        problem = self.compare(changes) if is_one or self.reads_nothing_of(changes) else None
        if problem is not None:
            return [(problem, len(changes))]
        items, middle = list(changes.items()), len(changes) // 2
        halves = [] if is_one else [dict(items[:middle]), dict(items[middle:])]
        return [result for half in halves for result in self.compare_together(half)]


# Families whose layers differ by type, so that any choice is one of theirs.
OWN_TYPES = ("dots1", "exaone_moe", "gpt_oss", "qwen2_moe", "gemma2", "gemma3", "olmo3")
CASES = [
    (name, base, fields) for name in FAMILIES for base, fields in (({}, OWN_FIELDS.get(name, ())), *BASES.get(name, []))
]


@pytest.mark.parametrize(("name", "base", "fields"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_field_means_what_the_class_makes_of_it(
    name: str, base: dict[str, Any], fields: tuple[str, ...], tmp_path: Path
) -> None:
    case = Case(name, tmp_path, base)
    unread: list[dict[str, Any]] = []  # what we do not read: many fields at once, since to make a model takes long
    alone: list[dict[str, Any]] = []
    for key, value in changes(case.config, fields):
        spec = case.spec_of(key, value)
        if spec is None:
            continue  # refused
        if spec == case.decoder.spec:
            together = next((fields for fields in unread if key not in fields), None)
            if together is None:
                unread.append(together := {})
            together[key] = value
        elif key in VALUES or spec.slots == case.decoder.spec.slots:  # other sizes have tests enough
            alone.append({key: value})
    found = [result for change in (*unread, *alone) for result in case.compare_together(change)]
    assert [problem for problem, _ in found if problem] == []
    num_compared = sum(num_fields for _, num_fields in found)
    assert num_compared > (1 if fields else 5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"layer_types": [SLIDING, FULL]}) for name in FAMILIES if name not in OWN_TYPES),
        *((name, {"partial_rotary_factor": 0.5}) for name in sorted(FAMILIES.keys() - PARTLY_ROTATED)),
        ("qwen3_moe", {**_WINDOWED, "layer_types": [SLIDING, FULL]}),
        ("gpt_oss", {"sliding_window": None}),
        ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "twisted"}}}),
        ("gemma2", {"hidden_activation": "relu"}),
        ("olmo3", {"rope_theta": 10000.0}),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
        ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("smollm3", {"no_rope_layers": [1]}),
        ("granite", {"logits_scaling": 0.0}),
        ("llama", {"layer_types": ["linear_attention", FULL]}),
    ],
    ids=str,
)
def test_fields_that_a_class_cannot_follow_are_refused_by_name(name: str, changes: dict[str, Any]) -> None:
    with raises((CheckpointError, UnsupportedError)) as refused:
        read_spec(config_of(name) | changes, "config.json")
    assert any(is_named(key, str(refused.value)) for key in ("layer_types", *changes))


@pytest.mark.parametrize(
    ("name", "absent", "rest"),
    [
        ("qwen2", "max_window_layers", {**_WINDOWED, "num_hidden_layers": 30}),
        ("qwen3", "max_window_layers", {**_WINDOWED, "num_hidden_layers": 30}),
        ("qwen3", "sliding_window", {"use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3_moe", "sliding_window", {"use_sliding_window": True}),
        *(
            (name, "num_key_value_heads", {"num_attention_heads": 32, "head_dim": 4, "hidden_size": 128})
            for name in ("mistral", "mixtral", "qwen3", "qwen3_moe", "gpt_oss", "glm4_moe", "dots1", "minimax_m2")
        ),
    ],
)
def test_what_is_missing_has_the_classs_default(name: str, absent: str, rest: dict[str, Any]) -> None:
    import transformers

    base = config_of(name) | rest
    base.pop("layer_types", None)
    config = {key: value for key, value in base.items() if key != absent}
    config_class = getattr(transformers, FAMILIES[name].architectures[0]).config_class
    completed = config_class.from_dict(json.loads(json.dumps(config))).to_dict()
    completed = {**completed, "architectures": config["architectures"]}
    assert read_spec(config, "config.json")[1] == read_spec(completed, "config.json")[1]
