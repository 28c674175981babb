"""Files inside a checkpoint's folder: nothing outside of it is ever opened.

In: a folder, and a file name that comes out of a checkpoint. Out: a checked path, or a small JSON file. Must never know
what the files are for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amalgam.base.strict_json import MAX_FILE_BYTES, read_json_object
from amalgam.errors import CheckpointError, describe


def member(folder: Path, name: str) -> Path:
    """Path of the regular file `name` of `folder`.

    Symbolic links must stay inside the folder, or, in the hub's cache (`models--org--name/snapshots/revision`), inside
    the folder of that repository, because the cache links its files to `models--org--name/blobs`.

    Raises:
        CheckpointError: not a plain file name, leads out of the folder, or there is no such file.
    """
    if not _resolve_member(folder, name).is_file():
        raise CheckpointError(f"{folder / name} is not a regular file.", remedy="Remove it from the checkpoint.")
    return folder / name


def member_folder(folder: Path, name: str) -> Path:
    """Path of the folder `name` in `folder`, under the same rule."""
    if not _resolve_member(folder, name).is_dir():
        raise CheckpointError(f"{folder / name} is not a folder.", remedy="Remove it from the checkpoint.")
    return folder / name


def is_present(path: Path) -> bool:
    """Whether there is anything by that name; what is no file, or a link to nowhere, is then refused by `member`."""
    return path.is_symlink() or path.exists()


def _resolve_member(folder: Path, name: str) -> Path:
    """Where `name` really lies."""
    if not name or not name.isprintable() or name in (".", "..") or "/" in name or "\\" in name:
        raise CheckpointError(
            f"{folder} names the file {describe(name)}, which is not a plain file name.",
            remedy="Files must lie in the checkpoint's own folder.",
        )
    try:
        root, file = folder.resolve(strict=True), (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        if isinstance(error, FileNotFoundError) and not (folder / name).is_symlink():
            raise CheckpointError(f"{folder} has no file {describe(name)}.", remedy="Complete the download.") from None
        raise CheckpointError(
            f"{folder / name} cannot be opened ({error}).", remedy="Repair the link, or download the file again."
        ) from error
    for parent in root.parents:
        if parent.name.startswith("models--") and root.relative_to(parent).parts[0] == "snapshots":
            root = parent
            break
    if not file.is_relative_to(root):
        raise CheckpointError(
            f"{folder / name} is a link to {file}, outside of its folder.",
            remedy="Copy or hard-link the file into the folder, or use the folder that it really lies in.",
        )
    return file


def read_json(folder: Path, name: str, limit: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The JSON object in file `name` of `folder`; at most `limit` bytes.

    Raises:
        CheckpointError: no such file, outside of the folder, or see `read_json_object`.
    """
    return read_json_object(member(folder, name), limit)
