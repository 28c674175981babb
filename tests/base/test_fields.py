"""Reading what somebody else wrote: values of the type that was asked for, or a complaint that finds the place."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest

from amalgam.base.fields import Fields
from amalgam.errors import AmalgamError, CheckpointError, UnsupportedError, describe

VALUES: dict[str, Any] = {
    "size": 7,
    "eps": 1e-6,
    "whole": 2,
    "flag": True,
    "name": "x",
    "names": ["a", "b"],
    "numbers": [1, 2.5],
    "nothing": None,
    "inner": {"size": 3, "deep": {"flag": False}},
}
Read = Callable[[Fields], object]


def fields(**changes: Any) -> Fields:
    return Fields({**VALUES, **changes}, "a/config.json", "outer.")


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (lambda f: f.int("size"), 7),
        (lambda f: f.int("absent", default=5), 5),
        (lambda f: f.int("nothing", default=None), None),
        (lambda f: f.int("absent", "size"), 7),
        (lambda f: f.float("eps"), 1e-6),
        (lambda f: f.float("whole"), 2.0),
        (lambda f: f.bool("flag"), True),
        (lambda f: f.bool("absent", default=False), False),
        (lambda f: f.text("name"), "x"),
        (lambda f: f.list("names", of=str, what="names"), ["a", "b"]),
        (lambda f: f.list("numbers", of=float, what="numbers"), [1, 2.5]),
        (lambda f: f.list("absent", of=str, what="names", default=[]), []),
        (lambda f: f.object("absent", default=None), None),
        (lambda f: f.object("inner").int("size"), 3),
        (lambda f: f.objects("absent"), {}),
    ],
)
def test_values_are_read(read: Read, value: object) -> None:
    found = read(fields())
    assert found == value and type(found) is type(value)


def test_arrays_are_lists() -> None:
    assert fields(numbers=array("f", [1, 2])).list("numbers", of=float, what="numbers") == [1.0, 2.0]


@pytest.mark.parametrize(
    ("read", "key", "value", "allowed"),
    [
        (lambda v: fields(size=v).int("size"), "size", True, "an integer from 0"),
        (lambda v: fields(size=v).int("size"), "size", 7.0, "an integer from 0"),
        (lambda v: fields(size=v).int("size"), "size", "7", "an integer from 0"),
        (lambda v: fields(size=v).int("size"), "size", -1, "an integer from 0"),
        (lambda v: fields(size=v).int("size", low=1, high=8), "size", 9, "an integer from 1 to 8"),
        (lambda v: fields(size=v).int("size"), "size", 10**30, "an integer from 0"),
        (lambda v: fields(eps=v).float("eps", low=0), "eps", float("nan"), "a finite number of at least 0"),
        (lambda v: fields(eps=v).float("eps"), "eps", float("inf"), "a finite number"),
        (lambda v: fields(eps=v).float("eps"), "eps", 10**400, "a finite number"),
        (lambda v: fields(eps=v).float("eps"), "eps", False, "a finite number"),
        (lambda v: fields(flag=v).bool("flag"), "flag", 1, "true or false"),
        (lambda v: fields(name=v).text("name"), "name", 3, "a string"),
        (lambda v: fields(names=v).list("names", of=str, what="names"), "names", "ab", "a list of names"),
        (lambda v: fields(names=v).list("names", of=int, what="ids"), "names", [1, True], "a list of ids"),
        (lambda v: fields(inner=v).object("inner"), "inner", [], "an object"),
        (lambda v: fields(inner={"a": v}).objects("inner"), "inner.a", 3, "an object"),
        (lambda v: fields(inner={"b": {"c": v}}).object("inner").object("b").text("c"), "inner.b.c", 3, "a string"),
        (lambda v: fields(whole=v).int("size", "whole"), "whole", 8, "what size says, 7"),
    ],
)
def test_a_complaint_names_file_key_value_and_what_is_allowed(
    read: Callable[[Any], object], key: str, value: Any, allowed: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(value)
    assert caught.value.what == f"a/config.json has outer.{key} = {describe(value)}."
    assert caught.value.remedy == f"Expected {allowed}."


@pytest.mark.parametrize("read", [lambda f: f.int("absent", "other"), lambda f: f.object("inner").text("absent")])
def test_what_is_required_is_named(read: Read) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(fields())
    assert caught.value.what in {
        "a/config.json has no outer.absent or outer.other.",
        "a/config.json has no outer.inner.absent.",
    }


def test_a_value_that_others_may_understand() -> None:
    found = fields()
    found.expect("name", "x", "y")
    found.expect("nothing", 1)
    with pytest.raises(UnsupportedError) as caught:
        found.expect("name", "y", None)
    assert caught.value.what == "a/config.json has outer.name = 'x'."
    assert caught.value.remedy == "Supported: 'y' or None."


def test_synonyms_may_differ_in_case_alone() -> None:
    assert fields(other="X").text("name", "other") == "x"


def test_what_nobody_asked_for_is_known_at_every_depth() -> None:
    found = Fields({"a": 1, "b": 2, "c": {"d": 1, "e": 2}, "f": {"g": 1}, "h": {"i": {"j": 1}}}, "file")
    found.int("a")
    found.object("c").int("d")
    found.pass_over({"f"})
    for inner in found.objects("h").values():
        inner.pass_over({"k"})
    assert [(inner.path, key, value) for inner, key, value in found.unread()] == [
        ("", "b", 2),
        ("c.", "e", 2),
        ("h.i.", "j", 1),
    ]


def test_a_kind_of_fields_has_its_own_rules() -> None:
    class Own(Fields):
        least = 1
        null_is_false = True
        cure = "Ask the author."

        def refuse(self, key: str, value: Any, allowed: str) -> Any:
            self.unsupported(key, value, allowed)

    own = Own({"size": 0, "flag": None, "inner": {"size": 0}}, "file")
    assert own.bool("flag", default=True) is False and own.bool("absent", default=True) is True
    for read in (own.int, own.object("inner").int):
        with pytest.raises(UnsupportedError) as caught:
            read("size")
        assert caught.value.remedy == "Supported: an integer from 1. Ask the author."
    with pytest.raises(AmalgamError) as missing:
        own.int("absent")
    assert "Ask the author." in missing.value.remedy


def test_a_long_value_is_told_with_its_own_length() -> None:
    assert describe("x" * 118) == repr("x" * 118)
    assert describe("x" * 200) == f"'{'x' * 119}… (200 characters)"  # of which none is a quote
    assert describe(["x" * 200]).endswith("… (204 characters)")
