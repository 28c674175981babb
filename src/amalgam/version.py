"""The version of this package, and what it is installed as. pyproject.toml reads the version here."""

from pathlib import Path

__version__ = "0.1.0"
DISTRIBUTION = "amalgam-llm"  # the name for pip; `amalgam` belongs to another one there


def commit() -> str:
    """The checked-out commit of the project, empty outside a checkout."""
    import subprocess  # `import amalgam` does without it

    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
