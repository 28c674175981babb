"""Request bodies: what each has to be like, whatever its fields mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

import amalgam.server.app  # noqa: F401 – all bodies there are
from amalgam.server.api.native import GenerateBody
from amalgam.server.api.openai.chat import ChatBody
from amalgam.server.api.openai.responses import ResponseBody
from amalgam.server.http.body import Body


def bodies(kind: type[Body]) -> Iterator[type[Body]]:
    for derived in kind.__subclasses__():
        yield derived
        yield from bodies(derived)


def lists(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every list in a schema of pydantic's core, and where it stands."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield path, schema
        for name, part in schema.items():
            if name not in ("metadata", "serialization", "json_schema_input_schema"):
                yield from lists(part, f"{path}.{name}")
    elif isinstance(schema, list | tuple):
        for part in schema:
            yield from lists(part, path)


@pytest.mark.parametrize("body", sorted(set(bodies(Body)), key=repr))
def test_a_long_list_ends_at_its_first_error(body: type[Body]) -> None:
    """An error for each of a million entries takes minutes, in which nobody else is answered."""
    slow = [path for path, schema in lists(body.__pydantic_core_schema__, body.__name__) if not schema.get("fail_fast")]
    assert slow == []


@pytest.mark.parametrize(
    ("body", "field"),
    [(GenerateBody, "logit_bias"), (ChatBody, "logit_bias"), (ChatBody, "metadata"), (ResponseBody, "metadata")],
)
def test_a_long_mapping_has_one_error(body: type[Body], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        body.model_validate({field: {f"x{index}": [] for index in range(2000)}})
    assert [error["loc"] for error in caught.value.errors() if error["loc"][0] == field] == [(field,)]
