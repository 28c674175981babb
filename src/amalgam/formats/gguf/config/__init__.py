"""GGUF's metadata → the config.json that the published checkpoint would have.

In: an opened GGUF checkpoint. Out: a Hugging Face configuration as a mapping. What the converter does not write is
told from the tensors (biases, a tied head, which layers are dense) or is a constant of the architecture, never guessed:
a key that is not understood, and a value that the file cannot tell, are refused.
Must never know: families, specs, plans.

An architecture is a function and two lines in the file of its kind: its name in GGUF, and what transformers calls it.
"""

from __future__ import annotations

from collections.abc import Mapping

from amalgam.checkpoint.store import TensorStore
from amalgam.errors import UnsupportedError, describe
from amalgam.formats.gguf.config import dense, gemma4, grouped, hybrid, mixtures
from amalgam.formats.gguf.config.metadata import Builder, Config, Metadata
from amalgam.formats.gguf.pieces import ARCHITECTURE_KEY

_KINDS = (dense, mixtures, grouped, hybrid, gemma4)
ARCHITECTURES: Mapping[str, Builder] = {name: build for kind in _KINDS for name, build in kind.ARCHITECTURES.items()}
MODEL_TYPES: Mapping[str, str] = {name: model_type for kind in _KINDS for name, model_type in kind.MODEL_TYPES.items()}


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
    metadata = Metadata(store, architecture)
    config = build(metadata)
    metadata.check_all_read()
    config["model_type"] = MODEL_TYPES[config["architectures"][0]]
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        config[key] = store.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return config
