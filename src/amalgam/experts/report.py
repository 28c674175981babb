"""Snapshot → files.

In: an `ExpertSnapshot` and the name of a format. Out: a file's name, media type and text; on request the file itself,
inside the folder given and nowhere else. Must never know who asked.
"""

from __future__ import annotations

import csv
import io
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from amalgam.errors import ConfigError, RequestError, describe
from amalgam.experts.statistics import describe_experts, expert_columns
from amalgam.experts.tracker import ExpertSnapshot

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Export:
    """One file, not yet written."""

    file_name: str
    media_type: str
    text: str


def export(snapshot: ExpertSnapshot, format: str = "json") -> Export:
    """The statistics as `json` (everything `/expert_stats` answers) or `csv` (a line per expert).

    Raises:
        RequestError: `format` is none of these.
    """
    if not isinstance(format, str) or format not in _WRITERS:
        raise RequestError(f"format is {describe(format)}.", remedy=f"Allowed: {', '.join(_WRITERS)}.")
    media_type, write = _WRITERS[format]
    moment = datetime.fromtimestamp(snapshot.window_end, UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    return Export(f"expert_stats_{moment}.{format}", media_type, write(snapshot))


def write_export(folder: str | Path, name: str, content: str) -> Path:
    """Write `content` to the file `name` in `folder`, which is made if absent, and return its path.

    The file appears complete or not at all. It never lies outside `folder`: a symbolic link of that name is replaced,
    not followed.

    Raises:
        RequestError: `name` is not a plain file name.
        ConfigError: the folder cannot be written to.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise RequestError(f"File name {describe(name)} is not a plain name.", remedy="Use letters, digits, . _ and -.")
    target = Path(folder) / name
    partial = target.with_name(f".{name}.{uuid.uuid4().hex}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("x", encoding="utf-8", newline="") as file:
                file.write(content)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot write to the export folder {str(folder)!r}: {error.strerror}.",
            remedy="Set server.export_dir to a folder that can be written to.",
        ) from None
    return target


def _write_json(snapshot: ExpertSnapshot) -> str:
    return json.dumps(describe_experts(snapshot), indent=1, allow_nan=False)


def _write_csv(snapshot: ExpertSnapshot) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = expert_columns(snapshot)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue()


_WRITERS: dict[str, tuple[str, Callable[[ExpertSnapshot], str]]] = {
    "json": ("application/json", _write_json),
    "csv": ("text/csv", _write_csv),
}
