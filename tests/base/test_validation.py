"""What a value should have been: in words of the file or request, not of Python."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from amalgam.base.validation import expectation


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (str, 5, "Expected a string."),
        (int, "five", "Expected an integer."),
        (float, "five", "Expected a number."),
        (bool, "maybe", "Expected true or false."),
        (list[int], "five", "Expected a list."),
        (dict[str, int], "five", "Expected a mapping (JSON: an object)."),
        (Annotated[int, Field(ge=1)], 0, "Allowed: 1 or more."),
        (Annotated[int, Field(le=128)], 1000, "Allowed: 128 or less."),
        (Annotated[float, Field(gt=0.5)], 0.25, "Allowed: above 0.5."),
        (Literal["a", "b"], "c", "Allowed: 'a' or 'b'."),
        (Annotated[str, Field(min_length=1)], "", "Expected at least 1 character."),
        (Annotated[list[int], Field(max_length=2)], [1, 2, 3], "Expected at most 2 items."),
    ],
)
def test_expectation(kind: Any, value: Any, expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    [item] = caught.value.errors()
    assert expectation(item) == expected


def test_what_has_no_words_keeps_those_of_pydantic() -> None:
    assert expectation({"type": "date_type", "msg": "Input should be a valid date"}) == "Input should be a valid date."
