"""Settings of tokens that are guessed ahead: section `speculation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from amalgam.config.fields import ModelPath, Section


class SpeculationSettings(Section):
    """Tokens that are guessed ahead and verified in one step. Changes no answer."""

    kind: Literal["none", "ngram", "self", "draft"] = "none"
    """Who guesses: earlier text of the request (ngram), the model in its lowest precision (self), another (draft)."""
    num_tokens: int = Field(default=4, ge=1, le=64)
    """Most tokens that are guessed for a request in a step."""
    adaptive: bool = True
    """Guess only as many as pay by the measured times of steps and guesses. false: as many as there is room for."""
    min_match: int = Field(default=3, ge=1, le=32)
    """How many of a request's last tokens must have occurred before (ngram)."""
    draft: ModelPath = ""
    """Folder, `.gguf` file or hub id of a smaller model with the same vocabulary (draft)."""
    source: str = ""
    """Source of the draft's experts, or linear weights if there are none (self). Empty: the smallest for each."""
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    """KV cache of the draft (self, draft). None: as engine.kv_cache_bytes, within a quarter of memory."""
