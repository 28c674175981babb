"""Whether a file can be had again after its machine is lost: under version control, or in a backup.

In: a path. Out: what was seen, in words. Must never know what the file is for.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 20.0
_MOST_FILES = 10_000  # of a backup, looked at
_STATES = {"??": "is not under version control", "!!": "is one that git ignores"}


@dataclass(frozen=True)
class Kept:
    """
    Attributes:
        how: what was seen of it, to be read behind the file's name.
    """

    is_kept: bool
    how: str


def in_backup(file: Path, backup: Path) -> Kept:
    """Whether a file, or a folder with a file of that name somewhere below it, holds the same bytes as `file`."""
    others = _candidates(file, backup) if backup.is_dir() else [backup]
    others = [other for other in others if not other.samefile(file)]
    if not others:
        return Kept(False, f"has no copy at {backup}")
    content = file.read_bytes()
    for other in others:
        if other.read_bytes() == content:
            where = ", on the same file system" if other.stat().st_dev == file.stat().st_dev else ""
            return Kept(True, f"is as its copy {other}{where}")
    return Kept(False, f"differs from its copy {others[0]}")


def _candidates(file: Path, folder: Path) -> list[Path]:
    """Files of the same name, the newest first."""
    found = []
    for number, path in enumerate(folder.rglob("*")):
        if number >= _MOST_FILES:
            break
        if path.name == file.name and path.is_file():
            found.append(path)
    return sorted(found, key=lambda path: -path.stat().st_mtime)


def in_git(file: Path) -> Kept:
    """Whether the file is in git as it is now. Nothing of the repository is executed or written."""
    file = file.resolve()
    git = shutil.which("git")
    if git is None:
        return Kept(False, "may be under version control, but git is not installed here")
    try:
        state = _asked(git, file, "status", "--porcelain=v1", "--ignored", "--untracked-files=all")
        if state:
            return Kept(False, _STATES.get(state[:2], "has changes that are not committed"))
        return Kept(True, f"is under version control, commit {_asked(git, file, 'log', '-1', '--format=%h of %cs')}")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        if "not a git repository" in str(error):
            return Kept(False, _STATES["??"])
        return Kept(False, f"may be under version control, but git says: {error}")


def _asked(git: str, file: Path, *arguments: str) -> str:
    """
    Raises:
        ValueError: what git says of why not.
    """
    safe = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={file.parent / 'no-hooks'}")
    result = subprocess.run(
        [git, *safe, "-C", str(file.parent), *arguments, "--", file.name],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        # Not those variables that name another repository; HOME has which folders of others are trusted.
        env={"HOME": str(Path.home()), "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_LITERAL_PATHSPECS": "1"},
        check=False,
    )
    if result.returncode:
        raise ValueError((result.stderr.strip().splitlines() or ["no reason"])[0])
    return result.stdout.strip("\n")
