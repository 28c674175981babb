"""Which targets there are: one module each in `targets/`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from amalgam.errors import UnsupportedError
from amalgam.tools.export import targets
from amalgam.tools.export.contract import Target


@cache
def all_targets() -> dict[str, Target]:
    """By name; modules without a `TARGET` are helpers."""
    names = sorted(module.name for module in pkgutil.iter_modules(targets.__path__))
    modules = (importlib.import_module(f"{targets.__name__}.{name}") for name in names)
    return {module.TARGET.name: module.TARGET for module in modules if hasattr(module, "TARGET")}


def find_target(name: str) -> Target:
    """
    Raises:
        UnsupportedError: there is none of that name.
    """
    found = all_targets().get(name)
    if found is None:
        raise UnsupportedError(f"There is no export to {name!r}.", remedy=f"Targets: {', '.join(all_targets())}.")
    return found
