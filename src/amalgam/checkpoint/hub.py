"""Where a checkpoint is: in a folder, in a file, or on the Hugging Face hub.

In: a path or hub id. Out: a local folder or `.gguf` file. Must never know tensors.
"""

from __future__ import annotations

import re
from pathlib import Path

from amalgam.base.files import reading
from amalgam.base.folders import member
from amalgam.errors import CheckpointError, describe

_HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(:(?P<gguf>[\w.-]{1,190}\.gguf))?", re.ASCII
)
_NAMES = "Give a .gguf file, the folder that holds config.json and weights, or a hub id such as org/name."
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def resolve(path_or_hub_id: str) -> Path:
    """The local folder of a checkpoint: an existing folder, else a hub repository (downloaded or from the cache).

    A `.gguf` file is a checkpoint by itself: its own path is returned. Of a repository that holds such files one must
    be named, `org/name:file.gguf`, because most hold the same model a dozen times; a folder of the repository's name
    comes first there too. Pickles (`*.bin`) are downloaded
    only from repositories without safetensors.

    Raises:
        CheckpointError: no such folder or file, or in a folder that cannot be read, and no hub id or not to be had from
            the hub.
    """
    if not path_or_hub_id.strip():
        raise CheckpointError(f"The checkpoint's name is {path_or_hub_id!r}.", remedy=_NAMES)
    path = Path(path_or_hub_id).expanduser()
    with reading(path):
        is_folder, is_file = path.is_dir(), path.is_file()
    if is_folder:
        return path.absolute()
    if is_file:
        if path.suffix == ".gguf":
            return path.absolute()
        raise CheckpointError(
            f"{path} is a file, not a folder.", remedy="Give the folder that holds the checkpoint, or a .gguf file."
        )
    hub_id = _HUB_ID.fullmatch(path_or_hub_id)
    if hub_id is None:
        raise CheckpointError(f"There is no folder {describe(str(path.absolute()), 400)}.", remedy=_NAMES)
    folder = Path(hub_id["repository"])
    if hub_id["gguf"] is not None and folder.is_dir():
        file = folder.absolute() / hub_id["gguf"]
        if not file.is_file():
            found = sorted(each.name for each in folder.glob("*.gguf"))
            raise CheckpointError(
                f"There is no file {str(file)!r}.",
                remedy=f"The folder has {describe(found)}." if found else "The folder has no .gguf files.",
            )
        return file
    return _download(hub_id["repository"], hub_id["gguf"])


def _download(hub_id: str, gguf: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        # All parts of a split GGUF model: `name-00001-of-00003.gguf`.
        wanted = _HUB_FILES if gguf is None else [re.sub(r"-\d{5}-of-", "-*-of-", gguf)]
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if gguf is None and not any(folder.glob("*.safetensors")):
            snapshot_download(hub_id, allow_patterns=["*.bin"], ignore_patterns=["*/*"])
    except Exception as error:  # the hub client documents no common base: HTTP, cache and OS errors
        reason = next(iter(str(error).splitlines()), "")
        remedy = "or download the repository first, without HF_HUB_OFFLINE, which is set."
        if not constants.HF_HUB_OFFLINE:
            remedy = "set HF_ENDPOINT to a mirror that you can reach, or download the repository first and set "
            remedy += "HF_HUB_OFFLINE=1."
        raise CheckpointError(
            f"There is no folder {str(Path(hub_id).absolute())!r}, and {hub_id!r} could not be had from the hub "
            f"({type(error).__name__}: {describe(reason, 300)}).",
            remedy=f"Give an existing folder, correct the hub id, {remedy}",
        ) from error
    if gguf is not None:
        return member(folder, gguf)
    with reading(folder):
        has_weights = any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
    if not has_weights:
        raise CheckpointError(
            f"The hub's {hub_id!r} holds neither *.safetensors nor *.bin files.",
            remedy=f"To use a GGUF file of it, name the file: {hub_id}:NAME.gguf.",
        )
    return folder
