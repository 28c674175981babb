"""Tiny random models, saved as checkpoints, and the references that their logits are compared with."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from amalgam.models.spec import Family
from tests.models import xverse

BASE_CONFIG = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EOS = 2
# Gemma 4's mixture: no keys that layers share, values that are keys.
GEMMA4_MOE = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
}
_LEARNED_BUFFERS = ("e_score_correction_bias", "expert_bias", "layer_scalar", "rotary_emb.alpha")
_VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}


class Reference(Protocol):
    """An independent implementation of a model."""

    def logits(self, prompt: list[int]) -> Tensor:
        """float32 `[tokens, vocabulary]`."""


class HuggingFace:
    """A model of a Hugging Face class."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, prompt: list[int]) -> Tensor:
        with torch.inference_mode():
            result: Tensor = self.model(torch.tensor([prompt])).logits[0].float()
        return result


def tiny_model(family: Family, **changes: Any) -> Any:
    """A float32 model of the family's Hugging Face class, with random values everywhere: norms left at 1, biases and
    router corrections left at 0 would prove nothing."""
    import transformers

    model_class = getattr(transformers, changes.pop("architecture", family.architectures[0]))
    settings = deepcopy({**BASE_CONFIG, **family.tiny_config, **changes})  # some classes write into what they are given
    if not _has_vision(model_class):
        return random_model(model_class, model_class.config_class(**settings))
    return random_model(model_class, class_config(model_class, settings))


def text_config_class(model_class: Any) -> Any:
    """The class of a model's configuration, or of its text part's."""
    whole = model_class.config_class
    return whole.sub_configs["text_config"] if _has_vision(model_class) else whole


def class_config(model_class: Any, settings: dict[str, Any]) -> Any:
    """A class's configuration of these settings, which are those of its text part if it has more."""
    text = text_config_class(model_class).from_dict(settings)
    if not _has_vision(model_class):
        return text
    is_tied = settings.get("tie_word_embeddings", False)
    return model_class.config_class(text_config=text.to_dict(), vision_config=_VISION, tie_word_embeddings=is_tied)


def _has_vision(model_class: Any) -> bool:
    return "vision_config" in (model_class.config_class.sub_configs or ())


def random_model(model_class: Any, config: Any) -> Any:
    """The same of a class and its config."""
    torch.default_generator.manual_seed(7)
    model = model_class._from_config(config, experts_implementation="eager", attn_implementation="eager").float().eval()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(_LEARNED_BUFFERS)]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            if "bias" in name or name.endswith("sinks"):
                tensor.normal_(0, 0.2)
            elif tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("conv1d.weight", "conv.conv.weight")):
                tensor.uniform_(-1, 1)
            else:
                tensor.mul_(4.0)  # the default 0.02 makes every logit alike
    return model


def model_with(weights: dict[str, Tensor], model_class: Any, config: Any) -> Any:
    """A model of a class under another config, with given weights; None if it has others."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = (
            model_class._from_config(config, experts_implementation="eager", attn_implementation="eager").float().eval()
        )
    model.tie_weights()
    own = model.state_dict()
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in weights.items()}:
        return None
    model.load_state_dict(weights)
    return model if all(torch.equal(own[name], tensor) for name, tensor in weights.items()) else None  # tied, or not


@dataclass(frozen=True)
class _Saved:
    files: dict[str, bytes]
    reference: Reference
    random_state: Tensor  # behind its making


class _Copy:
    """A copy of a reference, made when it is first asked: most tests look at the files alone."""

    def __init__(self, original: Reference) -> None:
        self._original = original

    @cached_property
    def _own(self) -> Any:
        return deepcopy(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def logits(self, prompt: list[int]) -> Tensor:
        result: Tensor = self._own.logits(prompt)
        return result


_saved: dict[tuple[str, torch.dtype, str], _Saved] = {}
_MAX_SAVED = 96  # of half a megabyte each: those of every family, which several files of tests use


def save_tiny(family: Family, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Reference:
    """Make a tiny model and save it in `folder`. The latest ones are copied: to make and save one takes long."""
    key = family.name, dtype, repr(changes)
    found = _saved.pop(key, None) or _save(family, dtype, changes)
    _saved[key] = found
    if len(_saved) > _MAX_SAVED:
        del _saved[next(iter(_saved))]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in found.files.items():
        (folder / name).write_bytes(content)
    torch.default_generator.set_state(found.random_state)
    return _Copy(found.reference)


def _save(family: Family, dtype: torch.dtype, changes: dict[str, Any]) -> _Saved:
    with TemporaryDirectory() as name:
        folder = Path(name)
        if family.name == "xverse":
            reference = xverse.save(folder, {**BASE_CONFIG, **family.tiny_config, **changes}, dtype)
        else:
            model = tiny_model(family, **changes).to(dtype)
            model.save_pretrained(folder)
            reference = HuggingFace(model)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return _Saved(files, reference, torch.default_generator.get_state())


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A checkpoint of the given tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
