"""An environment of its own for a tool that quantizes: found, or made.

In: what the tool needs, a folder. Out: the environment's Python, and the tool's version. Must never know what the tool
does.

Such tools want other versions of PyTorch and transformers than ours, so nothing is installed beside us.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from amalgam.base.files import resumable_folder
from amalgam.config.environment import state_folder
from amalgam.errors import UnavailableError
from amalgam.tools.quantizing.processes import kill_group

_VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
_PYTHON = Path("bin") / "python"
_MAX_LINES = 6  # of what an installer says, in a message


@dataclass(frozen=True)
class Environment:
    """
    Attributes:
        version: of the tool in it.
    """

    python: Path
    version: str


def default_folder(name: str, version: str) -> Path:
    return state_folder() / "environments" / f"{name}-{version}"


def open_environment(
    folder: Path, distribution: str, requirements: Sequence[str], say: Callable[[str], None] = lambda text: None
) -> Environment:
    """The environment in `folder`, which is made if there is nothing: complete, or not at all.

    Args:
        distribution: the tool's, as pip calls it.
        requirements: what is installed, as pip takes it; its own settings (an index, a cache) apply.
        say: is told before something is installed.

    Raises:
        UnavailableError: it cannot be made, or what is there has no Python or not the tool.
        CheckpointError: the folder cannot be written.
        ConflictError: another process is making it.
    """
    if not folder.exists():
        say(f"Making an environment with {', '.join(requirements)} in {folder}. It stays there for the next time.")
        with resumable_folder(folder, lambda partial: False) as partial:
            _run([sys.executable, "-m", "venv", str(partial)], requirements)
            new = str(partial / _PYTHON)
            _run([new, "-I", "-m", "pip", "install", *requirements], requirements)
            _version(new, distribution, folder, requirements)
    python = folder.absolute() / _PYTHON
    return Environment(python, _version(str(python), distribution, folder, requirements))


def _version(python: str, distribution: str, folder: Path, requirements: Sequence[str]) -> str:
    try:
        result = subprocess.run([python, "-I", "-c", _VERSION, distribution], capture_output=True, text=True)
    except OSError as error:
        raise UnavailableError(f"{folder} is no Python environment ({error}).", remedy=_by_hand(requirements)) from None
    if result.returncode:
        raise UnavailableError(f"The environment in {folder} has no {distribution}.", remedy=_by_hand(requirements))
    return result.stdout.strip()


def _run(command: Sequence[str], requirements: Sequence[str]) -> None:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        _, said = process.communicate()
    except BaseException:
        kill_group(process)  # what it compiles, too
        process.wait()
        raise
    if process.returncode:
        lines = [line for line in said.splitlines() if line.strip()][-_MAX_LINES:]
        raise UnavailableError(
            f"An environment with {', '.join(requirements)} cannot be made: {' / '.join(lines)}",
            remedy=_by_hand(requirements),
        )


def _by_hand(requirements: Sequence[str]) -> str:
    packages = " ".join(f"'{requirement}'" for requirement in requirements)
    return (
        f"Make one (python -m venv FOLDER; FOLDER/bin/python -m pip install {packages}) and name it with --environment."
    )
