"""What logs and metrics keep of prompts, answers and keys: a text that nobody else has is sent, and looked for."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path

from amalgam.errors import ConfigError
from amalgam.tools.check.contract import Finding, check, failed, passed, skipped, warned
from amalgam.tools.check.target import Target

_MIN_ANSWER = 24  # letters; a shorter answer could stand in a log by chance


def _canary() -> str:
    return f"canary{secrets.token_hex(10)}"


@check(
    "privacy.log",
    "Prompts and answers stay out of the log",
    why="Logs are kept for long, copied to other systems, and read by many.",
    remedy="Log sizes and ids, not texts (server.log_prompts: false); mask what validation errors repeat.",
    requests=4,
)
async def log(target: Target) -> Finding:
    path = target.evidence.log
    if path is None:
        return skipped("No log is named.", remedy="--log FILE names the file that the server's log is written to.")
    before = _state_of(path)
    canaries = {kind: _canary() for kind in ("a prompt", "a streamed prompt", "a refused prompt", "a broken request")}
    answer = (await target.ask(f"Remember {canaries['a prompt']}. Tell me of rivers.", 32)).text
    await target.stream(f"Remember {canaries['a streamed prompt']}.", 4)
    await target.post(target.path, target.body(f"{canaries['a refused prompt']}", 4, temperature="hot"))
    await target.post(target.path, b'{"prompt": "' + canaries["a broken request"].encode() + b'", ')
    await asyncio.sleep(target.thresholds.privacy.log_seconds)
    text = _end_of(path, target.thresholds.privacy.log_bytes)
    kept = [kind for kind, canary in canaries.items() if canary.encode() in text]
    if len(answer) >= _MIN_ANSWER and any(form in text for form in _forms(answer[:_MIN_ANSWER])):
        kept.append("an answer")
    if kept:
        return failed(f"{path} has the text of {', '.join(kept)}", "none")
    if _state_of(path) == before:
        return warned(
            f"{path} did not change while 4 requests were answered",
            remedy="Is it this server's log? Name the right file.",
        )
    return passed(f"4 requests are logged in {path}, their texts are not", "none")


def _state_of(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _forms(text: str) -> set[bytes]:
    """A text as logs may have it."""
    return {text.encode(), json.dumps(text)[1:-1].encode(), repr(text)[1:-1].encode()}


def _end_of(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read(most)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", remedy="Check --log.") from None


@check(
    "privacy.log_keys",
    "Keys stay out of the log",
    why="A key in a log is everybody's who reads it.",
    remedy="Log a key's name, or nothing of it.",
)
async def log_keys(target: Target) -> Finding:
    path, keys = target.evidence.log, [key for key in (target.key, target.admin_key) if key]
    if path is None or not keys:
        return skipped("No log is named." if path is None else "No key is given.")
    text = _end_of(path, target.thresholds.privacy.log_bytes)
    if any(key.encode() in text for key in keys):
        return failed(f"{path} has a key", "none")
    return passed(f"no key in {path}", "none")


@check(
    "privacy.metrics",
    "Prompts stay out of metrics",
    why="Labels are kept for years, and each new value costs memory in the server and in Prometheus.",
    remedy="No label may hold what a request says.",
    requests=3,
)
async def metrics(target: Target) -> Finding:
    canary = _canary()
    await target.ask(f"Remember {canary}.", 4, user=canary)
    text = (await target.metrics()).content
    if canary.encode() in text:
        return failed("the metrics have the text of a prompt, or a user's name", "none")
    for key in (target.key, target.admin_key):
        if key and key.encode() in text:
            return failed("the metrics have a key", "none")
    return passed("neither a prompt nor its `user` is in the metrics", "none")
