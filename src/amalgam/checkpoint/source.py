"""Where a checkpoint's files are.

In: a path or hub id. Out: a local folder or `.gguf` file, and small JSON files or checked paths inside it. Every file
name that comes out of a checkpoint passes `member`, so that nothing outside the folder is ever opened. Must never know
tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from amalgam.base.strict_json import MAX_FILE_BYTES, read_json_object
from amalgam.errors import CheckpointError, describe

_HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(:(?P<gguf>[\w.-]{1,190}\.gguf))?", re.ASCII
)
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def resolve(path_or_hub_id: str) -> Path:
    """The local folder of a checkpoint: an existing folder, else a hub repository (downloaded or from the cache).

    A `.gguf` file is a checkpoint by itself: its own path is returned. Of a repository that holds such files one must
    be named, `org/name:file.gguf`, because most hold the same model a dozen times. Pickles (`*.bin`) are downloaded
    only from repositories without safetensors.

    Raises:
        CheckpointError: no such folder or file, and no hub id or not to be had from the hub.
    """
    path = Path(path_or_hub_id).expanduser()
    if path_or_hub_id.strip() and path.is_dir():
        return path.absolute()
    if path.is_file():
        if path.suffix == ".gguf":
            return path.absolute()
        raise CheckpointError(
            f"{path} is a file, not a folder.", remedy="Give the folder that holds the checkpoint, or a .gguf file."
        )
    hub_id = _HUB_ID.fullmatch(path_or_hub_id)
    if hub_id is None:
        raise CheckpointError(
            f"There is no folder {describe(str(path.absolute()), 400)}.",
            remedy="Give a .gguf file, the folder that holds config.json and weights, or a hub id such as org/name.",
        )
    return _download(hub_id["repository"], hub_id["gguf"])


def _download(hub_id: str, gguf: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # All parts of a split GGUF model: `name-00001-of-00003.gguf`.
        wanted = _HUB_FILES if gguf is None else [re.sub(r"-\d{5}-of-", "-*-of-", gguf)]
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if gguf is None and not any(folder.glob("*.safetensors")):
            snapshot_download(hub_id, allow_patterns=["*.bin"], ignore_patterns=["*/*"])
    except Exception as error:  # the hub client documents no common base: HTTP, cache and OS errors
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"There is no folder {str(Path(hub_id).absolute())!r}, and {hub_id!r} could not be had from the hub "
            f"({type(error).__name__}: {describe(reason, 300)}).",
            remedy="Give an existing folder, correct the hub id, set HF_ENDPOINT to a mirror that you can reach, "
            "or download the repository first and set HF_HUB_OFFLINE=1.",
        ) from error
    if gguf is not None:
        return member(folder, gguf)
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise CheckpointError(
            f"The hub's {hub_id!r} holds neither *.safetensors nor *.bin files.",
            remedy=f"To use a GGUF file of it, name the file: {hub_id}:NAME.gguf.",
        )
    return folder


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
        CheckpointError: no such file, outside of the folder, or see `base.strict_json.read_json_object`.
    """
    return read_json_object(member(folder, name), limit)
