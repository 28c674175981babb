"""OpenAI's completions and chat completions as a client sees them: when each piece of an answer's text came.

In: questions. Out: answers with times, token counts, or what went wrong. Must never know which server it is, nor how
many others ask.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import orjson

from amalgam.errors import ConfigError, RequestError, UnavailableError, describe
from amalgam.tools.load.http import Address, Connections, ExchangeError

Endpoint = Literal["completions", "chat"]
Message = Mapping[str, Any]

PATHS: Mapping[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_MAX_ERROR_BYTES = 1 << 16
_MAX_EVENT_BYTES = 1 << 24
# Where a chat's delta has text: of the answer, of reasoning under both of its names, of a refusal, of calls.
_DELTA_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")


@dataclass(frozen=True)
class Question:
    """What one request asks.

    Attributes:
        prompt: a text, or the messages of a chat.
        num_tokens: the most new tokens; None: as many as the server likes.
        fields: of the body, besides.
    """

    prompt: str | Sequence[Message]
    num_tokens: int | None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """One request's fate; times are those of `time.perf_counter`.

    Attributes:
        due: when the request was to be sent; `sent`: when it was.
        text: of its choices; of a chat, without reasoning and calls.
        arrivals: when each event with text came.
        ended: when the last event with a choice came; of an answer that failed, when that was known.
        status: of the HTTP answer, 0 if there was none.
        retry_after: what a refusal says of when to come again, as it stands in the header.
        error_kind: what kind of error it ended with, such as `HTTP 429`; empty for a whole answer.
        num_prompt_tokens, num_new_tokens, num_cached_tokens: of `usage`; None if the server gave none.
    """

    question: Question
    due: float
    sent: float = 0.0
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    status: int = 0
    retry_after: str = ""
    error_kind: str = ""
    error: str = ""
    finish_reason: str = ""
    num_prompt_tokens: int | None = None
    num_new_tokens: int | None = None
    num_cached_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """New tokens as the server counts them, or one for each event with text."""
        return len(self.arrivals) if self.num_new_tokens is None else self.num_new_tokens

    @property
    def first_token_seconds(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def total_seconds(self) -> float:
        return self.ended - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between events with text."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def seconds_per_token(self) -> float | None:
        """After the first one; None if there is no other."""
        others = self.num_tokens - 1
        return None if others < 1 else (self.total_seconds - self.first_token_seconds) / others


class Client:
    """Asks one model of one server.

    Args:
        api_key: sent as a bearer token if there is one.
        model: named in every request.
        fields: what bodies have beside the fields that belong to a question.
        wants_usage: ask for token counts at the end of the stream.
        timeout_seconds: for a whole answer.
        keeps_connections: use a connection again after an answer.
    """

    def __init__(
        self,
        address: Address,
        endpoint: Endpoint,
        model: str,
        *,
        api_key: str = "",
        fields: Mapping[str, Any] | None = None,
        wants_usage: bool = True,
        timeout_seconds: float = 600.0,
        keeps_connections: bool = True,
    ) -> None:
        self._address = address
        self._endpoint: Endpoint = endpoint
        self._connections = Connections(address, keeps=keeps_connections)
        self._headers = _headers(api_key)
        self._fields = {"model": model, "stream": True, **(fields or {})}
        if wants_usage:
            self._fields["stream_options"] = {"include_usage": True}
        self._timeout_seconds = timeout_seconds

    async def ask(self, question: Question, *, into: Answer | None = None, leave_after: int | None = None) -> Answer:
        """Send one request and read its stream to the end. An error is part of the answer; only a cancellation raises.

        Args:
            into: what to fill, for who looks at it meanwhile.
            leave_after: close the connection after so many events with text, as a user who stops does; 0: after the
                answer's headers.
        """
        answer = into or Answer(question, time.perf_counter())
        body = orjson.dumps(self.body(question))
        answer.sent = time.perf_counter()
        reader = _AnswerReader(answer, leave_after)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._connections.exchange("POST", PATHS[self._endpoint], self._headers, body, reader)
            reader.finish()
        except TimeoutError:
            answer.error_kind, answer.error = "timeout", f"No whole answer in {self._timeout_seconds:g} s."
        except ExchangeError as error:
            answer.error_kind, answer.error = error.kind, str(error)
        except _AnswerError as error:
            answer.error_kind, answer.error = error.kind, str(error)
        if answer.error_kind or not answer.ended:
            answer.ended = time.perf_counter()
        return answer

    def close(self) -> None:
        """Let go of the connections that are kept."""
        self._connections.close()

    def body(self, question: Question) -> dict[str, Any]:
        """What a question is sent as."""
        if self._endpoint == "completions":
            asked: dict[str, Any] = {"prompt": question.prompt}
        elif isinstance(question.prompt, str):
            asked = {"messages": [{"role": "user", "content": question.prompt}]}
        else:
            asked = {"messages": list(question.prompt)}
        if question.num_tokens is not None:
            asked["max_tokens"] = question.num_tokens
        return {**self._fields, **question.fields, **asked}


async def model_names(address: Address, api_key: str = "", timeout_seconds: float = 30.0) -> list[str]:
    """What `/v1/models` lists.

    Raises:
        UnavailableError: no server answers, or none that speaks OpenAI's interface.
        RequestError: the server refuses.
    """
    connections = Connections(address, keeps=False)
    reader = _BodyReader()
    try:
        async with asyncio.timeout(timeout_seconds):
            await connections.exchange("GET", "/v1/models", _headers(api_key), b"", reader)
        if reader.status != 200:
            kind = RequestError if reader.status < 500 else UnavailableError
            raise kind(
                f"{address}/v1/models answered {reader.status}: {error_message(reader.content)}",
                remedy="Check the address and --api-key; --model does without this question.",
            )
        return [str(model["id"]) for model in orjson.loads(reader.content)["data"]]
    except (TimeoutError, ExchangeError) as error:
        raise UnavailableError(
            f"No server answers at {address} ({error or 'timeout'}).", remedy="Start it, or check --url."
        ) from None
    except (orjson.JSONDecodeError, LookupError, TypeError):
        raise UnavailableError(
            f"What {address}/v1/models says is no list of models: {describe(reader.content[:200])}.",
            remedy="Check --url, or name the model with --model.",
        ) from None


def error_message(content: bytes) -> str:
    """What a body says that tells of an error: OpenAI's `error.message` and its relatives, else its beginning."""
    text = content[:400].decode(errors="replace")
    try:
        value = orjson.loads(content)
        error = value.get("error", value)
        said = error if isinstance(error, str) else error.get("message", error.get("detail", text))
    except (orjson.JSONDecodeError, AttributeError):
        return text
    return str(said)


def _headers(api_key: str) -> list[tuple[str, str]]:
    """
    Raises:
        ConfigError: the key cannot stand in a header.
    """
    if not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError("The API key has characters that no header may have.", remedy="Check --api-key.")
    headers = [("Content-Type", "application/json"), ("Accept", "text/event-stream, application/json")]
    return [*headers, ("Authorization", f"Bearer {api_key}")] if api_key else headers


class _AnswerError(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


class _BodyReader:
    """A whole body."""

    def __init__(self) -> None:
        self.status = 0
        self.content = b""

    def head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        self.status = status
        return False

    def piece(self, data: bytes, now: float) -> bool:
        self.content += data
        return len(self.content) > _MAX_EVENT_BYTES


class _AnswerReader:
    """An answer's events."""

    def __init__(self, answer: Answer, leave_after: int | None) -> None:
        self._answer = answer
        self._leave_after = leave_after
        self._lines = _Lines()
        self._is_stream = False
        self._is_whole = False
        self._has_left = False
        self._content = b""  # of an answer that is no stream

    def head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        fields = dict(headers)
        self._answer.status, self._answer.retry_after = status, fields.get(b"retry-after", b"").decode("latin-1")
        kind = fields.get(b"content-type", b"")
        # A server that does not say what it sends is believed to send what was asked for.
        self._is_stream = status == 200 and (not kind or kind.lower().startswith(b"text/event-stream"))
        self._has_left = self._is_stream and self._leave_after == 0
        return self._has_left

    def piece(self, data: bytes, now: float) -> bool:
        if not self._is_stream:
            self._content += data
            return len(self._content) > _MAX_ERROR_BYTES
        for line in self._lines.feed(data):
            if line.startswith(b"data:") and (content := line[5:].strip()):
                self._take(content, now)
                if self._leave_after is not None and len(self._answer.arrivals) >= self._leave_after:
                    self._has_left = True
                    return True
        return False

    def finish(self) -> None:
        """
        Raises:
            _AnswerError: the answer is not whole.
        """
        answer = self._answer
        if answer.status != 200:
            raise _AnswerError(f"HTTP {answer.status}", error_message(self._content))
        if not self._is_stream:
            raise _AnswerError("no stream", f"The answer is no event stream: {describe(self._content[:200])}")
        if self._has_left:
            return
        if not self._is_whole and not answer.finish_reason:
            raise _AnswerError("cut", "The stream ended before [DONE].")
        if not answer.arrivals:
            raise _AnswerError("no text", "The answer has no text.")

    def _take(self, content: bytes, now: float) -> None:
        if content == b"[DONE]":
            self._is_whole = True
            return
        try:
            event = orjson.loads(content)
            if error := event.get("error"):
                raise _AnswerError("error in the stream", error_message(orjson.dumps({"error": error})))
            if choices := event.get("choices"):
                self._answer.ended = now
                if any(_has_text(choice) for choice in choices):
                    self._answer.arrivals.append(now)
                for choice in choices:
                    self._answer.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    if reason := choice.get("finish_reason"):
                        self._answer.finish_reason = str(reason)
            if usage := event.get("usage"):
                self._count(usage)
        except (orjson.JSONDecodeError, AttributeError, TypeError):
            raise _AnswerError("protocol", f"An event is no chunk of an answer: {describe(content[:200])}") from None

    def _count(self, usage: Mapping[str, Any]) -> None:
        answer = self._answer
        answer.num_prompt_tokens = _number(usage.get("prompt_tokens"))
        answer.num_new_tokens = _number(usage.get("completion_tokens"))
        answer.num_cached_tokens = _number((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))


def _has_text(choice: Mapping[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in _DELTA_TEXTS)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


class _Lines:
    """Bytes, cut anyhow → whole lines. Only the data of events matter here: each is one line in OpenAI's streams."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise _AnswerError("protocol", f"A line has more than {_MAX_EVENT_BYTES} bytes.")
        return iter(lines)
