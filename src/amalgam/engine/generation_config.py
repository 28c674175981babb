"""How a model's makers want it sampled: `generation_config.json`, or the `general.sampling.*` keys of a GGUF file.

In: the base checkpoint's folder and metadata. Out: the parameters that a request gets where it says nothing, and what
of the file is not honoured. Must never know: requests, HTTP.

The file is advice, so that nothing in it keeps a model from being served: what cannot be used is told in one line of
the log and in `GET /model_info`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amalgam.base.folders import is_present, member
from amalgam.base.strict_json import read_advice
from amalgam.engine.params import SamplingParams
from amalgam.errors import RequestError, describe

FILE = "generation_config.json"
_MAX_BYTES = 2**20
_USED = (
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "do_sample", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "min_tokens", "stop",
)  # fmt: skip
_NAMES = {"min_new_tokens": "min_tokens", "stop_strings": "stop"}  # of transformers, where ours are others
_GGUF_PREFIX = "general.sampling."
_GGUF_NAMES = {
    "temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}  # fmt: skip
# What says nothing about which token comes next, or is read elsewhere, and values that switch their feature off.
_UNRELATED = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "_commit_hash",
    "_from_model_config", "use_cache", "cache_implementation", "cache_config", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "num_return_sequences",
    "disable_compile", "compile_config", "return_legacy_cache", "low_memory", "is_assistant", "max_time",
    "trust_remote_code", "custom_generate",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "diversity_penalty": (0,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False, True),  # scales probabilities, and none of ours depends on their sum
    "token_healing": (False,),
    "guidance_scale": (1,),
    "top_h": (1,),
}

logger = logging.getLogger("amalgam.engine")


@dataclass(frozen=True)
class ModelDefaults:
    """What requests get where they say nothing.

    Attributes:
        params: our own defaults, with the model's in place of those that it has.
        from_model: the fields that the model has set.
        not_honoured: what else its file says, by key; of a key that stands twice, what it says first.
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    from_model: Mapping[str, Any] = field(default_factory=dict)
    not_honoured: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What `GET /model_info` tells."""
        values = {name: getattr(self.params, name) for name in _USED} | {"stop": list(self.params.stop)}
        not_honoured = {key: describe(value) for key, value in self.not_honoured.items()}
        return {**values, "from_model": sorted(self.from_model), "not_honoured": not_honoured}


def read_model_defaults(folder: Path, gguf_metadata: Mapping[str, Any] | None = None) -> ModelDefaults:
    """Read the defaults of the base checkpoint, and log what cannot be honoured.

    Args:
        folder: a folder, or a GGUF file.

    Raises:
        CheckpointError: the file is no JSON object, or lies outside of the folder.
    """
    given, not_honoured = dict(_gguf_entries(gguf_metadata or {})), dict[str, Any]()
    source = "the GGUF file"
    if folder.is_dir() and is_present(folder / FILE):
        (given, not_honoured), source = read_advice(member(folder, FILE), _MAX_BYTES), FILE
    used: dict[str, Any] = {}
    for key, value in given.items():
        if value is None or key in _UNRELATED or _is_neutral(key, value):
            continue
        name = _NAMES.get(key, key)
        if name in _USED and (converted := _usable(name, value)) is not None:
            used[name] = converted
        else:
            not_honoured[key] = value
    if not_honoured:
        listed = ", ".join(f"{key} = {describe(value)}" for key, value in not_honoured.items())
        logger.warning("%s: not honoured: %s", source, describe(listed, 1000))
    return ModelDefaults(SamplingParams(**used), used, not_honoured)


def _usable(name: str, value: Any) -> Any:
    """`value` as the field has it; None if it is out of range."""
    if name in ("top_k", "max_new_tokens", "min_tokens") and isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        return getattr(SamplingParams(**{name: value}), name)
    except RequestError:
        return None


def _is_neutral(key: str, value: Any) -> bool:
    return value in ([], {}, "") or any(value == neutral for neutral in _NEUTRAL.get(key, ()))


def _gguf_entries(metadata: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in metadata.items():
        if key.startswith(_GGUF_PREFIX):
            name = key.removeprefix(_GGUF_PREFIX)
            yield _GGUF_NAMES.get(name, key), value
