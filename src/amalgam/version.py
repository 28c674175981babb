"""The version of this package, and what it is installed as. pyproject.toml reads the version here."""

__version__ = "0.1.0"
DISTRIBUTION = "amalgam-llm"  # the name for pip; `amalgam` belongs to another one there
