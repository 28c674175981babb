"""The installed command `amalgam`: one module per verb, imported only when that verb is called."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import logging
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from amalgam.base.threads import stop_threads
from amalgam.cli.streams import OutputError, guarded_streams
from amalgam.errors import AmalgamError

# In the order of a user's day. `amalgam.cli.<verb>` exports `command`; its docstring is the help text. One of two words
# is in `amalgam.cli.<first>_<second>`.
VERBS = (
    "demo",
    "serve",
    "deploy ray",
    "remap",
    "trial",
    "generate",
    "chat",
    "summarize",
    "plan",
    "fit",
    "config",
    "quantize",
    "prune",
    "export",
    "distill",
    "evaluate",
    "analyze",
    "estimate",
    "experts",
    "bench",
    "bench serve",
    "bench cache",
    "bench speculate",
    "check",
)

INTERRUPTED = 130
_HELP = {"help_option_names": ["-h", "--help"]}
_LONGEST_SUMMARY = 200  # characters; no first sentence of a verb is that long


class _InterruptedError(Exception):
    """Ctrl-C, with what the verb has to say of it; a KeyboardInterrupt would end typer without a word."""


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _InterruptedError(f"Interrupted. {error}".strip()) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        words = " ".join(args[:2])
        if words in VERBS:
            return super().resolve_command(ctx, [words, *args[2:]])
        if args[0] not in VERBS:
            ctx.fail(f"No such command {args[0]!r}.{_suggestion(args[0])}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _command_of(cmd_name) if cmd_name in VERBS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each verb with its whole first sentence, wrapped; the default cuts it to one line."""
        commands = [(verb, _command_of(verb)) for verb in VERBS]
        with formatter.section("Commands"):
            formatter.write_dl([(verb, command.get_short_help_str(_LONGEST_SUMMARY)) for verb, command in commands])


@functools.cache
def _command_of(verb: str) -> Any:
    """A verb with its two hundred flags, made once in a process that runs several verbs."""
    command = importlib.import_module(f"amalgam.cli.{verb.replace(' ', '_')}").command
    # Plain help: frames cut names at 80 columns, and markup takes the brackets of a description for its own.
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    alone.command(name=verb, context_settings=_HELP, epilog=getattr(command, "epilog", None))(command)
    return typer.main.get_command(alone)


def _suggestion(typo: str) -> str:
    """The rest of the message about a word that is no verb: the verbs that begin with it, or look like it."""
    meant = [verb for verb in VERBS if verb.split()[0] == typo] or difflib.get_close_matches(typo, VERBS)
    return f" Did you mean {' or '.join(map(repr, meant))}?" if meant else ""


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)


def _print_version(is_wanted: bool) -> None:
    """The version on a line of its own; below it what a report of a fault has to say. Loads no PyTorch."""
    if is_wanted:
        import platform
        from importlib.metadata import version

        from amalgam.version import __version__

        torch = f"PyTorch {version('torch')}"
        sys.stdout.write(f"amalgam {__version__}\nPython {platform.python_version()}, {torch}, {_native_kernels()}\n")
        raise typer.Exit


def _native_kernels() -> str:
    try:
        from amalgam import _native
    except ImportError:
        return "no native kernels"
    return f"native kernels for {_native.supported_isas()[-1]}"


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """One running Transformer out of several checkpoints of the same model in different precisions."""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code; an error that the user caused is one message on stderr.

    Args:
        arguments: None: those of the process, which ends with the verb: a signal too ends it in good order, with
            130 (SIGINT) or 143 (SIGTERM), and background threads do not outlive it.
    """
    if arguments is not None:
        return _run(arguments)
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        code = _run(sys.argv[1:])
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    if not stop_threads():
        _end_at_once(code)
    return code


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """End as at an interrupt, so that temporary files go; a second signal ends the process at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise SystemExit(128 + number)


def _end_at_once(code: int) -> None:
    """End the process while threads are inside extensions: the interpreter's own end would unwind them and abort."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar may have hidden the cursor
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    logging.shutdown()
    os._exit(code)


def _run(arguments: list[str]) -> int:
    try:
        with guarded_streams():
            return _call(arguments)
    except OutputError as error:
        if not error.is_reader_gone:  # whoever closes a pipe wants no more, and no message either
            _say(f"Error: {error}")
        return error.exit_code


def _call(arguments: list[str]) -> int:
    try:
        result = app(args=arguments, prog_name="amalgam", standalone_mode=False)
    except AmalgamError as error:
        _say(f"Error: {error}")
        return error.exit_code
    except _InterruptedError as error:
        _say(str(error))
        return INTERRUPTED
    except OSError as error:  # a disk that is full, a folder that may not be written: no fault of ours
        place = f": {error.filename!r}" if error.filename is not None else ""
        _say(f"Error: {error.strerror or error}{place}.")
        return 1
    except OutputError:
        raise
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error: typer's own message and exit code
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody can read it; the exit code says it
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
