"""The flags of verbs that ask a running server: where it is, and the key that it wants."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8080"
_PANEL = "The server"

Url = Annotated[str, typer.Option(help="Address of the server.", rich_help_panel=_PANEL)]
AdminKey = Annotated[
    str, typer.Option(envvar="AMALGAM_SERVER_ADMIN_KEY", help="The server's admin key.", rich_help_panel=_PANEL)
]
