"""One connection for all requests to a replica: what arrives, in which order, and what ends with what."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from amalgam.cluster.channel import Address, Channel, Listener
from amalgam.cluster.interface import Forwarded, Head, Noted, Part, Take
from amalgam.errors import ReplicaLostError, UnavailableError
from tests.cluster.replicas import until
from tests.errors import raises

FRAME = struct.Struct("<IIB")
HEAD = Head(200, ((b"content-type", b"text/event-stream"), (b"x", bytes(range(32, 256)))))
NOTED = Noted(3, 1, 2, 0.5, 0.25, ("stop", "length"), 7, ("half \ud800",), "content_filter")
REQUEST = Forwarded("POST", "/generate", b"a=%ff", ((b"x-name", b"\xe9"),), bytes(range(256)) * 3, "r1", -2, False)


def run(
    answer: Callable[[Forwarded, Take], Awaitable[None]], use: Callable[[Channel, Listener], Awaitable[None]]
) -> None:
    """Use a channel to a listener, in an event loop that must not hang."""

    async def both() -> None:
        listener = Listener(answer)
        channel = await Channel.open(await listener.listen("127.0.0.1"))
        try:
            await use(channel, listener)
        finally:
            channel.close()
            await listener.close()
        assert listener.num_open == 0

    asyncio.run(asyncio.wait_for(both(), 120))


async def parts_of(channel: Channel, request: Forwarded = REQUEST) -> list[Part]:
    return [part async for group in channel.ask(request) for part in group]


def test_requests_and_answers_arrive_as_they_were() -> None:
    seen = []

    async def answer(request: Forwarded, take: Take) -> None:
        seen.append(request)
        for part in (HEAD, b"", b"data: \xff\n\n", NOTED):
            await take(part)

    async def use(channel: Channel, listener: Listener) -> None:
        assert await parts_of(channel) == [HEAD, b"", b"data: \xff\n\n", NOTED]

    run(answer, use)
    assert seen == [REQUEST]


def test_many_answers_at_a_time_keep_their_order() -> None:
    async def answer(request: Forwarded, take: Take) -> None:
        await take(HEAD)
        for number in range(50):
            await take(f"{request.request_id} {number};".encode() * (1 + 400 * (number % 7 == 0)))
            if number % 3 == 0:
                await asyncio.sleep(0)
        await take(NOTED)

    async def use(channel: Channel, listener: Listener) -> None:
        names = [f"r{index}" for index in range(40)]
        answers = await asyncio.gather(*(parts_of(channel, replace(REQUEST, request_id=name)) for name in names))
        for name, (head, *body, noted) in zip(names, answers, strict=True):
            assert (head, noted) == (HEAD, NOTED)
            assert b"".join(part for part in body if isinstance(part, bytes)) == b"".join(
                f"{name} {number};".encode() * (1 + 400 * (number % 7 == 0)) for number in range(50)
            )

    run(answer, use)


def test_an_answer_is_whole_for_who_is_slow() -> None:
    async def answer(request: Forwarded, take: Take) -> None:
        await take(HEAD)
        await asyncio.sleep(0.01)
        await take(b"the end")
        await take(NOTED)

    async def use(channel: Channel, listener: Listener) -> None:
        parts: list[Part] = []
        async for group in channel.ask(REQUEST):
            parts += group
            await until(lambda: listener.num_open == 0)
            await asyncio.sleep(0.05)  # all of it has come meanwhile
        assert parts == [HEAD, b"the end", NOTED]

    run(answer, use)


def test_what_is_wanted_no_more_is_cancelled_there_and_nothing_else() -> None:
    async def answer(request: Forwarded, take: Take) -> None:
        await take(HEAD)
        while request.request_id == "endless":
            await asyncio.sleep(0.001)
            await take(b"more")
        await take(NOTED)

    async def use(channel: Channel, listener: Listener) -> None:
        groups = channel.ask(replace(REQUEST, request_id="endless"))
        await anext(groups)
        assert listener.num_open == 1
        await groups.aclose()
        await until(lambda: listener.num_open == 0)
        assert await parts_of(channel) == [HEAD, NOTED]

    run(answer, use)


def test_all_that_is_under_way_ends_with_the_replica() -> None:
    async def answer(request: Forwarded, take: Take) -> None:
        await take(HEAD)
        await asyncio.Event().wait()

    async def use(channel: Channel, listener: Listener) -> None:
        asked = [asyncio.create_task(parts_of(channel)) for _ in range(3)]
        await until(lambda: listener.num_open == 3)
        await listener.close()
        for task in asked:
            with pytest.raises(ReplicaLostError):
                await task
        assert not channel.is_open
        with pytest.raises(ReplicaLostError):
            await parts_of(channel)

    run(answer, use)


def test_what_is_under_way_is_cancelled_with_the_gateway() -> None:
    async def answer(request: Forwarded, take: Take) -> None:
        await asyncio.Event().wait()

    async def use(channel: Channel, listener: Listener) -> None:
        asked = asyncio.create_task(parts_of(channel))
        await until(lambda: listener.num_open == 1)
        channel.close()
        with pytest.raises(ReplicaLostError):
            await asked
        await until(lambda: listener.num_open == 0)

    run(answer, use)


def test_an_application_that_fails_is_told_from_a_replica_that_has_gone() -> None:
    async def answer(request: Forwarded, take: Take) -> None:
        await take(HEAD)
        raise RuntimeError

    async def use(channel: Channel, listener: Listener) -> None:
        with raises(UnavailableError, "RuntimeError"):
            await parts_of(channel)
        assert channel.is_open

    run(answer, use)


def test_an_answer_that_nobody_reads_waits() -> None:
    num_taken, count, piece = 0, 100, bytes(2**20)

    async def answer(request: Forwarded, take: Take) -> None:
        nonlocal num_taken
        for _ in range(count):
            await take(piece)
            num_taken += 1

    async def both() -> None:
        listener = Listener(answer)
        address = await listener.listen("127.0.0.1")
        head = json.dumps(
            {
                "method": "POST",
                "path": "/",
                "query": "",
                "headers": [],
                "request_id": "r",
                "priority": 0,
                "may_overtake": True,
            }
        ).encode()
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(FRAME.pack(len(address.secret), 0, 0) + address.secret)
        writer.write(FRAME.pack(4 + len(head), 1, 1) + struct.pack("<I", len(head)) + head)
        await until(lambda: num_taken > 0)
        await asyncio.sleep(0.1)
        assert num_taken < count  # the rest does not fit into what the system keeps
        assert len(await reader.readexactly(count * (FRAME.size + len(piece)))) > 0
        await until(lambda: num_taken == count)
        writer.close()
        await listener.close()

    asyncio.run(asyncio.wait_for(both(), 120))


@pytest.mark.parametrize("sent", [b"", b"\0" * 9, b"\xff" * 9, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + b"a" * 100])
def test_whoever_does_not_know_the_secret_is_cut_off(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amalgam.cluster.channel.SECRET_SECONDS", 0.05)
    asked = []

    async def answer(request: Forwarded, take: Take) -> None:
        asked.append(request)

    async def both() -> None:
        listener = Listener(answer)
        address = await listener.listen("127.0.0.1")
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(sent)
        assert await reader.read() == b""
        writer.close()
        stranger = await Channel.open(replace(address, secret=bytes(32)))
        with pytest.raises(ReplicaLostError):
            await parts_of(stranger)
        await listener.close()

    asyncio.run(asyncio.wait_for(both(), 120))
    assert not asked


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", taken.getsockname()[1], b"")
        with pytest.raises(ReplicaLostError):
            asyncio.run(Channel.open(address))
