"""The installed command `amalgam`: one module per verb, imported only when that verb is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from amalgam.errors import AmalgamError

# In the order of a user's day. `amalgam.cli.<verb>` exports `command`; its docstring is the help text.
VERBS = ("serve", "generate", "chat", "plan", "quantize", "analyze", "estimate", "experts", "bench")


class _Verbs(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"amalgam.cli.{cmd_name}")
        verb = typer.Typer(add_completion=False)
        verb.command(name=cmd_name)(module.command)
        return typer.main.get_command(verb)


app = typer.Typer(cls=_Verbs, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """One running Transformer out of several checkpoints of the same model in different precisions."""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code; an error that the user caused is one message on stderr."""
    try:
        result = app(args=sys.argv[1:] if arguments is None else arguments, prog_name="amalgam", standalone_mode=False)
    except AmalgamError as error:
        typer.echo(f"Error: {error}", err=True)
        return error.exit_code
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        return 130
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error: typer's own message and exit code
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0
