"""The server that is checked, and what is known of it.

In: an address, keys, thresholds, what lies around it. Out: answers to requests, counted. Must never know what is a
fault.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from amalgam.errors import ConfigError, RequestError, UnavailableError
from amalgam.tools.check.asking import Reply, Response, fetch
from amalgam.tools.check.failures import CannotTellError, PlainRefusalError
from amalgam.tools.check.process import is_there, listener, listens
from amalgam.tools.check.rules import read as read_rules
from amalgam.tools.check.thresholds import Thresholds
from amalgam.tools.load.client import PATHS, model_names
from amalgam.tools.load.http import Address

Kind = Literal["amalgam", "other"]
_TRIES, _MAX_WAIT_SECONDS = 4, 20.0  # of a request that a limit of the rate refuses
_LENGTH_KEYS = ("max_model_len", "context_length", "n_ctx", "max_context_length")


@dataclass(frozen=True)
class Evidence:
    """What there is beside the address; files are there and can be read.

    Attributes:
        log: file that the server writes its log to.
        rules: files with alerting rules for Prometheus.
        prometheus: its address.
        server_config: file that the server was started with.
        backup: a copy of that file, or a folder that has one.
        pid: the server's process on this machine; None: looked for by its port.
        drain: the process that may be ended.
    """

    log: Path | None = None
    rules: tuple[Path, ...] = ()
    prometheus: str = ""
    server_config: Path | None = None
    backup: Path | None = None
    pid: int | None = None
    drain: int | None = None


@dataclass
class Target:
    """
    Attributes:
        key, admin_key: sent as bearer tokens; empty: none.
        model: empty: the first that the server lists.
        path: where prompts are sent.
        max_tokens: length of a sequence, as the server says; None: it does not.
        num_requests: that have been sent.
        notes: what a reader of the report has to know.
    """

    address: Address
    thresholds: Thresholds = field(default_factory=Thresholds)
    key: str = ""
    admin_key: str = ""
    model: str = ""
    evidence: Evidence = field(default_factory=Evidence)
    path: str = PATHS["chat"]
    kind: Kind = "other"
    max_tokens: int | None = None
    num_requests: int = 0
    notes: list[str] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)  # what one check has measured and others read

    @property
    def is_chat(self) -> bool:
        return self.path == PATHS["chat"]

    @property
    def is_loopback(self) -> bool:
        host = self.address.host
        return host == "localhost" or host == "::1" or host.startswith("127.")

    @property
    def process(self) -> int | None:
        """The server's process on this machine: the one that was named, or who listens on its port; None: elsewhere."""
        if self.evidence.pid is not None:
            return self.evidence.pid
        return listener(self.address.port) if self.is_loopback else None

    def verify_evidence(self) -> None:
        """
        Raises:
            ConfigError: a file cannot be read, or the process to be ended is not the server.
        """
        evidence = self.evidence
        named = {"--log": evidence.log, "--server-config": evidence.server_config, "--backup": evidence.backup}
        for flag, path in named.items():
            if path is not None and not os.access(path, os.R_OK):
                raise ConfigError(f"{flag} {str(path)!r} cannot be read.", remedy="Give an existing file.")
        for path in evidence.rules:
            read_rules(path)
        if evidence.prometheus:
            Address.parse(evidence.prometheus)
        if evidence.pid is not None and not is_there(evidence.pid):
            raise ConfigError(f"There is no process {evidence.pid}.", remedy="Check --pid or --drain.")
        if evidence.drain is not None and not listens(evidence.drain, self.address.port):
            raise ConfigError(
                f"Process {evidence.drain} does not listen on port {self.address.port}, so it will not be ended.",
                remedy="Check --drain: it has to be the server at --url, on this machine.",
            )

    async def prepare(self) -> None:
        """Find the model, and whether it chats.

        Raises:
            UnavailableError: nobody answers, or nobody who speaks OpenAI's interface.
            RequestError: the server refuses a plain question.
        """
        names = [self.model] if self.model else await model_names(self.address, self.key, self._timeout)
        if not names:
            raise UnavailableError(f"{self.address} lists no model.", remedy="Name one with --model.")
        if len(names) > 1:
            self.notes.append(f"The server lists {len(names)} models; the first is checked. --model names another.")
        self.model = names[0]
        await self._describe()
        for path in PATHS["chat"], PATHS["completions"]:
            self.path = path
            reply = await self.try_asking("Hello", 1)
            if reply.response.status == 200:
                return
            if not reply.response.is_refusal or reply.response.status in (401, 403, 429):
                break
        kind = RequestError if reply.response.is_refusal else UnavailableError
        raise kind(
            f"{self.address}{self.path} does not answer a first request ({reply.response.said}).",
            remedy="Check --url, --model and --key.",
        )

    async def _describe(self) -> None:
        models = (await self.get("/v1/models")).json
        listed = models.get("data") if isinstance(models, dict) else None
        for entry in listed if isinstance(listed, list) else ():
            if isinstance(entry, dict) and entry.get("id") == self.model:
                if entry.get("owned_by") == "amalgam":
                    self.kind = "amalgam"
                found = [entry[key] for key in _LENGTH_KEYS if isinstance(entry.get(key), int)]
                self.max_tokens = found[0] if found else None

    @property
    def _timeout(self) -> float:
        return self.thresholds.timeout_seconds

    def headers(self, key: str | None = None) -> list[tuple[str, str]]:
        """
        Args:
            key: None: the user's; empty: none.
        """
        key = self.key if key is None else key
        headers = [("Content-Type", "application/json"), ("Accept", "application/json, text/event-stream, */*;q=0.1")]
        return [*headers, ("Authorization", f"Bearer {key}")] if key else headers

    async def get(
        self, path: str, *, key: str | None = None, headers: Sequence[tuple[str, str]] = (), method: str = "GET"
    ) -> Response:
        self.num_requests += 1
        return await fetch(
            self.address, method, path, headers=[*self.headers(key), *headers], timeout_seconds=self._timeout
        )

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | bytes,
        *,
        key: str | None = None,
        leave_after: int | None = None,
        timeout_seconds: float | None = None,
        on_head: asyncio.Event | None = None,
    ) -> Response:
        """
        Args:
            body: JSON, or bytes that are sent as they are.
        """
        self.num_requests += 1
        return await fetch(
            self.address,
            "POST",
            path,
            headers=self.headers(key),
            body=body if isinstance(body, bytes) else orjson.dumps(body),
            timeout_seconds=timeout_seconds or self._timeout,
            leave_after=leave_after,
            on_head=on_head,
        )

    def body(self, prompt: str, num_tokens: int, **fields: Any) -> dict[str, Any]:
        """What a prompt is sent as: greedy, unless a field says otherwise."""
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        if not self.is_chat:
            asked = {"prompt": prompt}
        return {"model": self.model, "max_tokens": num_tokens, "temperature": 0, **asked, **fields}

    async def try_asking(self, prompt: str, num_tokens: int, **fields: Any) -> Reply:
        """Send a prompt; a refusal is an answer, but for one by a limit of the rate: that is waited for.

        Raises:
            CannotTellError: the limit goes on refusing.
        """
        return Reply(await self._patient(lambda: self.post(self.path, self.body(prompt, num_tokens, **fields))))

    async def ask(self, prompt: str, num_tokens: int, **fields: Any) -> Reply:
        """Send a prompt that every server must answer.

        Raises:
            PlainRefusalError: it does not.
            CannotTellError: a limit of the rate refuses.
        """
        reply = await self.try_asking(prompt, num_tokens, **fields)
        if reply.response.status != 200 or reply.response.error_kind:
            raise PlainRefusalError(f"A plain request was not answered: {reply.response.said}")
        return reply

    async def stream(self, prompt: str, num_tokens: int, **fields: Any) -> Reply:
        """As `ask`, streamed, with usage where the server has it."""
        if self.kept.setdefault("stream_options", True):
            reply = await self.try_asking(
                prompt, num_tokens, stream=True, stream_options={"include_usage": True}, **fields
            )
            if reply.response.status not in (400, 422):
                return self._streamed(reply)
            self.kept["stream_options"] = False
        return self._streamed(await self.try_asking(prompt, num_tokens, stream=True, **fields))

    @staticmethod
    def _streamed(reply: Reply) -> Reply:
        if reply.response.status != 200 or reply.response.error_kind:
            raise PlainRefusalError(f"A plain streamed request was not answered: {reply.response.said}")
        return reply

    async def _patient(self, send: Callable[[], Any]) -> Response:
        for _ in range(_TRIES):
            response: Response = await send()
            if response.status != 429:
                return response
            text = response.headers.get("retry-after", "")
            await asyncio.sleep(min(_MAX_WAIT_SECONDS, float(text) if text.isdecimal() else 1.0))
        raise CannotTellError("The server's limit of the rate refuses what this check asks (429).")

    async def metrics(self) -> Response:
        """Metrics, by whichever key opens them.

        Raises:
            CannotTellError: there are none.
        """
        path = self.thresholds.monitoring.metrics_path
        for key in dict.fromkeys((self.key, self.admin_key)):
            response = await self.get(path, key=key)
            if response.status == 200:
                return response
        raise CannotTellError(f"{path} has no metrics ({response.said}).")

    async def until(self, condition: Callable[[], Any], seconds: float, pause: float = 0.2) -> bool:
        """Whether an asynchronous condition comes true within some time."""
        deadline = time.monotonic() + seconds
        while not await condition():
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(pause)
        return True
