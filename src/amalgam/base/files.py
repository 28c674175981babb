"""Files that appear complete or not at all.

In: a path and its content. Out: the file. Must never know what is in it.
"""

from __future__ import annotations

from pathlib import Path

from amalgam.base.locks import create_locked, remove_abandoned

_SUFFIX = ".partial"


def replace_file(target: Path, content: str | bytes) -> Path:
    """Write a file, in place of one of that name; its folder is made if absent.

    What killed processes have left of earlier attempts is removed.

    Raises:
        OSError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    remove_abandoned(target.parent, prefix, _SUFFIX)
    partial, descriptor = create_locked(target.parent, prefix, _SUFFIX)
    with open(descriptor, "wb") as file:  # which closes, and so unlocks, at the end only
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target
