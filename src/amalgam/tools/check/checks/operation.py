"""Configuration that outlives the process, and an end without loss."""

from __future__ import annotations

import asyncio
import json
import signal
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from amalgam.config.settings import Settings
from amalgam.errors import ConfigError
from amalgam.tools.check import configured, keeping
from amalgam.tools.check.asking import Reply, Response
from amalgam.tools.check.contract import LAST, Finding, check, failed, passed, skipped, warned
from amalgam.tools.check.failures import CannotTellError
from amalgam.tools.check.process import Watched, listens, name_of
from amalgam.tools.check.target import Target

_NO_FILE = "No configuration file is named."
_NAME_IT = "--server-config FILE names the file that the server is started with."
_PARSERS: Mapping[str, Callable[[str], Any]] = {
    ".json": json.loads, ".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load,
}  # fmt: skip


@check(
    "operation.configuration",
    "The configuration can be had again",
    why="A server that was set up by hand cannot be set up again.",
    remedy="Keep the configuration in a file, and the file under version control; or name a copy of it with --backup.",
)
async def configuration(target: Target) -> Finding:
    path = target.evidence.server_config
    if path is None:
        return skipped(_NO_FILE, remedy=_NAME_IT)
    try:
        configured.read(path) if target.kind == "amalgam" else _read_other(path)
    except (OSError, ValueError, yaml.YAMLError, ConfigError) as error:
        return failed(f"{path}: {error}")
    backup = target.evidence.backup
    looks = [keeping.in_git(path)] if backup is None else [keeping.in_backup(path, backup), keeping.in_git(path)]
    threshold = "under version control, or in a backup"
    for look in looks:
        if look.is_kept:
            return passed(f"{path} {look.how}", threshold)
    return warned(f"{path} {', and '.join(look.how for look in looks)}", threshold)


def _read_other(path: Path) -> None:
    """A file of settings of somebody else's: what its ending promises, and not nothing.

    Raises:
        OSError, ValueError, yaml.YAMLError: it is none.
    """
    text = path.read_text()
    if not text.strip():
        raise ValueError("it is empty")
    parse = _PARSERS.get(path.suffix.lower())
    if parse is not None and not isinstance(parse(text), dict):
        raise ValueError("it names no setting")


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
        return configured.read(path)
    except ConfigError as error:
        raise CannotTellError(f"{path} cannot be read; see operation.configuration. {error}") from None


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
    described = await _model_info(target)
    if not isinstance(described.get("rules"), list):
        raise CannotTellError("/model_info does not say which rules hold.")
    served = _rules(described["rules"])
    written = [rule.model_dump() for rule in settings.model.mixed_precision.all_rules]
    version = _version(described)
    if served == written:
        return passed(f"weight version {version} has the rules of {path} ({len(written)})")
    if settings.weights.resume and settings.weights.history:
        return passed(f"weight version {version} has other rules than {path}; a restart goes on from weights.history")
    return failed(f"weight version {version} has {len(served)} rules that are not the {len(written)} of {path}")


async def _model_info(target: Target) -> Mapping[str, Any]:
    described = (await target.get("/model_info")).json
    if not isinstance(described, Mapping):
        raise CannotTellError("/model_info does not say what serves.")
    return described


def _version(described: Mapping[str, Any]) -> int | None:
    """The weight version that serves."""
    version = (described.get("weight_version") or {}).get("version")
    return version if isinstance(version, int) else None


def _rules(described: Sequence[Any]) -> list[dict[str, str]]:
    fields = ("pattern", "source", "device")
    return [
        {name: str(rule[name]) for name in fields if rule.get(name) is not None}
        for rule in described
        if isinstance(rule, Mapping)
    ]


@check(
    "operation.history",
    "Changes of the weights are kept",
    why="Who changed what, when, is asked after the restart that followed.",
    remedy="Set weights.history to a file on a disk that stays.",
    requests=3,
)
async def history(target: Target) -> Finding:
    settings = _settings_of_ours(target, "The server changes no weights while it serves.")
    if isinstance(settings, Finding):
        return settings
    asked = await target.get("/remaps", key=target.admin_key or None)
    listed = asked.json.get("remaps") if isinstance(asked.json, Mapping) else None
    count = f"{len(listed)} changes so far" if isinstance(listed, list) else f"/remaps: {asked.said}"
    named = settings.weights.history
    if not named:
        return warned(f"weights.history is not set: changes end with the process ({count})")
    path, version = configured.place(target, named), _version(await _model_info(target))
    if path is None:
        return skipped(f"weights.history is {named!r}, on the machine of the server's process; {count}")
    try:
        written = _versions_in(path)
    except (OSError, ValueError) as error:
        return failed(f"weights.history is {named!r}, and {path} cannot be read ({error}); {count}")
    if version not in written:
        return failed(f"{path} has {len(written)} weight versions, and not {version}, which serves; {count}")
    return passed(f"{path} has {len(written)} weight versions, with {version}, which serves; {count}")


def _versions_in(path: Path) -> set[int]:
    """Of the changes that a history holds; a line that is none, such as one half written, is passed over.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    found = set()
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("version"), int):
            found.add(record["version"])
    return found


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
