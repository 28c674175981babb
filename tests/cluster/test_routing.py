"""Which replica a request goes to."""

from __future__ import annotations

import time

import pytest

from amalgam.cluster.interface import Ask
from amalgam.cluster.routing import PIECE_BYTES, Routing, beginnings_of, read_body, weights_of
from amalgam.cluster.scaling import wanted_replicas
from tests.cluster.replicas import state


def routing(*names: str, max_imbalance: int = 2) -> Routing:
    made = Routing(max_imbalance)
    made.update({name: state() for name in names}, now())
    for seen in made.replicas.values():
        seen.is_ready = True
    return made


def now() -> float:
    return time.monotonic()


def later() -> float:
    """After all that has happened so far."""
    return now() + 1.0


def chat(system: str, question: str) -> tuple[int, ...]:
    return beginnings_of({"messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]})


def test_requests_are_spread_by_what_is_in_flight() -> None:
    made = routing("a", "b", "c")
    for number in range(9):
        ask = Ask(str(number))
        made.routed(ask, made.order(ask)[0])
    assert {name: seen.num_in_flight for name, seen in made.replicas.items()} == {"a": 3, "b": 3, "c": 3}
    for number in range(9):
        made.ended(Ask(str(number)))
        made.ended(Ask(str(number)))  # harmless
    assert all(seen.num_in_flight == 0 for seen in made.replicas.values())


def test_a_known_beginning_goes_to_the_replica_that_had_it_unless_that_is_overloaded() -> None:
    made = routing("a", "b", max_imbalance=2)
    system = "You are a patient teacher. " * 20
    first = Ask("1", chat(system, "What is a tree?"))
    made.routed(first, "b")
    later = Ask("2", chat(system, "And what is a forest?"))
    assert made.order(later)[0] == "b"
    assert made.order(Ask("3", chat("Something else. " * 20, "What is a tree?")))[0] == "a"
    for number in range(2):
        made.routed(Ask(f"more{number}"), "b")
    assert made.order(later)[0] == "a"
    assert made.reasons == {"weights": 0, "prefix": 1, "load": 1, "overflow": 1}


def test_a_longer_common_beginning_wins() -> None:
    made = routing("a", "b")
    short, long = "x" * 3 * PIECE_BYTES, "x" * 9 * PIECE_BYTES
    made.routed(Ask("1", beginnings_of({"prompt": short + "one" * PIECE_BYTES})), "a")
    made.routed(Ask("2", beginnings_of({"prompt": long})), "b")
    made.routed(Ask("3", beginnings_of({"prompt": short + "two" * PIECE_BYTES})), "a")
    assert made.order(Ask("4", beginnings_of({"prompt": long + "more"})))[0] == "b"


def test_other_weights_are_another_beginning() -> None:
    prompt = "x" * 4 * PIECE_BYTES
    plain, named = beginnings_of({"prompt": prompt}), beginnings_of({"prompt": prompt, "weights": "fast"})
    assert not set(plain) & set(named)


def test_requests_for_weights_go_where_these_are() -> None:
    made = routing("a", "b")
    made.update({"b": state(names={"fast": 7}, kept_ids=frozenset({1, 7}))}, now())
    for weights in ("fast", 7, "7"):
        assert made.order(Ask("1", weights=weights)) == ["b"]
    assert made.order(Ask("2", weights="current")) == ["a", "b"]
    assert made.order(Ask("3", weights="unknown")) == ["a", "b"]  # who gets it says that there are none


def test_what_is_not_ready_or_lost_or_tried_gets_nothing() -> None:
    made = routing("a", "b", "c")
    made.replicas["a"].is_ready = False
    made.lost("b")
    assert made.order(Ask("1")) == ["c"]
    assert not made.has_room(Ask("1", tried=frozenset({"c"})))
    made.update({"b": state()}, later())  # it was only out of reach
    assert made.order(Ask("1", tried=frozenset({"c"}))) == ["b"]
    made.update({}, now(), gone=["b", "c"])
    assert not made.has_room(Ask("1"))


def test_what_a_replica_told_before_it_was_lost_does_not_bring_it_back() -> None:
    made = routing("a", "b")
    asked_at = now()
    made.lost("a")
    made.update({"a": state(), "b": state()}, asked_at)
    assert made.order(Ask("1")) == ["b"]
    made.update({"a": state(), "b": state()}, later())
    assert made.order(Ask("1")) == ["a", "b"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff"])
def test_a_body_that_is_none_has_no_beginning(body: bytes) -> None:
    assert read_body(body) == {}


@pytest.mark.parametrize(("fields", "weights"), [({}, None), ({"weights": 3}, 3), ({"weights": True}, None)])
def test_weights_are_names_and_ids(fields: dict[str, object], weights: object) -> None:
    assert weights_of(fields) == weights


@pytest.mark.parametrize(
    ("requests", "kv_uses", "wanted"),
    [([0, 0], [0, 0], 1), ([8, 8], [0.1, 0.1], 2), ([8.2, 8], [0, 0], 3), ([1, 1], [0.8, 0.9], 3), ([20], [0.2], 3)],
)
def test_replicas_follow_the_queue_and_the_kv_cache(requests: list[float], kv_uses: list[float], wanted: int) -> None:
    assert wanted_replicas(requests, kv_uses, target_requests=8, target_kv=0.8) == wanted
