"""Modules that take long to import, imported when something of theirs is used.

Each of the processes that share the tests imports every file of them, and runs a part.
"""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """Stands for a module, or for what a module holds."""

    def __init__(self, module: str, name: str = "") -> None:
        self._module, self._name = module, name

    def _found(self) -> Any:
        module = importlib.import_module(self._module)
        return getattr(module, self._name) if self._name else module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks all that a test module holds whether it is a mock or a fixture
            raise AttributeError(name)
        return getattr(self._found(), name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._found()(*arguments, **named)
