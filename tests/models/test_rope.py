"""RoPE variants against the Hugging Face functions; which table a length-dependent one takes; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.errors import CheckpointError, UnsupportedError
from amalgam.models.families.llama import FAMILY as LLAMA
from amalgam.models.reading.rope import read_rope
from amalgam.models.rope import Rope
from amalgam.models.spec import ConfigReader
from tests.errors import raises
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny

CPU = torch.device("cpu")
CONFIG = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 131072}
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(32)], "long_factor": [1.0 + 0.7 * i for i in range(32)]}
PUBLISHED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn_qwen": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_deepseek": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.8,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn_gpt_oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn_given_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    "longrope_phi": {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 4096},
    "longrope_factor": {
        "rope_type": "longrope",
        **FACTORS,
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
    },
    "longrope_given": {
        "rope_type": "longrope",
        **FACTORS,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 4096,
    },
}


def read(settings: dict[str, Any], **more: Any) -> Rope:
    config = {**CONFIG, "rope_theta": 1e6, "rope_scaling": settings, **more}
    return read_rope(ConfigReader(config, "config.json"), head_dim=64)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("num_positions", [4096, 5000])
def test_tables_equal_the_hugging_face_functions(name: str, num_positions: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = PUBLISHED[name]
    config = LlamaConfig(**CONFIG, rope_parameters={**settings, "rope_theta": 1e6})
    kind = settings.get("rope_type", settings.get("type"))
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=num_positions)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    cos, sin = read(settings).tables(num_positions, CPU)
    torch.testing.assert_close(cos, angles.cos() * factor, atol=0, rtol=0)
    torch.testing.assert_close(sin, angles.sin() * factor, atol=0, rtol=0)


def test_dynamic_changes_nothing_up_to_the_declared_length() -> None:
    """And longer sequences are refused: the spec's `max_positions` is that length."""
    for tables in zip(
        read({"type": "dynamic", "factor": 4.0}).tables(256, CPU), read({}).tables(256, CPU), strict=True
    ):
        assert torch.equal(*tables)


def test_original_length_beside_the_settings_counts_first() -> None:
    settings = PUBLISHED["longrope_phi"]
    assert read(settings, original_max_position_embeddings=2048) == read(
        {**settings, "original_max_position_embeddings": 2048}
    )


def test_longrope_takes_the_long_factors_where_long_sequences_are_served(tmp_path: Path) -> None:
    """One choice for all tokens: then the Hugging Face class agrees on prompts beyond the original length."""
    short, long = [1.0 + 0.2 * i for i in range(8)], [1.0 + 3.0 * i for i in range(8)]
    settings = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long}
    reference = save_tiny(LLAMA, tmp_path, rope_parameters={**settings, "original_max_position_embeddings": 32})
    prompt = list(range(3, 64))
    served_long, served_short = (
        Runner(*load_model(tmp_path, max_positions=served), blocks_each=40) for served in (256, 32)
    )
    logits = served_long.step({0: prompt})[0]
    torch.testing.assert_close(logits, reference.logits(prompt), atol=1e-4, rtol=0)
    torch.testing.assert_close(served_short.step({0: prompt[:32]})[0], reference.logits(prompt[:32]), atol=1e-4, rtol=0)
    assert not torch.allclose(logits[:32], reference.logits(prompt[:32]), atol=1e-2)


REFUSED: dict[str, dict[str, Any]] = {
    "unknown type": {"rope_type": "mrope"},
    "type of another kind": {"rope_type": ["yarn"]},
    "unknown setting": {"rope_type": "default", "turns": [16, 24, 24]},
    "setting of another type": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32},
    "settings by layer type": {"full_attention": {"rope_type": "default"}},
    "no factor": {"rope_type": "linear"},
    "factor zero": {"rope_type": "yarn", "factor": 0},
    "factor infinite": {"rope_type": "yarn", "factor": float("inf")},
    "factor true": {"rope_type": "linear", "factor": True},
    "original length one": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1},
    "theta one": {"rope_type": "default", "rope_theta": 1.0},
    "bounds crossed": {**PUBLISHED["llama3"], "low_freq_factor": 4.5},
    "too few factors": {**PUBLISHED["longrope_phi"], "long_factor": [1.0, 2.0]},
    "no factors": {key: value for key, value in PUBLISHED["longrope_phi"].items() if key != "long_factor"},
    "no list": {**PUBLISHED["longrope_phi"], "short_factor": 2.0},
    "factor below zero": {**PUBLISHED["longrope_phi"], "short_factor": [-1.0] * 32},
    "truncate a number": {**PUBLISHED["yarn_qwen"], "truncate": 1},
    "odd share": {"rope_type": "default", "partial_rotary_factor": 0.05},
    "share above one": {"rope_type": "default", "partial_rotary_factor": 1.5},
}


@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused_by_name(settings: dict[str, Any]) -> None:
    with raises((CheckpointError, UnsupportedError), "config.json"):
        read(settings)


def test_two_settings_that_differ_are_refused() -> None:
    with raises(UnsupportedError, "rope_scaling", "rope_parameters"):
        read({"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
