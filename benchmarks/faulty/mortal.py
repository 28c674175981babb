"""`amalgam serve`, with the same flags, whose engine dies at SIGUSR1, as it would of a fault that no step expects."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from amalgam.cli import main
from amalgam.engine.runner import Runner

is_dying = threading.Event()
execute = Runner.execute


def die_or_execute(runner: Runner, plan: Any) -> Any:
    if is_dying.is_set():
        raise SystemExit("told to die")
    return execute(runner, plan)


if __name__ == "__main__":
    Runner.execute = die_or_execute  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, lambda *_: is_dying.set())
    sys.argv.insert(1, "serve")
    sys.exit(main())
