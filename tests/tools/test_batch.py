"""Files of requests: what each line asks for, and what a run that was killed leaves to the next one."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from amalgam.base.locks import FileLock
from amalgam.errors import CheckpointError, ConflictError, RequestError, UnavailableError
from amalgam.tools.batch import Defaults, InputFile, LineError, Totals, answer_file, ask_until_failure, read_line
from amalgam.tools.journal import Journal, partial_of
from tests.errors import raises

CHAT = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}


class Killed(BaseException):
    pass


class Model:
    """Answers what it was asked, the later lines of a handful first; is killed after some answers."""

    def __init__(self, num_answers: int = 10**9) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self._left = num_answers

    async def ask(self, path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, Any]:
        self.asked.append((path, body))
        for _ in range(len(self.asked) % 3):
            await asyncio.sleep(0)
        self._left -= 1
        if self._left < 0:
            raise Killed
        figures = {"prompt_tokens": 1, "generated_tokens": 2, "timings": {"total_seconds": len(self.asked)}}
        if path == "/generate":
            return 200, {"generated_text": f"{body['prompt']} {body['seed']}", "finish_reason": "stop", **figures}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}}
        return 200, {"id": "random", "created": len(self.asked), "usage": usage, "seen": dict(body)}


@contextmanager
def killed_by_now() -> Iterator[None]:
    with pytest.raises(BaseExceptionGroup) as caught:
        yield
    assert all(isinstance(error, Killed) for error in caught.value.exceptions)


def run(model: Model, source: Path, output: Path, defaults: Defaults | None = None, **identity: Any) -> Totals:
    lines = InputFile.read(source, 10_000)
    totals = Totals(lines.num_lines)
    with Journal.open(output, {"input": lines.sha256, **identity}, {"seed": 3, "created": 7}, totals.count) as journal:
        totals.num_resumed = len(journal.done)
        asyncio.run(answer_file(lines, journal, totals, model.ask, defaults or Defaults(), 4))
        journal.finish(lines.num_lines)
    return totals


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_run_goes_on_and_gives_what_it_would_have_given(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *[f"prompt {i}" if i % 3 else {**CHAT, "custom_id": f"{i}"} for i in range(40)])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(Model(), source, whole).num_answered == 40
    num_asked = 0
    for num_answers in (7, 12):
        model = Model(num_answers)
        with killed_by_now():
            run(model, source, killed)
        num_asked += num_answers
        assert not killed.exists()
        partial = partial_of(killed)
        partial.write_bytes(partial.read_bytes()[:-5])  # the last line was being written
        num_asked -= 1
    last = Model()
    totals = run(last, source, killed)
    assert killed.read_bytes() == whole.read_bytes()
    assert len(last.asked) == 40 - num_asked == 40 - totals.num_resumed and totals.num_answered == 40
    assert not partial_of(killed).exists() and len(list(tmp_path.iterdir())) == 3


def test_lines_that_cannot_be_read_have_their_errors_in_their_places(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf"first"', b"", b"{", b"\xff", b'"' + b"x" * 20_000 + b'"', b"7", b'{"prompt": 7}', b"  \r",
        CHAT, CHAT, {**CHAT, "custom_id": "u", "url": "/v1/files"}, {**CHAT, "custom_id": "m", "method": "GET"},
        {**CHAT, "custom_id": "s", "body": {"stream": True}}, {"url": "/v1/completions", "body": {}},
        {**CHAT, "custom_id": 5}, {**CHAT, "custom_id": "e", "extra": 1}, {"custom_id": "p", "prompt": "last"},
    ]  # fmt: skip
    source = write(tmp_path / "in", *lines)
    source.write_bytes(source.read_bytes().removesuffix(b"\n"))
    totals = run(Model(), source, tmp_path / "out")
    found = answers(tmp_path / "out")
    assert [line["error"] and line["error"]["code"] for line in found] == [
        None, "empty_line", "invalid_json", "invalid_json", "line_too_long", "invalid_request", "invalid_request",
        "empty_line", None, "duplicate_custom_id", "invalid_url", "invalid_request", "invalid_request",
        "invalid_request", "invalid_request", "invalid_request", None,
    ]  # fmt: skip
    assert found[0]["prompt"] == "first" and found[16]["generated_text"].startswith("last ")
    assert [line.get("custom_id") for line in found[8:13]] == ["c", "c", "u", "m", "s"]
    assert all(f"Line {index + 1} " in found[index]["error"]["message"] for index in (1, 2, 3, 4, 5, 9, 15))
    assert (totals.num_answered, totals.num_errors) == (3, 14)


def test_an_openai_line_is_answered_in_the_form_of_its_output_files(tmp_path: Path) -> None:
    run(Model(), write(tmp_path / "in", CHAT), tmp_path / "out")
    [line] = answers(tmp_path / "out")
    assert line.keys() == {"id", "custom_id", "response", "error"} and line["error"] is None
    assert line["response"].keys() == {"status_code", "request_id", "body"} and line["id"].startswith("batch_req_")
    body = line["response"]["body"]
    assert body["id"].startswith("chatcmpl-") and body["created"] == 7
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 2}


def test_a_line_for_the_responses_interface_is_answered_alike_each_time(tmp_path: Path) -> None:
    class Responses(Model):
        async def ask(self, path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, Any]:
            self.asked.append((path, body))
            items = [
                {"type": "message", "id": f"msg_{secrets.token_hex(24)}"},
                *(
                    {"type": "function_call", "id": f"fc_{secrets.token_hex(24)}", "call_id": call_id}
                    for call_id in (f"call_{secrets.token_hex(12)}", "functions.search:0")
                ),
            ]
            usage = {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 4}
            times = {"created_at": secrets.randbits(30), "completed_at": secrets.randbits(30)}
            return 200, {"id": f"resp_{secrets.token_hex(8)}", **times, "output": items, "usage": usage}

    line = {"custom_id": "r", "url": "/v1/responses", "body": {"input": "x"}}
    source = write(tmp_path / "in", line)
    found = []
    for name in ("one", "other"):
        model = Responses()
        totals = run(model, source, tmp_path / name, Defaults(max_new_tokens=9))
        assert (totals.num_prompt_tokens, totals.num_new_tokens) == (3, 4)
        assert model.asked[0][1]["max_output_tokens"] == 9
        found += answers(tmp_path / name)
    assert found[0] == found[1]
    body = found[0]["response"]["body"]
    assert body["id"].startswith("resp_") and body["created_at"] == body["completed_at"] == 7
    assert [item.get("call_id", "")[:5] for item in body["output"]] == ["", "call_", "funct"]
    assert len({item["id"] for item in body["output"]}) == 3 and "input_tokens_details" not in body["usage"]


def test_lines_say_more_than_flags(tmp_path: Path) -> None:
    completion = {"custom_id": "t", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}}
    embedding = {"custom_id": "v", "url": "/v1/embeddings", "body": {"input": "x"}}
    source = write(
        tmp_path / "in", "a", {"prompt": "b", "seed": 5, "temperature": 2.0, "max_new_tokens": 1}, CHAT, completion,
        embedding,
    )  # fmt: skip
    model = Model()
    run(model, source, tmp_path / "out", Defaults({"temperature": 0.5}, 9, 128))
    bodies = {body.get("prompt", path): dict(body) for path, body in model.asked}
    assert bodies["a"] | {"seed": 0} == {"prompt": "a", "temperature": 0.5, "max_new_tokens": 9, "seed": 0}
    assert bodies["b"] == {"prompt": "b", "seed": 5, "temperature": 2.0, "max_new_tokens": 1}
    assert bodies["/v1/chat/completions"]["max_completion_tokens"] == 9
    assert bodies["x"]["max_tokens"] == 2 and "max_completion_tokens" not in bodies["x"]
    assert bodies["/v1/embeddings"] == {"input": "x"}
    assert bodies["a"]["seed"] != bodies["x"]["seed"]
    run(model, source, tmp_path / "other", Defaults(max_prompt_new_tokens=128))
    assert next(dict(body) for _, body in model.asked[5:] if body.get("prompt") == "a")["max_new_tokens"] == 128


def test_a_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", "a", "b"), tmp_path / "out"
    with killed_by_now():
        run(Model(1), source, output, sampling={"seed": 1})
    with raises(ConflictError, "out.partial'", "sampling"):
        run(Model(), source, output, sampling={"seed": 2})
    with Journal.open(output, {}, {}, lambda _: None) as journal:
        journal.bind("weights", "a")
        with raises(ConflictError, "out'"):
            Journal.open(output, {}, {}, lambda _: None)
    with Journal.open(output, {}, {}, lambda _: None) as journal, raises(ConflictError, "weights"):
        journal.bind("weights", "b")
    run(Model(), source, output, sampling={"seed": 1})
    with raises(ConflictError, "out'"):
        run(Model(), source, output, sampling={"seed": 1})
    other = tmp_path / "other"
    partial_of(other).write_text("what somebody\nhas written\n")
    with raises(RequestError, "other.partial'"):
        run(Model(), source, other)
    assert partial_of(other).read_text() == "what somebody\nhas written\n"
    for content in ("one line without an end", '{"format":1}\n[[1],{}]\n', '{"format":1}\n[1,2]\n', '{"format":2}\n'):
        partial_of(other).write_text(content)
        with raises(RequestError, "other.partial'"):
            run(Model(), source, other)
        assert partial_of(other).read_text() == content
    for content in ("", "{", '{"format":1,"se'):  # what a kill at the very beginning leaves
        partial_of(other).write_text(content)
        assert run(Model(), source, other).num_answered == 2
        other.unlink()
    with raises(RequestError, "empty"):
        InputFile.read(write(tmp_path / "empty"), 100)
    with raises(RequestError, "nowhere'"):
        InputFile.read(tmp_path / "nowhere", 100)


def test_who_has_waited_for_an_output_does_not_write_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write(tmp_path / "in", "a"), tmp_path / "out"
    acquire = FileLock.try_acquire

    def finished_meanwhile(lock: FileLock) -> bool:
        output.write_text("another run's\n")
        return acquire(lock)

    monkeypatch.setattr(FileLock, "try_acquire", finished_meanwhile)
    with raises(ConflictError, "out'"):
        run(Model(), source, output)
    assert {file.name for file in tmp_path.iterdir()} == {"in", "out"}


def test_an_input_that_cannot_be_read_twice_or_changes_is_no_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with raises(RequestError, tmp_path / name):
            InputFile.read(tmp_path / name, 100)
    source, output = write(tmp_path / "in", *"abcdef"), tmp_path / "out"
    model = Model()
    ask = model.ask

    async def shortening(*asked: Any) -> tuple[int, Any]:
        write(source, "a")
        return await ask(*asked)

    model.ask = shortening  # type: ignore[method-assign]
    with raises(RequestError, "in'"):
        run(model, source, output)
    assert not output.exists() and partial_of(output).exists()


def test_ids_of_tool_calls_follow_from_the_line(tmp_path: Path) -> None:
    class Calling(Model):
        async def ask(self, path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, Any]:
            drawn = [f"call_{secrets.token_hex(12)}", secrets.token_hex(5)[:9], "functions.f:0"]
            choices = [{"index": i, "message": {"tool_calls": [{"id": one} for one in drawn]}} for i in range(2)]
            return 200, {"choices": choices}

    found = []
    for name in ("one", "two"):
        run(Calling(), write(tmp_path / "in", CHAT, {**CHAT, "custom_id": "d"}), tmp_path / name)
        found.append((tmp_path / name).read_bytes())
    assert found[0] == found[1]
    ids = re.findall(r'"id":"((?:call_)?[0-9a-f]+|functions.f:0)"', found[0].decode())
    assert len(ids) == 12 and len(set(ids)) == 9 and ids.count("functions.f:0") == 4
    assert {len(one) for one in ids} == {29, 9, 13}


def test_a_model_that_is_gone_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    failure: Exception | None = None
    refusals = 2

    async def ask(path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, Any]:
        nonlocal failure, refusals
        if body["prompt"] == "b" and failure is None:
            failure = UnavailableError("It has failed.")
        if failure is not None:
            return 503, {"error": {"type": "unavailable", "message": ""}}
        if refusals:  # a full queue is waited for
            refusals -= 1
            return 503, {"error": {"type": "overloaded", "message": ""}}
        return 200, {"generated_text": "x", "finish_reason": "stop", "prompt_tokens": 1, "generated_tokens": 1}

    source, output = write(tmp_path / "in", "a", "b", "c"), tmp_path / "out"
    model = Model()
    model.ask = ask_until_failure(ask, lambda: failure)  # type: ignore[method-assign]
    lines, totals = InputFile.read(source, 100), Totals(3)
    with Journal.open(output, {}, {"seed": 1, "created": 1}, totals.count) as journal:
        with raises(UnavailableError, "failed"):
            asyncio.run(answer_file(lines, journal, totals, model.ask, Defaults(), 1))
        assert journal.done == {0}


def test_numbers_that_no_integer_type_holds_are_the_endpoint_s_to_refuse() -> None:
    request = read_line(b'{"prompt": "x", "seed": %d}' % 10**40, 0, 1000)
    assert request.body["seed"] == 10**40
    with pytest.raises(LineError) as caught:
        read_line(b'{"prompt": "x", "seed": NaN}', 0, 1000)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("step", ["os.write", "os.ftruncate", "os.fsync"])
def test_a_full_disk_is_told_with_the_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When an answer is noted, when a run is begun, and when the output is written."""
    source = write(tmp_path / "in", "one")

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(step, fail)
    with raises(CheckpointError, tmp_path / "out"):
        run(Model(), source, tmp_path / "out")
