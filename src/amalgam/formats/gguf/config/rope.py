"""Rotary positions and their scaling, told from keys and from tensors of factors."""

from __future__ import annotations

import math

import numpy as np

from amalgam.formats.gguf.config.metadata import Config, Metadata

# Llama 3.1 to 3.3 differ in the factor only.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
_ROPE_KINDS = "none, linear, yarn, and the tables of Llama 3 and of LongRoPE"


def rope_parameters(metadata: Metadata, rotary_dim: int) -> Config:
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


def _longrope(metadata: Metadata) -> Config:
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


def _yarn(metadata: Metadata) -> Config:
    metadata.expect("rope.scaling.yarn_ext_factor", 1.0, -1.0)  # llama.cpp's sign for: as the type says
    # Where a file does not say what length the model was trained with, it is the length that it has.
    trained = metadata.int("rope.scaling.original_context_length", default=0) or metadata.int("context_length")
    return {
        "original_max_position_embeddings": trained,
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", _YARN["beta_fast"]),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", _YARN["beta_slow"]),
    }


def _llama3(metadata: Metadata, theta: float, rotary_dim: int) -> Config:
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
