"""The files of a checkpoint that is being made: which are complete, so that an interrupted run goes on behind them.

In: tensors, file by file. Out: the files under their final names, and a record of them. Must never know what the
tensors mean.

The record is written after each file and names all that are complete; a file that it does not name is made anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from amalgam.base.files import replace_file
from amalgam.base.strict_json import read_json_object
from amalgam.checkpoint.writer import shard_name, write_index, write_shard
from amalgam.errors import AmalgamError, CheckpointError, ConflictError, describe

_RECORD = "unfinished.json"
_MAX_RECORD_BYTES = 2**30


def has_shards(folder: Path) -> bool:
    """Whether a folder holds files that a later run can go on from."""
    return bool(_read(folder).get("shards"))


class Shards:
    """The files in a folder that is being filled.

    Args:
        settings: what the files depend on, as JSON values.

    Attributes:
        num_complete: files that are there.
        notes: what was noted with the last of them; empty if there is none.

    Raises:
        ConflictError: the folder holds files that were made with other settings.
    """

    def __init__(self, folder: Path, count: int, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._count = count
        record = _read(folder)
        if record.get("shards") and record.get("settings") != settings:
            old = record.get("settings", {})
            differing = next(key for key in {**old, **settings} if old.get(key) != settings.get(key))
            raise ConflictError(
                f"{folder} holds a part of this checkpoint that was made with {differing} = "
                f"{describe(old.get(differing))}, and now it is {describe(settings.get(differing))}.",
                remedy=f"Give the same options to go on, or remove {folder} to begin anew.",
            )
        self._record: dict[str, Any] = {"settings": dict(settings), "shards": [], "notes": {}}
        if record.get("shards"):
            self._record |= {"shards": record["shards"], "notes": record["notes"]}
        for number, shard in enumerate(self._record["shards"], 1):
            file = folder / shard_name(number, count)
            if not file.is_file() or file.stat().st_size != shard["file_bytes"]:
                raise CheckpointError(
                    f"{file} is not what {folder / _RECORD} says.", remedy=f"Remove {folder} to begin anew."
                )

    @property
    def num_complete(self) -> int:
        return len(self._record["shards"])

    @property
    def notes(self) -> dict[str, Any]:
        found: dict[str, Any] = self._record["notes"]
        return found

    def add(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write the next file, and that it is there.

        Raises:
            OSError: there is no room.
        """
        file = self._folder / shard_name(self.num_complete + 1, self._count)
        nbytes = write_shard(file, tensors)
        shard = {"tensors": list(tensors), "nbytes": nbytes, "file_bytes": file.stat().st_size}
        self._record["shards"].append(shard)
        self._record["notes"] = dict(notes)
        replace_file(self._folder / _RECORD, json.dumps(self._record))

    def finish(self) -> None:
        """Write the index, and remove what is only there to go on from."""
        shards = self._record["shards"]
        if self._count > 1:
            names = {shard_name(number, self._count): shard["tensors"] for number, shard in enumerate(shards, 1)}
            write_index(self._folder, names, sum(shard["nbytes"] for shard in shards))
        (self._folder / _RECORD).unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, Any]:
    """The record; empty if there is none that can be read."""
    try:
        return read_json_object(folder / _RECORD, _MAX_RECORD_BYTES)
    except AmalgamError:
        return {}
