"""A byte-level tokenizer.json → the metadata that llama.cpp's converter makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def metadata_of(folder: Path, pre: str = "qwen2") -> dict[str, Any]:
    """The keys `tokenizer.*` for the tokenizer in `folder`, whose text is cut into words as `pre` does it."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"] | special
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": vocab[config["eos_token"]],
        "tokenizer.ggml.eot_token_id": vocab["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": vocab[config["pad_token"]],
        "tokenizer.chat_template": config["chat_template"],
    }
