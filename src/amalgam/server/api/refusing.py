"""Fields that an interface has and this server refuses by name, unless their value asks for nothing.

In: a request's JSON. Out: the same without them. Must never know: what the other fields mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import model_validator

from amalgam.errors import UnsupportedError, describe
from amalgam.server.http.body import Body


@dataclass(frozen=True)
class Refused:
    """Why a field is refused, and the values that are accepted because they ask for nothing; null always is.

    Attributes:
        details: of the error, for clients that look there for what to do without the field.
    """

    why: str
    neutral: tuple[Any, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def check(self, name: str, value: Any) -> None:
        """
        Raises:
            UnsupportedError: naming the field, its value, and what is allowed.
        """
        if value is None or any(type(value) is type(item) and value == item for item in self.neutral):
            return
        allowed = " or ".join(describe(item) for item in self.neutral)
        remedy = f"{self.why} Leave it out{f', or give {allowed}' if allowed else ''}."
        what = f"{name} is {describe(value)}, and not supported."
        raise UnsupportedError(what, remedy=remedy, param=name, details=self.details)


class RefusingBody(Body):
    """A body that refuses, by name and with the reason, the fields in `refused` and in `refused_everywhere`.

    Attributes:
        refused_everywhere: in all objects of the interface.
        place: of an object in the request, `reasoning.`: its fields are named with it.
    """

    refused: ClassVar[Mapping[str, Refused]] = {}
    refused_everywhere: ClassVar[Mapping[str, Refused]] = {}
    place: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.keys() <= cls.model_fields.keys():
            return data
        kept = {}
        for name, value in data.items():
            known = None if name in cls.model_fields else cls.refused.get(name) or cls.refused_everywhere.get(name)
            if known is None:
                kept[name] = value
            else:
                known.check(cls.place + name, value)
        return kept
