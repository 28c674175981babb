"""`amalgam demo`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="Where to put them; made by this command.")] = Path("amalgam-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Copy a small model, its configuration and examples into a folder, to try amalgam without a model of your own."""
    from amalgam.cli.console import note, print_json, say
    from amalgam.tools.demo import copy_demo

    copy_demo(folder)
    config = folder / "config/model_config.yaml"
    if as_json:
        print_json({"folder": str(folder), "config": str(config)})
        return
    say(str(folder))
    note(f"Serve it: amalgam serve --config {shlex.quote(str(config))}")
