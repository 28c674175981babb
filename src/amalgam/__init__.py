"""One running Transformer out of several checkpoints of the same model in different precisions.

All but the version is imported at first use, so that `import amalgam` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from amalgam.version import __version__

if TYPE_CHECKING:
    from amalgam.engine.params import SamplingParams, ThinkingLimit
    from amalgam.llm import LLM
    from amalgam.text.grammar import Grammar

__all__ = ["LLM", "Grammar", "SamplingParams", "ThinkingLimit", "__version__"]

_HOMES = {
    "LLM": "amalgam.llm",
    "SamplingParams": "amalgam.engine.params",
    "ThinkingLimit": "amalgam.engine.params",
    "Grammar": "amalgam.text.grammar",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
