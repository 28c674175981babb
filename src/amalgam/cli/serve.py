"""`amalgam serve`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amalgam.cli.options import with_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from amalgam.composition.progress import Progress
    from amalgam.runtime.deployment import Deployment


_SHOWN = (
    "server.host", "server.port", "server.api_keys", "server.root_path", "server.metrics_compat", "speculation.kind",
    "speculation.num_tokens", "speculation.draft",
)  # fmt: skip


@with_settings(shown=_SHOWN, takes_others=True)
def command(
    settings: Settings,
    config_file: Path | None,
    read_again: Callable[[], Settings],
    autoplan: Annotated[
        bool, typer.Option("--autoplan", help="Let the plan follow the traffic: planning.autoplan.enabled.")
    ] = False,
) -> int:
    """Start the HTTP server."""

    def chosen(settings: Settings) -> Settings:
        """With what the flags of this verb say."""
        if not autoplan:
            return settings
        wanted = settings.planning.autoplan.model_dump() | {"enabled": True}
        return settings.replace(planning={"autoplan": wanted})

    settings = chosen(settings)
    watch_seconds = settings.weights.watch_seconds
    if watch_seconds and config_file is None:
        raise ConfigError(
            f"weights.watch_seconds is {watch_seconds:g}, and there is no configuration file.",
            remedy="Give one with --config.",
        )
    # Imports and loading make a million objects that all stay. Looking for garbage among them takes time until the
    # server is ready, and would hold up steps later on.
    gc.disable()
    stopping = threading.Event()
    try:
        begin_to_load_torch()
        from amalgam.server.app import run

        def load() -> Deployment:
            from amalgam.runtime.lookahead import look_ahead
            from amalgam.runtime.opening import open_deployment  # seconds; the port is open meanwhile
            from amalgam.text.grammar import prepare_grammars

            with _progress_bar() as show:

                def progress(what: str, done: int, total: int) -> None:
                    if stopping.is_set():
                        raise UnavailableError("The server is stopping.", remedy="Start it again.")
                    if show is not None:
                        show(what, done, total)

                deployment = open_deployment(settings, progress)
            if watch_seconds and config_file is not None:
                from amalgam.runtime.config_watch import ConfigWatch

                watch = ConfigWatch(config_file.expanduser(), lambda: chosen(read_again()), settings, deployment.change)
                watch.start(watch_seconds)
            prepare_grammars(deployment.tokenizer)  # in the first request it would hold up all others
            gc.freeze()
            gc.enable()
            look_ahead(deployment)
            return deployment

        return run(settings, load, stopping)
    finally:
        gc.enable()


def _progress_bar() -> contextlib.AbstractContextManager[Progress | None]:
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from amalgam.cli.console import progress_bar

    return progress_bar()


def begin_to_load_torch() -> None:
    """Have torch's largest library loaded in a thread, which needs no lock of the interpreter meanwhile.

    It is a quarter of torch's import, which then finds it there, or loads it itself if this has not worked. Python 3.11
    keeps its lock in `ctypes.CDLL(path)`, but not while a function is called that belongs to a library.
    """
    # A library that is being loaded keeps all others waiting. So those that are imported meanwhile come first.
    for name in ("asyncio", "multiprocessing.connection", "orjson", "queue", "resource", "unicodedata"):
        import_module(name)

    def load(folder: Path) -> None:
        dlopen = getattr(ctypes.CDLL(None), "dlopen", None)
        if dlopen is None:
            return
        dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        if dlopen(bytes(folder / "libtorch_global_deps.so"), os.RTLD_NOW | os.RTLD_GLOBAL):  # as torch/__init__.py
            dlopen(bytes(folder / "libtorch_cpu.so"), os.RTLD_NOW)

    torch = find_spec("torch")
    if torch is not None and torch.origin is not None:
        threading.Thread(target=load, args=[Path(torch.origin).parent / "lib"], name="amalgam-torch").start()
