"""What a setting's field takes, and the section that reads texts accordingly.

In: pydantic fields; data in which scalars may be text. Out: types, words for people, and a base class for sections.
Must never know: which settings there are, and where their texts come from.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, Secret, SecretStr, model_validator
from pydantic.fields import FieldInfo

from amalgam.base.escaping import without_password

_WORDS_FOR_NONE = ("", "null", "none", "~")
_KINDS = {
    bool: "true | false", int: "integer", float: "number", str: "text", SecretStr: "text", dict: "mapping",
    tuple: "list",
}  # fmt: skip
_BOUNDS = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}

UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, wherever it was given; `~` is the home folder."""

_HUB_ID = "a hub id"
ModelPath = Annotated[UserPath, _HUB_ID]
"""The same, or a hub id."""

_WITHOUT_PASSWORD = PlainSerializer(without_password, return_type=str, when_used="json")
Address = Annotated[str, _WITHOUT_PASSWORD]
"""A URL, which is shown without the name and password that may be in it."""


class Section(BaseModel):
    """Settings that belong together: frozen, and nothing in them that is not declared."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _read_texts(cls, data: Any) -> Any:
        """What pydantic does not do by itself: words for None, null where nothing is as good, `1e6` for an integer."""
        if not isinstance(data, Mapping):
            return data
        result = dict(data)
        for name, field in cls.model_fields.items():
            if name not in result:
                continue
            value, types = result[name], types_of(field)
            if isinstance(value, str) and str not in types:
                if NoneType in types and value.strip().lower() in _WORDS_FOR_NONE:
                    result[name] = None
                elif int in types:
                    result[name] = _whole_number(value)
            elif value is None and NoneType not in types and can_be_empty(field):
                del result[name]
        return result


def types_of(field: FieldInfo) -> tuple[Any, ...]:
    """The types that a field takes, without what narrows them down; a choice of words is text."""
    return tuple(str if get_origin(member) is Literal else member for member in _members(field))


def holds_secrets(kind: Any) -> bool:
    """Whether values of a type may hold what only its owner should see: it is a secret, or has one in it."""
    if kind is _WITHOUT_PASSWORD or kind is SecretStr or get_origin(kind) is Secret:
        return True
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return any(holds_secrets(field.rebuild_annotation()) for field in kind.model_fields.values())
    return any(holds_secrets(argument) for argument in get_args(kind))


def with_paths(section: BaseModel, change: Callable[[str, bool], str]) -> dict[str, Any]:
    """A section's data with other paths, those of the sections in it too; empty ones stay empty.

    Args:
        change: is given a path, and whether it may be a hub id.
    """
    return {
        name: _with_paths(getattr(section, name), field.annotation, field.metadata, change)
        for name, field in type(section).model_fields.items()
    }


def _with_paths(value: Any, kind: Any, notes: Sequence[Any], change: Callable[[str, bool], str]) -> Any:
    """
    Args:
        kind, notes: what the value is declared as, and what narrows that down.
    """
    if isinstance(value, BaseModel):
        return with_paths(value, change)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _with_paths(value, arguments[0], [*notes, *arguments[1:]], change)
    if origin is dict and value:
        return {key: _with_paths(item, arguments[1], (), change) for key, item in value.items()}
    if origin is tuple and value:
        return tuple(_with_paths(item, arguments[0], (), change) for item in value)
    return change(value, _HUB_ID in notes) if value and _is_path(notes) else value


def _is_path(notes: Iterable[Any]) -> bool:
    return any(getattr(note, "func", None) is os.path.expanduser for note in notes)


def kind_of(field: FieldInfo) -> str:
    """What a field takes, in words: `integer from 1 to 65535`."""
    words = []
    for item in field.metadata:
        for attribute, word in _BOUNDS.items():
            if (bound := getattr(item, attribute, None)) is not None:
                words.append(f"{word} {bound:g}" if isinstance(bound, float) else f"{word} {bound}")
    members = _members(field)
    [member] = [member for member in members if member is not NoneType]
    if get_origin(member) is Literal:
        name = " | ".join(get_args(member))
    elif _is_path(field.metadata):
        name = "path"
    else:
        name = _KINDS[get_origin(member) or member]
    return " ".join([name, *words, *(["or none"] if NoneType in members else [])])


def can_be_empty(field: FieldInfo) -> bool:
    """Whether a field's default is that there is nothing, or a section of defaults."""
    if field.is_required():
        return False
    default = field.get_default(call_default_factory=True)
    return default is None or default in ("", {}, ()) or isinstance(default, BaseModel)


def split_list(text: str) -> list[str]:
    """`a, b` or `["a", "b"]`; a bracket alone is part of an address."""
    with contextlib.suppress(ValueError):
        if isinstance(values := json.loads(text), list) and all(isinstance(value, str) for value in values):
            return values
    return [part.strip() for part in text.split(",") if part.strip()]


def _members(field: FieldInfo) -> tuple[Any, ...]:
    arguments = get_args(field.annotation)
    return arguments if NoneType in arguments else (field.annotation,)


def _whole_number(text: str) -> Any:
    """`8.0e6`, as templates write large integers, as one; anything else as it is."""
    if "e" not in text.lower():
        return text
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value.is_integer() else text
