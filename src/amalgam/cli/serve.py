"""`amalgam serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amalgam.cli.options import with_settings
from amalgam.config import Settings

if TYPE_CHECKING:
    from amalgam.engine.deployment import Deployment


@with_settings
def command(settings: Settings) -> int:
    """Start the HTTP server."""
    from amalgam.cli.console import progress_bar
    from amalgam.server.app import run

    def load() -> Deployment:
        from amalgam.llm import open_deployment  # seconds; the port is open meanwhile

        with progress_bar() as progress:
            return open_deployment(settings, progress)

    return run(settings, load)
