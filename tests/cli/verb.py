"""A verb in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from amalgam.cli import main


def run_verb(log: Path, arguments: tuple[str, ...]) -> None:
    """Runs it as the command does, with its standard error output in `log`."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
    sys.argv = ["amalgam", *arguments]
    sys.exit(main())
