"""What a server of ours was started with, and where on this machine it keeps what outlives it.

In: a target. Out: settings, paths. Must never know what is a fault.
"""

from __future__ import annotations

from pathlib import Path

from amalgam.config.reading import read_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError
from amalgam.tools.check.process import working_folder
from amalgam.tools.check.target import Target


def read(path: Path) -> Settings:
    """As the file has them: variables of this process are not the server's.

    Raises:
        ConfigError: it cannot be read, or is no configuration.
    """
    return read_settings(path, needs_model=True, environ={}).settings


def place(target: Target, path: str) -> Path | None:
    """Where a path that the server was given lies; None: its process is not on this machine."""
    pid = target.process
    folder = None if pid is None else working_folder(pid)
    return None if folder is None else folder / Path(path).expanduser()


def written_folders(target: Target) -> list[Path]:
    """Folders that a server of ours writes to: packed weights, history, statistics; none if that cannot be told."""
    file = target.evidence.server_config
    if target.kind != "amalgam" or file is None:
        return []
    try:
        settings = read(file)
    except ConfigError:
        return []
    folders = [settings.inference.packed_cache, settings.server.export_dir]
    files = [settings.weights.history, settings.statistics.file]
    places = [place(target, path) for path in folders if path]
    places += [None if found is None else found.parent for path in files if path for found in (place(target, path),)]
    return [folder for folder in places if folder is not None]
