"""The demo model with its configuration and examples, as a folder to try things in.

In: the name of a folder. Out: that folder, where the commands of the README run as they stand. A wheel carries these
files, so that a first answer needs neither a checkout nor a network.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import amalgam
from amalgam.base.files import resumable_folder, writing

PARTS = ("config", "examples", "models/demo")


def copy_demo(folder: Path) -> Path:
    """Make `folder`, which appears complete or not at all. Returns it.

    Raises:
        CheckpointError: it exists and is not empty, or cannot be written.
        ConflictError: another process is making it.
    """
    source = _source()
    with resumable_folder(folder, is_worth_keeping=lambda partial: False) as partial, writing(folder):
        for part in PARTS:
            shutil.copytree(source / part, partial / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _source() -> Path:
    """Where these files lie: inside an installed package, around the package in a checkout."""
    package = Path(amalgam.__file__).parent
    installed = package / "demo"
    return installed if installed.is_dir() else package.parents[1]
