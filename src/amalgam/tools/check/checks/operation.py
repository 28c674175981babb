"""Configuration that outlives the process, and an end without loss."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from amalgam.config.settings import Settings, read_settings
from amalgam.errors import ConfigError
from amalgam.tools.check.asking import Reply, Response
from amalgam.tools.check.contract import LAST, Finding, check, failed, passed, skipped, warned
from amalgam.tools.check.failures import CannotTellError
from amalgam.tools.check.process import Watched, listens, name_of
from amalgam.tools.check.target import Target

_NO_FILE = "No configuration file is named."
_NAME_IT = "--server-config FILE names the file that the server is started with."


@check(
    "operation.configuration",
    "The configuration is a file that can be read",
    why="A server that was set up by hand cannot be set up again.",
    remedy="Keep the configuration in a file, and the file under version control.",
)
async def configuration(target: Target) -> Finding:
    path = target.evidence.server_config
    if path is None:
        return skipped(_NO_FILE, remedy=_NAME_IT)
    if target.kind == "amalgam":
        try:
            _settings(path)
        except ConfigError as error:
            return failed(f"{path}: {error}")
        return passed(f"{path} is a valid configuration")
    try:
        yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        return failed(f"{path}: {error}")
    return passed(f"{path} can be read")


def _settings_of_ours(target: Target, otherwise: str) -> Settings | Finding:
    """What a server of ours was started with; of another one, or without the file, what is found instead.

    Raises:
        CannotTellError: the file cannot be read.
    """
    path = target.evidence.server_config
    if target.kind != "amalgam":
        return skipped(otherwise)
    if path is None:
        return skipped(_NO_FILE, remedy=_NAME_IT)
    try:
        return _settings(path)
    except ConfigError as error:
        raise CannotTellError(f"{path} cannot be read; see operation.configuration. {error}") from None


def _settings(path: Path) -> Settings:
    """As the file has them: variables of this process are not the server's."""
    return read_settings(path, needs_model=True, environ={}).settings


@check(
    "operation.mapping",
    "What serves is what the file says",
    why="After a restart other weights would serve than those that were tried.",
    remedy="Write the rules into the file, or set weights.history and weights.resume.",
    requests=1,
)
async def mapping(target: Target) -> Finding:
    settings = _settings_of_ours(target, "The server does not say which weights it serves.")
    if isinstance(settings, Finding):
        return settings
    path = target.evidence.server_config
    described = (await target.get("/model_info")).json
    if not isinstance(described, Mapping) or not isinstance(described.get("rules"), list):
        raise CannotTellError("/model_info does not say which rules hold.")
    served = _pairs(described["rules"])
    written = [(rule.pattern, rule.source) for rule in settings.model.mixed_precision.all_rules]
    version = (described.get("weight_version") or {}).get("version")
    if served == written:
        return passed(f"weight version {version} has the rules of {path} ({len(written)})")
    if settings.weights.resume and settings.weights.history:
        return passed(f"weight version {version} has other rules than {path}; a restart goes on from weights.history")
    return failed(f"weight version {version} has {len(served)} rules that are not the {len(written)} of {path}")


def _pairs(rules: Sequence[Any]) -> list[tuple[str, str]]:
    return [(str(rule.get("pattern")), str(rule.get("source"))) for rule in rules if isinstance(rule, Mapping)]


@check(
    "operation.history",
    "Changes of the weights are kept",
    why="Who changed what, when, is asked after the restart that followed.",
    remedy="Set weights.history to a file on a disk that stays.",
    requests=2,
)
async def history(target: Target) -> Finding:
    settings = _settings_of_ours(target, "The server changes no weights while it serves.")
    if isinstance(settings, Finding):
        return settings
    asked = await target.get("/remaps", key=target.admin_key or None)
    listed = asked.json.get("remaps") if isinstance(asked.json, Mapping) else None
    count = f"{len(listed)} changes so far" if isinstance(listed, list) else f"/remaps: {asked.said}"
    if not settings.weights.history:
        return warned(f"weights.history is not set: changes end with the process ({count})")
    return passed(f"weights.history is {settings.weights.history!r}; {count}")


@check(
    "operation.drain",
    "The end loses nothing",
    why="Every new version, every smaller cluster ends processes; users must not see it.",
    remedy="On SIGTERM: say 503 to new requests and at /ready, finish what is under way, exit with 0.",
    requests=40,
    order=LAST,
    is_opt_in=True,
)
async def drain(target: Target) -> Finding:
    pid = target.evidence.drain
    assert pid is not None
    if not listens(pid, target.address.port):
        raise CannotTellError(f"Process {pid} does not listen on port {target.address.port}, so it is not ended.")
    watched = Watched(pid)
    try:
        return await _drain(target, pid, watched)
    finally:
        watched.close()


async def _drain(target: Target, pid: int, watched: Watched) -> Finding:
    """SIGTERM while a stream is under way."""
    limit = target.thresholds.operation.drain_seconds
    begun = asyncio.Event()
    body = target.body("Count from one to a thousand.", target.thresholds.operation.drain_tokens, stream=True)
    streaming = asyncio.create_task(target.post(target.path, body, timeout_seconds=limit, on_head=begun))
    waiting = asyncio.create_task(begun.wait())
    await asyncio.wait({streaming, waiting}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if streaming.done() or not begun.is_set():
        streaming.cancel()
        raise CannotTellError("A stream could not be begun, or was over at once: raise operation.drain_tokens.")
    watched.send(signal.SIGTERM)
    started = time.monotonic()
    later = await _meanwhile(target, streaming)
    reply = Reply(await streaming)
    await watched.wait(limit - (time.monotonic() - started))
    return _judge(target, reply, later, watched, f"{name_of(pid)} {pid}", time.monotonic() - started)


async def _meanwhile(target: Target, streaming: asyncio.Task[Response]) -> list[Response]:
    """Answers to new requests, until the one under way has ended."""
    await asyncio.sleep(0.2)
    answers: list[Response] = []
    while not streaming.done() and len(answers) < 20:
        answers.append(await target.post(target.path, target.body("Hello", 1), timeout_seconds=5.0))
        if ready := target.kept.get("ready_path"):
            answers.append(await target.get(ready, key=""))
        await asyncio.sleep(0.25)
    return answers


def _judge(
    target: Target, reply: Reply, later: Sequence[Response], watched: Watched, process: str, seconds: float
) -> Finding:
    faults, notes = [], []
    if reply.response.error_kind or not reply.has_done or not reply.finish_reason:
        faults.append(f"the stream was cut ({reply.response.said})")
    elif reply.finish_reason == "error" or any("error" in body for body in reply.bodies):
        faults.append("the stream ended with an error")
    else:
        notes.append("the stream was finished")
    if taken := [response for response in later if response.status == 200]:
        faults.append(f"{len(taken)} requests or probes after SIGTERM were answered as before")
    elif any(response.status == 503 for response in later):
        notes.append("new ones got 503")
    elif later:
        notes.append(f"new ones: {later[0].said}")
    if not watched.has_ended:
        return failed("; ".join([*faults, *notes, f"{process} is still there {seconds:.0f} s after SIGTERM"]))
    code = watched.exit_code()
    if code:
        faults.append(f"exit code {code}")
    notes.append(f"{process} was gone after {seconds:.1f} s" + (", exit code 0" if code == 0 else ""))
    value, threshold = (
        "; ".join([*faults, *notes]),
        f"finished, 503, 0, ≤ {target.thresholds.operation.drain_seconds:g} s",
    )
    if faults:
        return failed(value, threshold)
    if later and not any(response.status == 503 for response in later):
        return warned(value, threshold, remedy="Go on listening while draining, and say 503: clients then try another.")
    if code is None:
        notes.append("its exit code is for its parent only")
        return passed("; ".join(notes), threshold)
    return passed(value, threshold)
