"""`amalgam serve`."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from amalgam.cli.options import with_settings
from amalgam.config import Settings

if TYPE_CHECKING:
    from amalgam.engine.deployment import Deployment


@with_settings
def command(settings: Settings) -> int:
    """Start the HTTP server."""
    # Imports and loading make a million objects that all stay. Looking for garbage among them takes time until the
    # server is ready, and would hold up steps later on.
    gc.disable()
    try:
        from amalgam.cli.console import progress_bar
        from amalgam.server.app import run

        def load() -> Deployment:
            from amalgam.llm import open_deployment  # seconds; the port is open meanwhile

            with progress_bar() as progress:
                deployment = open_deployment(settings, progress)
            gc.freeze()
            gc.enable()
            return deployment

        return run(settings, load)
    finally:
        gc.enable()
