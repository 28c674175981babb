"""A deployment without a model: the server's side of the engine's interface, with controllable speed and faults.

`serve` is for a process of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import resource
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from amalgam.config.placement import Placement, Rule, build_rules
from amalgam.config.server import ServerSettings
from amalgam.config.settings import Settings, build_settings
from amalgam.engine.generation_config import ModelDefaults
from amalgam.engine.meter import Load, Meter
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import EngineStatus, FinishReason, Observation, RequestOutput, Usage
from amalgam.errors import (
    CheckpointError,
    ConflictError,
    OverloadedError,
    PromptTooLongError,
    UnavailableError,
    VersionNotFoundError,
)
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.routing import RoutingTrace
from amalgam.runtime.changes import ChangeRequest, RemapRecord
from amalgam.runtime.describe import describe_projections
from amalgam.runtime.devices import DeviceFigures
from amalgam.runtime.jobs import Job, Jobs
from amalgam.runtime.statistics import ExpertStatistics
from amalgam.server import app, run
from amalgam.server.http import lifecycle
from amalgam.server.http.lifecycle import url_of
from amalgam.server.http.record import RequestRecord

FAIL = "fail"  # a prompt that makes the engine raise
MAX_SEQ_LENGTH = 64


class FakeStream:
    """The outputs of one request; closing it ends the request even before any output has been asked for."""

    def __init__(self, engine: FakeEngine, request_id: int, outputs: AsyncGenerator[RequestOutput]) -> None:
        self._engine, self.request_id, self.outputs = engine, request_id, outputs

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> RequestOutput:
        return await anext(self.outputs)

    async def aclose(self) -> None:
        await self.outputs.aclose()
        self._engine.end(self.request_id)


class BreakingOff:
    """An application whose answers end in their midst, as when something fails that has no answer."""

    def __init__(self) -> None:
        self.user_middleware: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["record"] = RequestRecord("r1", scope["method"], scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}", "more_body": True})


@dataclass
class FakeEngine:
    """Answers `w0 w1 ...`, one word a step; several requests at once.

    Attributes:
        held_at: requests wait after so many tokens, until this is None.
        tokens_per_piece: a word comes with the last of so many tokens, as characters do that take several.
        max_step_tokens: of a prompt, in the one step that it gets before that.
    """

    step_seconds: float = 0.0
    held_at: int | None = None
    tokens_per_piece: int = 1
    max_step_tokens: int = MAX_SEQ_LENGTH
    max_queue: int = 8
    is_alive: bool = True
    is_stopped: bool = False
    num_submitted: int = 0
    num_waiting: int = 0
    max_running: int = 0
    running: set[int] = field(default_factory=set)
    version: Any = field(default_factory=lambda: FakeVersion(1))
    meter: Meter = field(default_factory=Meter)
    observations: list[Observation] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    embedded_by: list[int] = field(default_factory=list)

    def check_prompt_length(self, num_tokens: int, num_new_tokens: int = 1) -> None:
        if num_tokens + num_new_tokens > MAX_SEQ_LENGTH:
            raise PromptTooLongError(f"The prompt has {num_tokens} tokens.", remedy=f"Allowed: {MAX_SEQ_LENGTH}.")

    def checked_prompt(self, prompt_ids: Sequence[int], num_new_tokens: int = 1) -> Sequence[int]:
        return prompt_ids

    @property
    def max_prompt_tokens(self) -> int:
        return MAX_SEQ_LENGTH - 1

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        observation: Observation,
        constraint: Any = None,
        version: Any = None,
    ) -> FakeStream:
        self.observations.append(observation)
        self.params.append(params)
        if self.is_stopped or not self.is_alive:
            raise UnavailableError("The engine has stopped.")
        self.check_prompt_length(len(prompt_ids), min(1, params.max_new_tokens))
        if len(self.running) >= self.max_queue:
            raise OverloadedError("The queue is full.")
        self.num_submitted += 1
        self.running.add(self.num_submitted)  # at once, as in the engine, and not when the first output is asked for
        self.max_running = max(self.max_running, len(self.running))
        self.meter.set_load(Load(len(self.running)))
        version_id = (version or self.version).version_id
        outputs = self.outputs_of(self.num_submitted, prompt_ids, params, observation, version_id)
        return FakeStream(self, self.num_submitted, outputs)

    def end(self, request_id: int) -> None:
        """Harmless when repeated."""
        self.running.discard(request_id)
        self.meter.set_load(Load(len(self.running)))

    async def outputs_of(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        observation: Observation,
        version_id: int,
    ) -> AsyncGenerator[RequestOutput]:
        started, count = time.monotonic(), params.max_new_tokens
        try:
            for index in range(count):
                self._compute(prompt_ids, observation)
                await asyncio.sleep(self.step_seconds)
                while (  # noqa: ASYNC110 – tests change these in other threads
                    self.held_at is not None and index >= self.held_at and self.is_alive and not self.is_stopped
                ):
                    await asyncio.sleep(0.002)
                if self.is_stopped or not self.is_alive:
                    yield self._failed(request_id, UnavailableError("The engine has stopped."))
                    return
                if prompt_ids == encode(FAIL) and index == 1:
                    yield self._failed(request_id, RuntimeError(f"the prompt was {FAIL}"))
                    return
                is_last = index == count - 1
                seconds = time.monotonic() - started
                usage = Usage(len(prompt_ids), count, 0.0, seconds, seconds, version_id)
                reason = FinishReason.LENGTH if is_last else None
                trace = fake_trace(len(prompt_ids) + count - 1) if is_last and observation.wants_trace else None
                text = "" if (index + 1) % self.tokens_per_piece else f"w{index} "
                output = RequestOutput(
                    request_id, text, (index,), reason, usage=usage if is_last else None, trace=trace
                )
                self.meter.add_step(len(prompt_ids) if index == 0 else 0, 1)
                if is_last:
                    self.meter.add_finished(output)
                yield output
        finally:
            self.end(request_id)

    def _failed(self, request_id: int, error: Exception) -> RequestOutput:
        return RequestOutput(request_id, "", (), FinishReason.ERROR, error=error)

    def between_steps(self) -> Any:
        return nullcontext()

    async def embed(
        self, prompt_ids: Sequence[int], pooling: str, observation: Observation, version: Any = None, *more: Any
    ) -> Any:
        self.embedded_by.append((version or self.version).version_id)
        self.observations.append(observation)
        self.check_prompt_length(len(prompt_ids), 0)
        if len(self.running) >= self.max_queue:
            raise OverloadedError("The queue is full.")
        self.num_submitted += 1
        request_id = self.num_submitted
        self.running.add(request_id)
        self.max_running = max(self.max_running, len(self.running))
        try:
            self._compute(prompt_ids, observation)
            await asyncio.sleep(self.step_seconds)
            while self.held_at is not None:  # noqa: ASYNC110 – tests change it in other threads
                await asyncio.sleep(0.002)
        finally:
            self.running.discard(request_id)
        return np.array([len(prompt_ids), prompt_ids[-1] if pooling == "last" else 0, 0], np.float32)

    def _compute(self, prompt_ids: Sequence[int], observation: Observation) -> None:
        if observation.progress is not None:
            observation.progress.num_tokens = min(len(prompt_ids), self.max_step_tokens)

    def status(self) -> Any:
        return EngineStatus(
            is_alive=self.is_alive,
            is_draining=False,
            num_running=len(self.running),
            num_waiting=self.num_waiting,
            num_free_blocks=6,
            num_blocks=8,
            versions={self.version.version_id: len(self.running)},
        )

    def stop(self) -> None:
        self.is_stopped = True


class FakeVersion:
    """A weight version whose experts all have one precision."""

    def __init__(self, version_id: int) -> None:
        self.version_id = version_id
        self.origins: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}
        self.devices: dict[str, str] = {}

    def __getitem__(self, slot: str) -> Any:
        return self.weights[slot]


def fake_trace(num_tokens: int) -> RoutingTrace:
    """Token i goes to experts i % 4 and 3 in both layers."""
    expert_ids = np.array([[[i % 4, 3]] * 2 for i in range(num_tokens)], np.int16).reshape(num_tokens, 2, 2)
    return RoutingTrace((0, 2), expert_ids, np.full(expert_ids.shape, 0.5, np.float32))


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


@dataclass
class FakeTrials:
    """Nothing is being tried."""

    canary: Any = None
    shadow: Any = None
    num_failed_versions: int = 0

    def report(self, kind: str) -> dict[str, Any]:
        return {"state": "none"}


@dataclass
class FakeDeployment:
    engine: FakeEngine = field(default_factory=FakeEngine)
    tracker: ExpertTracker | None = None
    num_experts: int = 0
    model_name: str = "fake"
    is_closed: bool = False
    encode: Callable[[str], list[int]] = encode
    remaps: list[RemapRecord] = field(default_factory=list)
    defaults: ModelDefaults = field(default_factory=ModelDefaults)
    tokenizer_override: Any = None
    settings: Settings = field(default_factory=lambda: fake_settings())
    rules: tuple[Rule, ...] = ()
    configured_rules: tuple[Rule, ...] = ()
    earlier_rules: list[tuple[Rule, ...]] = field(default_factory=list)
    autoplan: Any = None
    trials: Any = field(default_factory=lambda: FakeTrials())
    named: dict[str, FakeVersion] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.jobs = Jobs(lambda: self.version_id)

    @property
    def version(self) -> Any:
        return self.engine.version

    def version_for(self, weights: str | int | None = None, key: str | None = None) -> Any:
        if weights is None or str(weights) == str(self.version_id):
            return self.version
        if weights not in self.named:
            raise VersionNotFoundError(f"There are no weights {weights!r}.", param="weights")
        return self.named[str(weights)]

    @property
    def version_id(self) -> int:
        return self.engine.version.version_id

    @property
    def statistics(self) -> ExpertStatistics | None:
        if self.tracker is None:
            return None
        find = {self.version_id: self.version, **{one.version_id: one for one in self.named.values()}}.get
        return ExpertStatistics(self.tracker, lambda: self.version, find, model=self.model_name)

    def expert_info(self, layer_id: int, expert_id: int) -> dict[str, Any]:
        projections = describe_projections(self.version, layer_id, expert_id, "cpu")
        use = None if self.statistics is None else self.statistics.use_of(layer_id, expert_id)
        return {
            "layer_id": layer_id, "expert_id": expert_id, "num_experts": self.num_experts, "use": use,
            "projections": projections,
        }  # fmt: skip

    @property
    def tokenizer(self) -> Any:
        return self.tokenizer_override or SimpleNamespace(
            encode_by_piece=self._encode_by_piece,
            token_starts_by_piece=lambda text: iter([list(range(len(text)))]),
            vocab_size=0x110000,
            decode=lambda token_ids, **_: "".join(map(chr, token_ids)),
            encode_chat_by_piece=lambda messages, limit, **_: self._encode_by_piece(messages[-1]["content"], limit),
            token_text=chr,
            token_bytes=lambda token_id: chr(token_id).encode(),
            chat_template=None,
            special_tokens={},
            prompt_end=lambda prompt_ids: "".join(map(chr, prompt_ids)),
        )

    def _encode_by_piece(self, text: str, max_tokens: int, **_: Any) -> Iterator[list[int]]:
        yield self.encode(text)

    def device_figures(self) -> dict[str, DeviceFigures]:
        return {
            "cpu": DeviceFigures(experts=self.num_experts, used_bytes=2, limit_bytes=None, available_bytes=10),
            "cuda": DeviceFigures(0, 0, 100, 100, uploaded_bytes=3, sent_bytes=4, returned_bytes=5, rows=6),
        }

    def model_info(self) -> dict[str, Any]:
        row = {"weights": 1, "bytes": 2}
        return {
            "architecture": "fake",
            "sizes": {"layers": 2, "experts_per_layer": self.num_experts},
            "sources": {"base": {"path": "fake", **row}},
            "precisions": {"bf16": {"parameters": 1, **row}},
            "memory": {"weights_bytes": 2, "kv_cache_bytes": 0, "process_peak_bytes": 0},
            "weight_version": {"version": self.engine.version.version_id},
            "sampling_defaults": self.defaults.as_json(),
            "counts_experts": self.tracker is not None,
        }

    @property
    def num_undoable(self) -> int:
        return len(self.earlier_rules)

    def plan_change(self, request: ChangeRequest) -> Any:
        changed = [self.changed(name, source) for name, source in (request.mapping or {}).items() if source]
        size = sum(change.bytes_after for change in changed)
        return SimpleNamespace(
            rules=self.rules, version=None, previous_version=self.version_id, fingerprint="f", changed=changed,
            load=SimpleNamespace(num_weights=len(changed), read_bytes=size, new_bytes=size, peak_bytes=size),
            shared_bytes=2, available_bytes=8, has_room=size <= 8, seconds=0.5,
            devices={},
        )  # fmt: skip

    def changed(self, name: str, source: Any) -> WeightChange:
        """A weight, once it comes from a source."""
        if isinstance(source, Placement):
            return WeightChange(name, "base", source.source or "base", "bf16", "bf16", 4, 4, None, source.device)
        return WeightChange(name, "base", source, "bf16", source, 4, 2)

    def undo_weight_mapping(self, version_id: int) -> Any:
        if version_id != self.engine.version.version_id or not self.earlier_rules:
            raise ConflictError("There is nothing to undo.", remedy="Look again.")
        before = self.rules
        self.rules = self.earlier_rules.pop()
        return self._go_live({rule.pattern: "base" for rule in before if rule not in self.rules})

    def update_weight_mapping(self, mapping: dict[str, str]) -> Any:
        self.earlier_rules.append(self.rules)
        self.rules = (*(rule for rule in self.rules if rule.pattern not in mapping), *build_rules(mapping))
        return self._go_live(mapping)

    def _go_live(self, mapping: dict[str, str]) -> Any:
        before = self.engine.version.version_id
        self.engine.version = FakeVersion(before + 1)
        self.remaps.append(RemapRecord(time.time(), before + 1, before, len(mapping), 2, 0.0))
        changed = [self.changed(name, source) for name, source in mapping.items()]
        return SimpleNamespace(
            version=before + 1, previous_version=before, fingerprint="f", changed=changed, num_loaded=len(changed),
            loaded_bytes=2, shared_bytes=3, seconds=0.0, name=None,
        )  # fmt: skip

    def reload_weights(self) -> Any:
        return self._go_live({})

    def describe_weights(self) -> dict[str, Any]:
        version = {
            "version": self.version_id, "states": ["current"], "names": [], "pinned": False, "fingerprint": "f",
            "rules": [], "bytes": 2, "own_bytes": 2, "bytes_by_format": {"bf16": 2},
            "bytes_by_device": {"cpu": 2}, "created": 0.0,
            "age_seconds": 1.0, "requests": len(self.engine.running),
        }  # fmt: skip
        return {"current": self.version_id, "versions": [version], "bytes": 2, "available_bytes": 8}

    def change(self, request: ChangeRequest, progress: Any = None) -> Any:
        with self.jobs.begin(request.kind, request.what) as job:
            job.result = result = (
                self.reload_weights() if request.is_reload else self.update_weight_mapping(request.mapping or {})
            )
            return result

    def start_change(self, request: ChangeRequest) -> Job:
        return self.jobs.start(request.kind, request.what, lambda: self.change(request))

    def start_rollback(self) -> Job:
        return self.start_change(ChangeRequest(version=self.version_id - 1))

    def close(self) -> None:
        self.jobs.close()
        self.engine.stop()
        self.is_closed = True


@dataclass(frozen=True)
class WeightChange:
    name: str
    source_before: str
    source_after: str
    format_before: str
    format_after: str
    bytes_before: int
    bytes_after: int
    device_before: str | None = None
    device_after: str | None = None


def fake_settings(**server: Any) -> Settings:
    """Settings of a server; unless told otherwise it exports into a folder that nobody else has."""
    if "export_dir" not in server:
        server["export_dir"] = str(Path(_scratch(), secrets.token_hex(8)))
    return build_settings({"model": {"base_path": "fake"}, "server": server})


@cache
def _scratch() -> str:
    folder = tempfile.TemporaryDirectory(prefix="amalgam-fake-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return folder.name


def tell_url(other: Connection) -> None:
    """Have the server of this process say there where it listens; a port chosen before may be taken meanwhile."""
    listen = app.listen

    def listen_and_tell(settings: ServerSettings) -> list[socket.socket]:
        listeners = listen(settings)
        other.send(url_of(listeners[0], settings.host))
        return listeners

    app.listen = listen_and_tell


def url_told(other: Connection) -> str:
    """What a process says that has been told to `tell_url`."""
    assert other.poll(150), "it does not listen"
    url: str = other.recv()
    return url


def serve(
    port: int,
    released: Connection,
    log: Path,
    drain: float = 60,
    held: str = "",
    fault: str = "",
    files: int = 0,
    keys: str = "",
) -> None:
    """Serve until a signal, with the standard error output in `log`.

    Args:
        released: where it says its URL, and what is `held` waits for a message: `load` (the model), `steps` (after two
            tokens) or `exit` (of a server that is drained or has failed).
        fault: `load` (the model cannot be loaded) or `die` (the engine is dead).
        files: the soft limit on file descriptors, unless 0.
        keys: file of API keys.
    """
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    engine = FakeEngine(is_alive=fault != "die", held_at=2 if held == "steps" else None)
    is_released, stopping = threading.Event(), threading.Event()

    def release() -> None:
        released.recv()
        is_released.set()
        engine.held_at = None
        if held == "exit":
            lifecycle.MIN_DRAIN_SECONDS = lifecycle.FAILURE_SECONDS = 0.0

    def open_deployment() -> Any:
        while held == "load" and not is_released.wait(0.01):
            if stopping.is_set():
                raise UnavailableError("The server is stopping.")
        if fault == "load":
            raise CheckpointError("Shard 'a.safetensors' is missing.", remedy="Download it again.")
        return FakeDeployment(engine)

    if held == "exit":
        lifecycle.MIN_DRAIN_SECONDS = lifecycle.FAILURE_SECONDS = math.inf
    threading.Thread(target=release, daemon=True).start()
    tell_url(released)
    run(fake_settings(port=port, drain_seconds=drain, api_keys_file=keys), open_deployment, stopping)
