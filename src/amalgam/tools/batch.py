"""A file of requests → a file of answers, line by line, through whatever answers a request.

In: JSONL. A line is a prompt (a string, or an object with `prompt` and the fields of `POST /generate`), or a request as
OpenAI's Batch API has it (`custom_id`, `method`, `url`, `body`). Out: JSONL, a line for each line in the same order:
`prompt` and `generated_text`, or a line of OpenAI's output files. A line that cannot be read gets its error in its
place. Must never know: the engine, HTTP.

A run that is killed goes on where it was (`journal.py`), and what it gives then is what it would have given: ids and
seeds follow from the line.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from amalgam.base.strict_json import parse_json
from amalgam.composition.progress import Progress
from amalgam.errors import AmalgamError, RequestError, UnavailableError, describe
from amalgam.tools.journal import Journal

GENERATE = "/generate"
ID_PREFIXES = {
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/v1/responses": "resp_",
    "/v1/embeddings": "embd-",
}
_LIMIT_FIELDS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
_PROMPT_TOKENS = ("prompt_tokens", "input_tokens")  # as the interfaces call them
_NEW_TOKENS = ("completion_tokens", "output_tokens", "generated_tokens")
_UNAVAILABLE, _RETRY_SECONDS = 503, 0.05
_MAX_CUSTOM_ID = 512
_BOM = b"\xef\xbb\xbf"
_DRAWN_CALL_ID = re.compile("(call_)[0-9a-f]{24}|()[0-9A-Za-z]{9}")  # others are the model's
_DRAWN_ITEM_ID = re.compile("(fc_|msg_|rs_)[0-9a-f]+")

Ask = Callable[[str, Mapping[str, Any], str], Awaitable[tuple[int, Any]]]
"""A path, a body and a request id → the status and the JSON that it is answered with."""


class LineError(AmalgamError):
    """One line cannot be answered; the others can."""

    def __init__(self, what: str, code: str = RequestError.code, *, custom_id: str | None = None) -> None:
        super().__init__(what)
        self.code = code
        self.custom_id = custom_id


@dataclass(frozen=True)
class LineRequest:
    """What one line asks for.

    Attributes:
        prompt: of a line that is no OpenAI request.
    """

    path: str
    body: Mapping[str, Any]
    custom_id: str | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class InputFile:
    """A file of lines, looked at once.

    Attributes:
        state: its size and when it was changed.
    """

    path: Path
    num_lines: int
    sha256: str
    max_line_bytes: int
    state: tuple[int, int]

    @classmethod
    def read(cls, path: Path, max_line_bytes: int) -> InputFile:
        """
        Raises:
            RequestError: it cannot be read, is no file that can be read twice, or has no lines.
        """
        digest, num_lines, last = hashlib.sha256(), 0, b"\n"
        try:
            state = path.stat()
            if not stat.S_ISREG(state.st_mode):
                raise RequestError(
                    f"{str(path)!r} is no regular file: a run that goes on reads it again.", remedy="Give a file."
                )
            with path.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
                    num_lines += block.count(b"\n")
                    last = block[-1:]
        except OSError as error:
            raise RequestError(f"{str(path)!r} cannot be read ({error.strerror}).", remedy="Give a file.") from None
        num_lines += last != b"\n"
        if not num_lines:
            raise RequestError(f"{str(path)!r} is empty.", remedy="Give a line of JSON for each prompt.")
        return cls(path, num_lines, digest.hexdigest(), max_line_bytes, (state.st_size, state.st_mtime_ns))

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Index and bytes of each line; None: it is too long.

        Raises:
            RequestError: it has been changed.
        """
        with self.path.open("rb") as stream:
            for index in range(self.num_lines):
                state = os.fstat(stream.fileno())
                line = stream.readline(self.max_line_bytes + 1)
                if (state.st_size, state.st_mtime_ns) != self.state:
                    raise RequestError(
                        f"{str(self.path)!r} has been changed since the run began.",
                        remedy="Put it back and give the same command, or begin anew with another output.",
                    )
                if len(line) <= self.max_line_bytes or line.endswith(b"\n"):
                    yield index, line.removeprefix(_BOM) if index == 0 else line
                    continue
                while (more := stream.readline(2**20)) and not more.endswith(b"\n"):
                    pass
                yield index, None


@dataclass(frozen=True)
class Defaults:
    """What lines get where they say nothing.

    Attributes:
        fields: of all requests, by the names that all interfaces share.
        max_new_tokens: of all requests; None: what their interface says.
        max_prompt_new_tokens: of prompts, where `max_new_tokens` is None; None too: as `POST /generate` has it.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    max_prompt_new_tokens: int | None = None

    def filled(self, request: LineRequest, seed: int) -> dict[str, Any]:
        """A request's body, and in it what it left out."""
        if request.path == GENERATE:
            limit = self.max_new_tokens or self.max_prompt_new_tokens
            more: dict[str, Any] = {} if limit is None else {"max_new_tokens": limit}
        elif names := _LIMIT_FIELDS.get(request.path):
            is_limited = self.max_new_tokens is None or any(request.body.get(name) is not None for name in names)
            more = {} if is_limited else {names[0]: self.max_new_tokens}
        else:
            return dict(request.body)
        given = {name: value for name, value in request.body.items() if value is not None}
        return {**self.fields, **more, "seed": seed, **given}


@dataclass
class Totals:
    """What a run has done, what earlier ones have left of it included."""

    num_lines: int
    num_resumed: int = 0
    num_answered: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    seconds: float = 0.0  # of this run

    def count(self, answer: Mapping[str, Any]) -> None:
        """One line of the output."""
        response = answer.get("response")
        if answer.get("error") is not None or (response is not None and response["status_code"] >= 400):
            self.num_errors += 1
            return
        self.num_answered += 1
        usage = answer if response is None else response["body"].get("usage") or {}
        self.num_prompt_tokens += next((usage[name] for name in _PROMPT_TOKENS if name in usage), 0)
        self.num_new_tokens += next((usage[name] for name in _NEW_TOKENS if name in usage), 0)


async def answer_file(
    source: InputFile,
    journal: Journal,
    totals: Totals,
    ask: Ask,
    defaults: Defaults,
    max_in_flight: int,
    progress: Progress | None = None,
) -> None:
    """Answer what the journal has not yet. Leaves it as it is when cancelled: the next run goes on.

    Args:
        journal: its header has a `seed` and the time of the beginning, `created`.
        max_in_flight: requests at a time.

    Raises:
        UnavailableError: the model answers no more.
        CheckpointError: there is no room for an answer.
    """
    started = time.monotonic()
    done = journal.done
    waiting = _requests(source, done)
    answering = _Answering(journal.header, ask, defaults)

    def report() -> None:
        totals.seconds = time.monotonic() - started
        if progress is not None:
            progress("Answering", totals.num_answered + totals.num_errors, totals.num_lines)

    async def work() -> None:
        for index, request in waiting:  # which all of us take from
            answer = await answering.answer(index, request)
            journal.add(index, answer)
            totals.count(answer)
            report()

    report()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(max_in_flight, source.num_lines)):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _requests(source: InputFile, done: set[int]) -> Iterator[tuple[int, LineRequest | LineError]]:
    """What is asked by each line that is not done yet, or what is wrong with it."""
    first_lines: dict[str, int] = {}
    for index, line in source.lines():
        request: LineRequest | LineError
        try:
            request = read_line(line, index, source.max_line_bytes)
            name = request.custom_id
            if name is not None and first_lines.setdefault(name, index) != index:
                raise LineError(
                    f"Line {index + 1} has the custom_id {describe(name)} of line {first_lines[name] + 1}.",
                    "duplicate_custom_id",
                    custom_id=name,
                )
        except LineError as error:
            request = error
        if index not in done:
            yield index, request


def read_line(line: bytes | None, index: int, max_bytes: int) -> LineRequest:
    """
    Raises:
        LineError: it asks for nothing that can be answered.
    """
    where = f"Line {index + 1}"
    if line is None:
        raise LineError(f"{where} has more than {max_bytes} bytes.", "line_too_long")
    if not line.strip():
        raise LineError(f"{where} is empty.", "empty_line")
    try:
        value = parse_json(line)
    except ValueError as error:
        raise LineError(f"{where} is not valid JSON: {error}.", "invalid_json") from None
    if isinstance(value, str):
        return LineRequest(GENERATE, {"prompt": value}, prompt=value)
    if not isinstance(value, dict):
        raise LineError(f"{where} is {describe(value)}. Expected a prompt, or an object.")
    custom_id = value.get("custom_id")
    if custom_id is not None and (not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_CUSTOM_ID):
        raise LineError(f"{where} has the custom_id {describe(custom_id)}. Expected a text of 1 to 512 characters.")
    try:
        return _openai_request(value, where) if "url" in value or "body" in value else _prompt(value, where)
    except LineError as error:
        error.custom_id = custom_id
        raise


def _prompt(value: Mapping[str, Any], where: str) -> LineRequest:
    prompt = value.get("prompt")
    if not isinstance(prompt, str):
        raise LineError(f"{where} has neither a prompt, which is a text, nor the url and body of a request.")
    if value.get("stream"):
        raise LineError(f"{where} asks for a stream. A file has whole answers.")
    body = {name: item for name, item in value.items() if name != "custom_id"}
    return LineRequest(GENERATE, body, value.get("custom_id"), prompt)


def _openai_request(value: Mapping[str, Any], where: str) -> LineRequest:
    unknown = value.keys() - {"custom_id", "method", "url", "body"}
    if unknown:
        raise LineError(f"{where} has {describe(min(unknown))}. A request has custom_id, method, url and body.")
    if value.get("custom_id") is None:
        raise LineError(f"{where} has no custom_id.")
    if value.get("method", "POST") != "POST":
        raise LineError(f"{where} has the method {describe(value['method'])}. Allowed: POST.")
    url, body = value.get("url"), value.get("body")
    if url not in ID_PREFIXES:
        raise LineError(f"{where} has the url {describe(url)}. Allowed: {', '.join(ID_PREFIXES)}.", "invalid_url")
    if not isinstance(body, dict):
        raise LineError(f"{where} has the body {describe(body)}. Expected an object.")
    if body.get("stream"):
        raise LineError(f"{where} asks for a stream. A file has whole answers.")
    return LineRequest(url, body, value["custom_id"])


class _Answering:
    """Requests → lines of the output."""

    def __init__(self, header: Mapping[str, Any], ask: Ask, defaults: Defaults) -> None:
        self._seed: int = header["seed"]
        self._created: int = header["created"]
        lasting = {name: value for name, value in header.items() if name != "created"}
        self._run = hashlib.sha256(orjson.dumps(lasting, option=orjson.OPT_SORT_KEYS)).hexdigest()
        self._ask = ask
        self._defaults = defaults

    async def answer(self, index: int, request: LineRequest | LineError) -> dict[str, Any]:
        line_id = hashlib.sha256(f"{self._run}:{index}".encode()).hexdigest()[:32]
        if isinstance(request, LineError):
            error = {"code": request.code, "message": str(request)}
            return {"id": f"batch_req_{line_id}", "custom_id": request.custom_id, "response": None, "error": error}
        body = self._defaults.filled(request, line_seed(self._seed, index))
        while True:
            status, content = await self._ask(request.path, body, line_id)
            if status != _UNAVAILABLE:
                break
            await asyncio.sleep(_RETRY_SECONDS)  # the queue is full of samples of other lines
        if request.path == GENERATE:
            return _prompt_answer(request, status, content)
        response = {"status_code": status, "request_id": line_id, "body": self._settled(content, request.path, line_id)}
        return {"id": f"batch_req_{line_id}", "custom_id": request.custom_id, "response": response, "error": None}

    def _settled(self, content: dict[str, Any], path: str, line_id: str) -> dict[str, Any]:
        """A body without what depends on when it was computed, and beside what."""
        if "id" in content:
            content["id"] = f"{ID_PREFIXES[path]}{line_id}"
        for name in ("created", "created_at", "completed_at"):
            if content.get(name) is not None:
                content[name] = self._created
        if isinstance(usage := content.get("usage"), dict):
            for details in ("prompt_tokens_details", "input_tokens_details"):
                usage.pop(details, None)  # how many of them the cache had
        for choice in content.get("choices") or ():
            for place, call in enumerate((choice.get("message") or {}).get("tool_calls") or ()):
                _settle(call, "id", _DRAWN_CALL_ID, f"{line_id}:{choice['index']}:{place}")
        for place, item in enumerate(content.get("output") or ()):
            _settle(item, "id", _DRAWN_ITEM_ID, f"{line_id}:{place}")
            _settle(item, "call_id", _DRAWN_CALL_ID, f"{line_id}:call:{place}")
        return content


def _settle(content: dict[str, Any], name: str, drawn: re.Pattern[str], place: str) -> None:
    """In place of an id that was drawn, one that follows from where it stands."""
    if found := drawn.fullmatch(str(content.get(name))):
        prefix = found[1] or ""
        digest = hashlib.sha256(place.encode()).hexdigest()
        content[name] = prefix + digest[: len(found[0]) - len(prefix)]


def line_seed(seed: int, index: int) -> int:
    """The seed of a line that has none."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]) >> 1


def _prompt_answer(request: LineRequest, status: int, content: Mapping[str, Any]) -> dict[str, Any]:
    named = {} if request.custom_id is None else {"custom_id": request.custom_id}
    if status >= 400:
        error = content["error"]
        return {**named, "prompt": request.prompt, "error": {"code": error["type"], "message": error["message"]}}
    kept = ("generated_text", "finish_reason", "prompt_tokens", "generated_tokens", "routed_experts")
    figures = {name: content[name] for name in kept if name in content}
    return {**named, "prompt": request.prompt, **figures, "error": None}


def ask_until_failure(ask: Ask, failure: Callable[[], Exception | None]) -> Ask:
    """The same, which raises what has ended the model instead of answering that it is not there."""

    async def asking(path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, Any]:
        status, content = await ask(path, body, request_id)
        if status >= 500 and (error := failure()) is not None:
            raise UnavailableError(
                f"The model answers no more: {error}", remedy="The same command goes on where this one was."
            )
        return status, content

    return asking
