"""A replica's side, without a gateway."""

from __future__ import annotations

import asyncio

import pytest

from amalgam.cluster.interface import Forwarded, Head, Part
from amalgam.cluster.member import Member
from amalgam.errors import UnavailableError
from tests.errors import raises
from tests.server.fakes import BreakingOff, FakeDeployment, fake_settings


def test_half_an_answer_is_not_told_as_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amalgam.server.in_process.create_app", lambda service: BreakingOff())
    member = Member(FakeDeployment(), fake_settings())  # type: ignore[arg-type]
    taken: list[Part] = []

    async def take(part: Part) -> None:
        taken.append(part)

    with raises(UnavailableError):
        asyncio.run(member.answer(Forwarded("POST", "/generate", b"", (), b"{}", "r1"), take))
    assert taken == [Head(200, ()), b"{}"]
