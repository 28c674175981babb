"""Settings of a cluster: which it refuses, what all of its processes can use, what replicas get.

In: settings of one server. Out: settings. Must never know: what carries them.
"""

from __future__ import annotations

import os

from amalgam.base.processors import usable_threads
from amalgam.config.fields import with_paths
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError


def check_settings(settings: Settings) -> None:
    """
    Raises:
        ConfigError: a setting is of one server only, or lacks another one.
    """
    refused = {
        "planning.autoplan.enabled": settings.planning.autoplan.enabled,
        "weights.watch_seconds": settings.weights.watch_seconds,
        "statistics.file": settings.statistics.file,
        "server.unix_socket": settings.server.unix_socket,
        "engine.pin_threads": settings.engine.pin_threads,
    }
    for name, value in refused.items():
        if value:
            raise ConfigError(f"{name} is {value!r}, and is of one server only.", remedy="Leave it out for a cluster.")
    if settings.weights.resume and not settings.weights.history:
        raise ConfigError("weights.resume is true, and weights.history is empty.", remedy="Name a file there.")


def prepared(settings: Settings, *, is_local: bool) -> Settings:
    """Settings as all processes of a cluster can use them.

    Raises:
        ConfigError: engine.num_threads is needed for replicas on other machines.
    """
    return _with_absolute_paths(_with_proxies(_with_threads(settings, is_local=is_local), is_local=is_local))


def _with_proxies(settings: Settings, *, is_local: bool) -> Settings:
    """Where one machine is the whole cluster, the gateway does not move, and needs nobody who finds it."""
    if settings.cluster.proxies is not None:
        return settings
    return settings.replace(cluster={**settings.cluster.model_dump(), "proxies": not is_local})


def _with_threads(settings: Settings, *, is_local: bool) -> Settings:
    """Settings in which the replicas of this machine share its cores, where nobody says how many each has.

    Raises:
        ConfigError: replicas on other machines, whose cores nobody knows here.
    """
    if settings.engine.num_threads is not None:
        return settings
    if not is_local:
        raise ConfigError(
            "engine.num_threads is not set, and replicas may run on machines of any size.",
            remedy="Set it: Ray reserves as many cores for each replica.",
        )
    cluster = settings.cluster
    most = cluster.replicas if cluster.max_replicas is None else cluster.max_replicas
    return settings.replace(engine={**settings.engine.model_dump(), "num_threads": max(1, usable_threads() // most)})


def _with_absolute_paths(settings: Settings) -> Settings:
    """Paths as they are found from any process's folder; hub ids stay as they are."""
    mixed = settings.model.mixed_precision
    derived = {mixed.sources[name] for name in mixed.derived if name in mixed.sources}  # folders that may be made yet

    def absolute(path: str, may_be_hub_id: bool) -> str:
        is_hub_id = may_be_hub_id and path not in derived and not os.path.exists(path)
        return path if is_hub_id else os.path.abspath(path)

    return settings.replace(**with_paths(settings, absolute))


def settings_of_replicas(settings: Settings) -> Settings:
    """Without what is the gateway's: keys, which replicas need not know, and the history, which is one process' own."""
    keyless = {**settings.server.model_dump(), "api_keys": (), "admin_key": None, "api_keys_file": ""}
    return settings.replace(server=keyless, weights={})
