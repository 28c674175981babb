"""Which formats there are: those of this package and those of other distributions.

In: nothing. Out: `WeightFormat`s. Formats never import this.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from amalgam import formats
from amalgam.base.plugins import load_plugins
from amalgam.errors import UnsupportedError
from amalgam.formats.contract import WeightFormat, WritableFormat


@cache
def all_formats() -> tuple[WeightFormat, ...]:
    """Every format of `formats/` and of the entry points `amalgam.formats`; modules without one are helpers."""
    found: list[WeightFormat] = []
    for module_info in sorted(pkgutil.iter_modules(formats.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{formats.__name__}.{module_info.name}")
        found += getattr(module, "FORMATS", ()) or ([module.FORMAT] if hasattr(module, "FORMAT") else ())
    found += load_plugins("amalgam.formats")
    return tuple(found)


def writable_format(name: str) -> WritableFormat:
    """The format called `name`, in which checkpoints can be written.

    Raises:
        UnsupportedError: there is none, or it is only read; the message lists those that can be made.
    """
    known = {f.name: f for f in all_formats()}
    weight_format = known.get(name)
    if not isinstance(weight_format, WritableFormat):
        reason = "is unknown" if weight_format is None else "is read, but cannot be made"
        writable = ", ".join(sorted(f.name for f in known.values() if isinstance(f, WritableFormat)))
        raise UnsupportedError(f"Format {name!r} {reason}.", remedy=f"Formats that can be made: {writable}.")
    return weight_format
