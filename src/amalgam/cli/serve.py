"""`amalgam serve`."""

from __future__ import annotations

from amalgam.cli.options import with_settings
from amalgam.config import Settings


@with_settings
def command(settings: Settings) -> int:
    """Start the HTTP server."""
    from amalgam.cli.console import progress_bar
    from amalgam.llm import open_deployment
    from amalgam.server.app import run

    with progress_bar() as progress:
        return run(settings, lambda: open_deployment(settings, progress))
