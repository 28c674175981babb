"""Objects that other installed packages bring along, by Python's entry points.

In: the name of a group. Out: the objects. Must never know: what they are for.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from amalgam.errors import UnsupportedError


def load_plugins(group: str) -> list[Any]:
    """Every object that an installed package offers in a group.

    Raises:
        UnsupportedError: one cannot be imported; the message names its package.
    """
    return [_load(entry) for entry in entry_points(group=group)]


def load_plugins_named(group: str) -> dict[str, Any]:
    """The same by the names under which they are offered.

    Raises:
        UnsupportedError: one cannot be imported; the message names its package.
    """
    return {entry.name: _load(entry) for entry in entry_points(group=group)}


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        package = "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
        raise UnsupportedError(
            f"{entry.group}: {entry.name!r} ({entry.value}) of {package} cannot be imported: {error}.",
            remedy="Install a version of it that was made for this version of amalgam, or uninstall it.",
        ) from error
