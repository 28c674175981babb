"""`amalgam deploy ray`."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from amalgam.base.files import replace_file, writing
from amalgam.cli.options import with_settings
from amalgam.config.environment import set_variables, state_folder
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError, UnavailableError, UnsupportedError
from amalgam.version import DISTRIBUTION

# What Ray reads when it is imported; an environment that says otherwise holds.
_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
_LOCAL = {"RAY_worker_niceness": "0"}  # Ray's workers are nice to all others by default, and so would the model be
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # keeps what Ray starts on the loopback interface

_SHOWN = (
    "server.host", "server.port", "server.api_keys", "engine.num_threads", "cluster.target_requests",
    "cluster.target_kv", "cluster.upscale_seconds", "cluster.downscale_seconds",
)  # fmt: skip


@with_settings(needs_model=False, shown=_SHOWN)
def command(
    settings: Settings,
    replicas: Annotated[int | None, typer.Option(help="So many replicas: cluster.replicas.")] = None,
    min_replicas: Annotated[int | None, typer.Option(help="At least so many: cluster.min_replicas.")] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="At most so many; the load decides: cluster.max_replicas.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray to run on: HOST:PORT, or auto for the one on this machine. Default: start one here."),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Tell how a running cluster is, and exit.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Drain and end a running cluster.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (with --status).")] = False,
) -> int:
    """Serve one model with several replicas on Ray, behind one address, until Ctrl-C or SIGTERM."""
    given = {"replicas": replicas, "min_replicas": min_replicas, "max_replicas": max_replicas}
    wanted: dict[str, int | None] = {name: value for name, value in given.items() if value is not None}
    if replicas is not None and (min_replicas is not None or max_replicas is not None):
        raise ConfigError("--replicas and --min-replicas or --max-replicas are given.", remedy="Give one or the other.")
    if min_replicas is not None and max_replicas is None and settings.cluster.max_replicas is None:
        raise ConfigError(
            "--min-replicas is given without --max-replicas.", remedy="Say how many there may be at most."
        )
    if status and stop:
        raise ConfigError("--status and --stop are given.", remedy="Give one of them.")
    if as_json and not status:
        raise ConfigError("--json is given without --status.", remedy="Leave it out.")
    if replicas is not None:
        wanted["max_replicas"] = None  # the file's, which the flag overrides
    settings = settings.replace(cluster={**settings.cluster.model_dump(), **wanted})
    if status or stop:
        return _look_or_stop(settings, address or _running_address(), stops=stop, as_json=as_json)
    if not settings.model.base_path:
        raise ConfigError("model.base_path is required.", remedy="Give --config FILE, or --model FOLDER.")
    from amalgam.cluster.settings import check_settings

    check_settings(settings)
    return _run(settings, address)


def _prepare_ray(host: str, *, is_local: bool) -> None:
    """Say to Ray what it reads when it is imported.

    Raises:
        UnsupportedError: it is not installed.
    """
    set_variables(_RAY | (_LOCAL if is_local else {}) | (_LOOPBACK if _is_loopback(host) else {}))
    if find_spec("ray") is None or find_spec("ray.serve") is None:  # which imports ray
        raise UnsupportedError("Ray Serve is not installed.", remedy=f"pip install '{DISTRIBUTION}[ray]'.")


def _run(settings: Settings, address: str | None) -> int:
    is_local = address is None
    _prepare_ray(settings.server.host if address is None else address.rpartition(":")[0], is_local=is_local)
    from amalgam.cluster.ray import deploying
    from amalgam.cluster.settings import prepared

    settings = prepared(settings, is_local=is_local)
    if is_local:
        settings = _with_port(settings)
    stopping = threading.Event()
    reached = deploying.connect(address, settings)
    with writing(_address_file()):
        replace_file(_address_file(), reached)

    def on_signal(number: int, frame: Any) -> None:
        if stopping.is_set():  # a second one ends the process at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which has handlers of its own
        signal.signal(number, on_signal)
    cluster = settings.cluster
    number_of = (
        f"{cluster.replicas} replicas"
        if cluster.max_replicas is None
        else f"{cluster.min_replicas} to {cluster.max_replicas} replicas"
    )
    _say(f"{number_of} of {settings.engine.num_threads} threads each")
    try:
        left = deploying.deploy(settings, address, stopping.is_set, _say)
    finally:
        _address_file().unlink(missing_ok=True)
    if left:
        _say(f"{left} requests were cut off.")
    return 0


def _with_port(settings: Settings) -> Settings:
    """A port that is free, known before the model loads and the same for a gateway that comes in the place of another.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    from amalgam.server.http.lifecycle import listen

    listeners = listen(settings.server)
    port = listeners[0].getsockname()[1]
    for listener in listeners:
        listener.close()
    return settings.replace(server={**settings.server.model_dump(), "port": port})


def _look_or_stop(settings: Settings, address: str, *, stops: bool, as_json: bool) -> int:
    _prepare_ray(address.rpartition(":")[0], is_local=False)
    from amalgam.cluster.ray import deploying

    deploying.connect(address)
    if not stops:
        return _tell(deploying.status(), as_json)
    left = deploying.stop(settings.server.drain_seconds)
    _say("The cluster has ended." + (f" {left} requests were cut off." if left else ""))
    return 0


def _tell(status: Any, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps(dataclasses.asdict(status)) + "\n")
        return 0
    states = ", ".join(f"{count} {state.lower()}" for state, count in status.replicas.items()) or "none"
    sys.stdout.write(f"Ray        {status.address}\nstatus     {status.status}\nreplicas   {states}\n")
    if status.message:
        sys.stdout.write(f"message    {status.message}\n")
    return 0


def _running_address() -> str:
    """Of the cluster that runs here; read without Ray, which has to be told of a loopback address before its import.

    Raises:
        UnavailableError: none has been started here.
    """
    try:
        return _address_file().read_text().strip()
    except OSError:
        raise UnavailableError(
            "No cluster has been started here.", remedy="Name Ray's --address, or start one with `amalgam deploy ray`."
        ) from None


def _address_file() -> Path:
    return state_folder() / "ray-address"


def _is_loopback(host: str) -> bool:
    from amalgam.server.http.origins import is_loopback

    return is_loopback(host)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
