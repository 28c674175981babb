"""The export folder: files under plain names, saved sets among them.

In: the folder, names, content. Out: files in it, and never outside. Must never know who asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from amalgam.base.files import replace_file
from amalgam.errors import ConfigError, RequestError, describe
from amalgam.experts.saved.files import load, to_bytes
from amalgam.experts.saved.names import MAX_FILE_NAME_CHARS, NPZ, SAFE_NAME, SUFFIX, SUFFIXES, check_name, is_name
from amalgam.experts.saved.sets import SavedSet

MAX_FILES = 1000  # a client could fill the disk


def save_named(folder: str | Path, name: str, saved: SavedSet) -> Path:
    """Write a saved set, in place of the one of that name, and return its path.

    Raises:
        RequestError: not a plain name.
        ConfigError: the folder cannot be written to, or is full; or the set has more labels than a reader takes.
    """
    name = check_name(name)
    path = _write(folder, name + SUFFIX, to_bytes(saved), in_place_of=[name + suffix for suffix in SUFFIXES])
    with suppress(OSError):  # what could not be removed is not read either
        path.with_name(name + NPZ).unlink()
    return path


def load_named(folder: str | Path, name: str) -> SavedSet:
    """
    Raises:
        RequestError: not a plain name, or there is no set of that name in `folder`.
        CheckpointError: it is damaged.
    """
    name = check_name(name)
    paths = [Path(folder) / (name + suffix) for suffix in SUFFIXES]
    path = next(filter(_is_plain_file, paths), None)
    if path is None:
        known = ", ".join(list_names(folder)[:20]) or "none yet"
        raise RequestError(f"There is no saved set {describe(name)}.", remedy=f"Saved sets: {known}.")
    return load(path)


def list_names(folder: str | Path) -> list[str]:
    """The saved sets in a folder, by name."""
    paths = [path for suffix in SUFFIXES for path in Path(folder).glob(f"*{suffix}")]
    return sorted({path.stem for path in paths if is_name(path.stem) and _is_plain_file(path)})


def write_file(folder: str | Path, name: str, content: str | bytes) -> Path:
    """Write `content` to the file `name` in `folder`, which is made if absent, and return its path.

    The file appears complete or not at all. It never lies outside `folder`: a symbolic link of that name is replaced,
    not followed.

    Raises:
        RequestError: `name` is not a plain file name.
        ConfigError: the folder cannot be written to, or is full.
    """
    if not SAFE_NAME.fullmatch(name) or len(name) > MAX_FILE_NAME_CHARS:
        raise RequestError(f"File name {describe(name)} is not a plain name.", remedy="Use letters, digits, . _ and -.")
    return _write(folder, name, content, in_place_of=[name])


def _write(folder: str | Path, name: str, content: str | bytes, in_place_of: Iterable[str]) -> Path:
    """
    Args:
        in_place_of: files; where there is one of them, the folder gets no fuller.
    """
    target = Path(folder) / name
    try:
        if not any(map(Path.exists, map(target.with_name, in_place_of))) and _num_files(target.parent) >= MAX_FILES:
            raise ConfigError(
                f"The export folder {str(folder)!r} holds {MAX_FILES} files, the most that are kept there.",
                remedy="Remove those that are not needed, or set server.export_dir to another folder.",
            )
        return replace_file(target, content)
    except OSError as error:
        raise ConfigError(
            f"Cannot write to the export folder {str(folder)!r}: {error.strerror}.",
            remedy="Set server.export_dir to a folder that can be written to.",
        ) from None


def _is_plain_file(path: Path) -> bool:
    """A link might lead out of the folder."""
    return path.is_file() and not path.is_symlink()


def _num_files(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
