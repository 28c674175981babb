"""What a client makes of a server's bytes, however they are cut, and of servers that do not do as they should."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from amalgam.errors import ConfigError, RequestError, UnavailableError
from amalgam.tools.load.client import Answer, Client, Endpoint, Question, model_names
from amalgam.tools.load.http import Address
from tests.errors import raises
from tests.tools.load.scripted import STREAM_HEAD, chunked, events, head

QUESTION = Question("one two", 3)


def exchange(
    parts: Sequence[bytes], *, endpoint: Endpoint = "completions", ends: bool = True, asks: int = 1, **options: Any
) -> tuple[list[Answer], int]:
    """The answers of a client that gets these bytes for each request, and how many connections it made.

    Args:
        ends: the server ends the connection after an answer.
    """
    num_connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        try:
            while True:
                header = await reader.readuntil(b"\r\n\r\n")
                length = int(header.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
                if ends:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def ask() -> list[Answer]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = Client(Address("http", "127.0.0.1", port), endpoint, "model", timeout_seconds=60)
            answers = [await client.ask(QUESTION, **options) for _ in range(asks)]
            client.close()
            return answers

    return asyncio.run(ask()), num_connections


def one(parts: Sequence[bytes], **options: Any) -> Answer:
    return exchange(parts, **options)[0][0]


WHOLE = STREAM_HEAD + chunked(events(3, 5)) + b"0\r\n\r\n"


def cut(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


@pytest.mark.parametrize("size", [7, 64, 10000])
def test_how_bytes_are_cut_does_not_matter(size: int) -> None:
    answer = one(cut(WHOLE, size))
    assert (answer.error_kind, answer.status, answer.finish_reason) == ("", 200, "length")
    assert (answer.num_prompt_tokens, answer.num_new_tokens, len(answer.arrivals), answer.text) == (5, 3, 3, "aaa")
    assert answer.sent <= answer.arrivals[0] <= answer.arrivals[-1] <= answer.ended
    assert len(answer.gaps) == 2 and answer.seconds_per_token is not None


@pytest.mark.parametrize("field", ["content", "reasoning_content", "reasoning"])
def test_a_chat_may_begin_with_its_reasoning(field: str) -> None:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {field: "a"}, {"content": "b"}, {}]
    bodies = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    parts = [b"data: %b\r\n\r\n" % json.dumps(body).encode() for body in bodies] + [b": comment\n\ndata: [DONE]\n\n"]
    answer = one([STREAM_HEAD + chunked(parts) + b"0\r\n\r\n"], endpoint="chat")
    assert not answer.error_kind and len(answer.arrivals) == 2 and answer.num_new_tokens is None
    assert answer.text == ("ab" if field == "content" else "b")
    assert answer.num_tokens == 2, "one for each event with text"


def test_connections_are_used_again_and_replaced_when_the_server_ends_them() -> None:
    for ends, expected in ((False, 1), (True, 3)):
        answers, num_connections = exchange([WHOLE], ends=ends, asks=3)
        assert [answer.error_kind for answer in answers] == ["", "", ""]
        assert num_connections == expected


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    answer = one([head("200 OK", "Content-Type: text/event-stream"), *events(3, 5)])
    assert (answer.error_kind, answer.num_tokens) == ("", 3)


JSON_HEAD = ("Content-Type: application/json", "Connection: close")
FAULTS = {
    "refused": ([head("429 Too Many Requests", *JSON_HEAD), b'{"error": {"message": "full"}}'], "HTTP 429", "full"),
    "a proxy's page": ([head("502 Bad Gateway", "Connection: close"), b"<html>bad"], "HTTP 502", "<html>bad"),
    "an error in the stream": (
        [STREAM_HEAD + chunked([events(1, 1)[0], b'data: {"error": {"message": "broken"}}\n\n'])],
        "error in the stream",
        "broken",
    ),
    "cut in a chunk": ([WHOLE[:-200]], "cut", ""),
    "cut between events": ([STREAM_HEAD + chunked(events(3, 5)[:2]) + b"0\r\n\r\n"], "cut", "[DONE]"),
    "nothing at all": ([b""], "cut", ""),
    "no text": ([STREAM_HEAD + chunked(events(0, 5)) + b"0\r\n\r\n"], "no text", ""),
    "no stream": ([head("200 OK", *JSON_HEAD), b'{"choices": []}'], "no stream", ""),
    "no HTTP": ([b"SSH-2.0-OpenSSH_9.2\r\n\r\n"], "protocol", ""),
    "no JSON": ([STREAM_HEAD + chunked([b"data: {\n\n"])], "protocol", "{"),
    "no object": ([STREAM_HEAD + chunked([b"data: [1]\n\n"])], "protocol", "[1]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_answer_with_its_kind(fault: str) -> None:
    parts, kind, said = FAULTS[fault]
    answer = one(parts)
    assert (answer.error_kind, said in answer.error) == (kind, True)
    assert answer.ended >= answer.sent > 0


def test_a_refusal_says_when_to_come_again() -> None:
    refused = [head("503 Service Unavailable", *JSON_HEAD, "Retry-After: 7"), b'{"error": {}}']
    assert one(refused).retry_after == "7"
    assert one([WHOLE]).retry_after == ""


def test_a_client_leaves() -> None:
    answer = one(cut(WHOLE, 200), leave_after=1)
    assert not answer.error_kind and len(answer.arrivals) == 1


def test_a_server_that_is_silent_is_not_waited_for() -> None:
    async def ask() -> Answer:
        async with await asyncio.start_server(lambda *_: asyncio.sleep(0), "127.0.0.1", 0) as server:
            address = Address("http", "127.0.0.1", server.sockets[0].getsockname()[1])
            return await Client(address, "completions", "model", timeout_seconds=0.01).ask(QUESTION)

    assert asyncio.run(ask()).error_kind == "timeout"


def test_nobody_listens() -> None:
    nowhere = Address("http", "127.0.0.1", 9)
    answer = asyncio.run(Client(nowhere, "completions", "model").ask(QUESTION))
    assert answer.error_kind == "connect"
    with raises(UnavailableError, "127.0.0.1:9"):
        asyncio.run(model_names(nowhere))


def test_why_there_is_no_connection_is_told_in_words() -> None:
    async def plain(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
            await model_names(Address("https", "127.0.0.1", server.sockets[0].getsockname()[1]))

    with raises(UnavailableError, "https://127.0.0.1") as caught:
        asyncio.run(ask())
    assert "Operation not permitted" not in str(caught.value), "what the number of TLS's error is for a file"
    for key in ("schlüssel", "two\nlines"):
        with raises(ConfigError, "--api-key") as refused:
            asyncio.run(model_names(Address("http", "127.0.0.1", 9), key))
        assert key not in str(refused.value)


def models(status: str, body: bytes) -> list[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head(status, f"Content-Length: {len(body)}") + body)
        writer.close()

    async def ask() -> list[str]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            return await model_names(Address("http", "127.0.0.1", server.sockets[0].getsockname()[1]))

    return asyncio.run(ask())


def test_models_are_listed_or_the_reason_is_told() -> None:
    assert models("200 OK", b'{"data": [{"id": "a"}, {"id": "b"}]}') == ["a", "b"]
    with raises(RequestError, "401", "who"):
        models("401 Unauthorized", b'{"error": "who"}')
    with raises(UnavailableError):
        models("503 Service Unavailable", b"")
    for body in (b"<html>", b"[]", b'{"data": [1]}'):
        with raises(UnavailableError):
            models("200 OK", body)


def test_addresses() -> None:
    for url, expected in {
        "http://127.0.0.1:8080": "http://127.0.0.1:8080",
        "http://127.0.0.1:8080/v1/": "http://127.0.0.1:8080",
        "https://host/path/v1": "https://host/path",
        "http://[::1]:81/": "http://[::1]:81",
        "http://bücher.example/ü a%2fb": "http://xn--bcher-kva.example/%C3%BC%20a%2fb",
    }.items():
        assert str(Address.parse(url)) == expected
    for url in (
        "127.0.0.1:8080",
        "ftp://host",
        "ftp://host:21",
        "http://a..b",
        "http://",
        "http://h:99999",
        "http://user:word@h",
        "http://h/?a=1",
    ):
        with raises(ConfigError):
            Address.parse(url)
