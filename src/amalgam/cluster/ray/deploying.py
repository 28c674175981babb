"""A cluster begun, looked at, and ended: what `amalgam deploy ray` calls.

In: settings, where Ray is. Out: an application on Ray Serve, until a signal comes; its status.

Without an address Ray is started here, as `ray start --head` does, on the loopback interface, without Ray's dashboard,
and it ends with this process. Everything else in this room belongs to an application on a cluster, whosever it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import ApplicationStatus

from amalgam.base.processors import usable_threads
from amalgam.cluster.ray.gateway import ServeGateway
from amalgam.cluster.ray.replica import Replica
from amalgam.cluster.ray.router import ReplicaRouter
from amalgam.cluster.ray.scaling import ByQueueAndKV
from amalgam.cluster.settings import settings_of_replicas
from amalgam.config.settings import Settings
from amalgam.errors import ConflictError, UnavailableError

APPLICATION = "amalgam"
REPLICAS, GATEWAY = "Replica", "Gateway"
OBJECT_STORE_BYTES = 128 * 2**20  # for nothing but what does not fit into a message: a re-map's list, statistics
SHUTDOWN_SECONDS = 10.0  # beyond the drain
MAX_CALLS = 1000  # of a replica at a time
QUEUE_FACTOR = 2  # Serve's own limit is above the engines' queues, which refuse in words that clients know
_POLL_SECONDS = 0.2

logger = logging.getLogger("amalgam.cluster")


@dataclass(frozen=True)
class ClusterStatus:
    """What `--status` tells."""

    address: str
    status: str
    message: str
    replicas: dict[str, int]  # Serve's states of replicas → how many are in each


def connect(address: str | None, settings: Settings | None = None) -> str:
    """Start Ray here, or join the cluster at an address; where it is.

    Args:
        address: `auto`, the one that runs on this machine; HOST:PORT; None: start one.

    Raises:
        UnavailableError: there is none.
    """
    try:
        if address is None:
            assert settings is not None
            num_threads = settings.engine.num_threads or 1
            most = settings.cluster.max_replicas or settings.cluster.replicas
            ray.init(
                address="local",
                num_cpus=max(usable_threads(), num_threads * most),
                num_gpus=0 if settings.inference.device_map == "cpu" else None,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=True,
                logging_level=logging.WARNING,
            )
        else:
            ray.init(address=address, log_to_driver=settings is not None, logging_level=logging.WARNING)
    except Exception as error:  # of any class: a plain one if a node takes too long to start
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        if address is None:
            raise UnavailableError(f"Ray does not start: {reason}.", remedy="Its logs are in /tmp/ray.") from None
        raise UnavailableError(
            f"There is no Ray at {address!r}: {reason}.",
            remedy="Leave --address out to start one, or start it with `ray start --head`.",
        ) from None
    reached: str = ray.get_runtime_context().gcs_address
    return reached


def application(settings: Settings) -> serve.Application:
    """The gateway and its replicas, to be given to Serve."""
    cluster, engine = settings.cluster, settings.engine
    most = cluster.replicas if cluster.max_replicas is None else cluster.max_replicas
    drain_seconds = settings.server.drain_seconds
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": engine.num_threads},
        "max_ongoing_requests": MAX_CALLS,
        "health_check_period_s": cluster.health_seconds,
        "health_check_timeout_s": max(10.0, 5 * cluster.health_seconds),
        "graceful_shutdown_timeout_s": drain_seconds + SHUTDOWN_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.2,
        "request_router_config": RequestRouterConfig(request_router_class=ReplicaRouter),
    }
    if cluster.max_replicas is None:
        options["num_replicas"] = cluster.replicas
    else:
        target = cluster.target_requests or max(1.0, 0.75 * settings.inference.max_batch_size)
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=cluster.min_replicas,
            max_replicas=cluster.max_replicas,
            initial_replicas=min(max(cluster.replicas, cluster.min_replicas), cluster.max_replicas),
            upscale_delay_s=cluster.upscale_seconds,
            downscale_delay_s=cluster.downscale_seconds,
            metrics_interval_s=1.0,
            look_back_period_s=5.0,
            policy=AutoscalingPolicy(
                policy_function=ByQueueAndKV,
                policy_kwargs={"target_requests": target, "target_kv": cluster.target_kv},
            ),
        )
    replicas = serve.deployment(Replica).options(name=REPLICAS, **options)
    gateway = serve.deployment(ServeGateway).options(
        name=GATEWAY,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_CALLS + QUEUE_FACTOR * most * (engine.max_queue + settings.inference.max_batch_size),
        health_check_period_s=cluster.health_seconds,
        graceful_shutdown_timeout_s=drain_seconds + SHUTDOWN_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
    )
    bound = replicas.bind(settings_of_replicas(settings))
    application: serve.Application = gateway.bind(settings, bound)
    return application


def deploy(settings: Settings, address: str | None, should_stop: Callable[[], bool], say: Callable[[str], None]) -> int:
    """Run a cluster until `should_stop`, drain it, and end it. Ray has been connected to.

    Returns:
        how many requests were cut off because the drain took too long.

    Raises:
        ConflictError: one runs there already.
        UnavailableError: it does not start, or has been ended by somebody else.
    """
    if APPLICATION in serve.status().applications:
        raise ConflictError(
            "A cluster of amalgam runs there already.", remedy="End it with `amalgam deploy ray --stop --address …`."
        )
    server = settings.server
    serve.start(
        proxy_location=_proxies(settings, is_local=address is None),
        http_options={
            "host": server.host or "0.0.0.0",
            "port": server.port,
            "keep_alive_timeout_s": int(server.keep_alive_seconds),
            "ssl_certfile": server.tls_cert or None,
            "ssl_keyfile": server.tls_key or None,
        },
    )
    # Not `serve.run`, which cannot be interrupted, and tells of failures by a stack.
    handle = serve._run(application(settings), _blocking=False, name=APPLICATION, route_prefix="/")
    left = 0
    try:
        _wait_until_ready(handle, should_stop, say)
        while not should_stop():
            if APPLICATION not in _statuses():
                say("The cluster has been ended by somebody else.")
                return 0
            time.sleep(_POLL_SECONDS)
        say(f"Draining, at most {server.drain_seconds:g} s.")
        left = _drain(handle, server.drain_seconds)
    finally:
        with _ignoring_lost_connections():
            serve.delete(APPLICATION)
    return left


def _proxies(settings: Settings, *, is_local: bool) -> str:
    """Where Serve's proxies run."""
    if not settings.cluster.proxies:
        return "Disabled"
    return "HeadOnly" if is_local else "EveryNode"


def status() -> ClusterStatus:
    """Of the cluster that Ray is connected to.

    Raises:
        UnavailableError: none runs there.
    """
    found = _statuses().get(APPLICATION)
    address = ray.get_runtime_context().gcs_address
    if found is None:
        raise UnavailableError(f"No cluster of amalgam runs on Ray at {address}.", remedy="Start one.")
    replicas = found.deployments.get(REPLICAS)
    states = {} if replicas is None else _states(replicas)
    return ClusterStatus(
        address=address,
        status=str(found.status.value),
        message=found.message or ("" if replicas is None else replicas.message),
        replicas=states,
    )


def stop(drain_seconds: float) -> int:
    """Drain and end the cluster that Ray is connected to; how many requests were cut off.

    Raises:
        UnavailableError: none runs there.
    """
    status()
    left = _drain(serve.get_app_handle(APPLICATION), drain_seconds)
    serve.delete(APPLICATION)
    return left


def _wait_until_ready(handle: Any, should_stop: Callable[[], bool], say: Callable[[str], None]) -> None:
    """
    Raises:
        UnavailableError: the application cannot be started.
    """
    told = ""
    while not should_stop():
        found = _statuses().get(APPLICATION)
        if found is not None and found.status == ApplicationStatus.DEPLOY_FAILED:
            raise UnavailableError(f"The replicas do not start: {_reason(found)}", remedy="")
        if found is not None and found.status == ApplicationStatus.RUNNING:
            if handle.is_ready.remote().result(timeout_s=30):
                return
        elif found is not None and (replicas := found.deployments.get(REPLICAS)) is not None:
            now = ", ".join(f"{count} {state.lower()}" for state, count in _states(replicas).items())
            if now != told:
                say(f"Replicas: {now}")
                told = now
        time.sleep(_POLL_SECONDS)


def _states(deployment: Any) -> dict[str, int]:
    """Serve's states of a deployment's replicas, and how many are in each."""
    return {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items()}


def _reason(application: Any) -> str:
    """Of Serve's message, which quotes stacks, the last line that says something."""
    messages = [deployment.message for deployment in application.deployments.values()] + [application.message]
    lines = [line.strip() for message in messages for line in message.splitlines() if ": " in line]
    ours = [line for line in lines if "amalgam.errors." in line]
    told: str = (ours or lines or ["unknown"])[-1]
    return told.removeprefix("amalgam.errors.")


def _drain(handle: Any, seconds: float) -> int:
    try:
        left: int = handle.drain.remote(seconds).result(timeout_s=seconds + SHUTDOWN_SECONDS)
    except Exception as error:  # whatever Ray raises: the gateway is gone, and there is nothing to wait for
        logger.warning("the gateway could not be drained: %s", type(error).__name__)
        return 0
    return left


def _statuses() -> dict[str, Any]:
    return dict(serve.status().applications)


@contextmanager
def _ignoring_lost_connections() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever Ray raises where its own processes have ended before us
        logger.warning("the application could not be removed: %s", type(error).__name__)
