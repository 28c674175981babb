"""Tiny random models of the Hugging Face classes, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amalgam.models.spec import Family

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


def tiny_model(family: Family, **changes: Any) -> Any:
    """A float32 model of the family's Hugging Face class. Norms and biases get random values: left at 1 and 0 they
    would prove nothing."""
    import transformers

    model_class = getattr(transformers, family.architectures[0])
    config = model_class.config_class(**{**BASE_CONFIG, **family.tiny_config, **changes})
    torch.manual_seed(7)
    model = model_class._from_config(config, experts_implementation="eager", attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.2)
            else:
                parameter.mul_(4.0)  # the default 0.02 makes every logit alike
    return model


def save_tiny(family: Family, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Make a tiny model and save it in `folder`; returns the Hugging Face model."""
    model = tiny_model(family, **changes).to(dtype)
    model.save_pretrained(folder)
    return model
