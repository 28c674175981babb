"""One call of one replica, or of all at once: what each answers, raises, or does not answer in time."""

from __future__ import annotations

import asyncio

import pytest

from amalgam.cluster.members import Interrupted, Members
from amalgam.cluster.routing import Routing
from amalgam.errors import PlanError, UnavailableError
from tests.cluster.replicas import RULES, ForeignError, LocalTransport, ScriptedMember, no_such_source
from tests.errors import raises


@pytest.fixture
def replicas() -> dict[str, ScriptedMember]:
    return {name: ScriptedMember() for name in "abc"}


@pytest.fixture
def members(replicas: dict[str, ScriptedMember], loop: asyncio.AbstractEventLoop) -> Members:
    return Members(LocalTransport(replicas, Routing(4)), loop)


@pytest.mark.parametrize("seconds", [None, 60.0])
@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize("failure", [TimeoutError(), ForeignError(), asyncio.CancelledError()])
def test_whatever_a_replica_raises_is_its_error_alone(
    members: Members,
    replicas: dict[str, ScriptedMember],
    failure: BaseException,
    is_watched: bool,
    seconds: float | None,
) -> None:
    async def failing(method: str, *args: object) -> None:
        raise failure

    replicas["a"].call = failing  # type: ignore[method-assign]
    replicas["b"].fails["rules_of"] = True
    watch = (lambda num_answered: None) if is_watched else None
    outcomes = members.all("abc", "rules_of", 1, seconds=seconds, while_waiting=watch)
    assert (set(outcomes.results), outcomes.lost, outcomes.late) == ({"c"}, {"b"}, frozenset())
    assert {name: type(error) for name, error in outcomes.errors.items()} == {"a": UnavailableError}
    with raises(UnavailableError, "a", type(failure).__name__):
        members.call("a", "rules_of", 1)
    with raises(UnavailableError, "a", type(failure).__name__):
        members.any("rules_of", 1)


def test_an_error_of_a_replica_stays_what_it_is(members: Members, replicas: dict[str, ScriptedMember]) -> None:
    replicas["b"].fails["rules_of"] = failure = no_such_source()
    assert members.all("abc", "rules_of", 1).errors == {"b": failure}
    replicas["a"].fails["rules_of"] = no_such_source()
    with raises(PlanError, "x"):
        members.call("a", "rules_of", 1)


def test_what_has_not_answered_in_time_is_late(
    members: Members, replicas: dict[str, ScriptedMember], loop: asyncio.AbstractEventLoop
) -> None:
    hanging = replicas["b"].hangs["rules_of"] = asyncio.Event()
    outcomes = members.all("b", "rules_of", 1, seconds=0.0)
    assert (outcomes.results, outcomes.errors, outcomes.late) == ({}, {}, {"b"})
    loop.call_soon_threadsafe(hanging.set)
    assert members.call("b", "rules_of", 1) == RULES


@pytest.mark.parametrize("failure", [no_such_source(), ForeignError()])
def test_who_wants_an_answer_no_more_waits_for_what_is_under_way(
    members: Members, replicas: dict[str, ScriptedMember], loop: asyncio.AbstractEventLoop, failure: Exception
) -> None:
    hanging = replicas["b"].hangs["rules_of"] = asyncio.Event()
    asked = []

    def refuse(num_answered: int) -> None:
        asked.append(num_answered)
        loop.call_soon_threadsafe(hanging.set)
        raise failure

    with pytest.raises(Interrupted) as raised:
        members.all("b", "rules_of", 1, while_waiting=refuse)
    assert raised.value.__cause__ is failure
    assert asked == [0]
