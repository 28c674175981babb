"""What a value should have been, in our own words: pydantic's own speak of Python (`a valid dictionary`).

In: one entry of pydantic's `ValidationError.errors()`, or a value. Out: a sentence, or words for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {
    "a string": ("string_type",),
    "an integer": ("int_type", "int_parsing", "int_from_float", "int_parsing_size"),
    "a number": ("float_type", "float_parsing"),
    "a finite number": ("finite_number",),
    "true or false": ("bool_type", "bool_parsing"),
    "a list": ("list_type", "tuple_type"),
    "a mapping (JSON: an object)": ("dict_type", "mapping_type", "model_type", "model_attributes_type"),
}
_EXPECTED = {kind: words for words, kinds in _TYPES.items() for kind in kinds}
_ALLOWED = {
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
}
_SIZES = {
    "string_too_short": ("at least", "min_length", "character"),
    "string_too_long": ("at most", "max_length", "character"),
    "too_short": ("at least", "min_length", "item"),
    "too_long": ("at most", "max_length", "item"),
}


def expectation(item: Mapping[str, Any]) -> str:
    """`Expected an integer.`, `Allowed: 128 or less.`; pydantic's own sentence for what has no words here."""
    kind, context = item["type"], item.get("ctx") or {}
    if kind in _EXPECTED:
        return f"Expected {_EXPECTED[kind]}."
    if kind in _ALLOWED:
        bounds = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in context.items()}
        return f"Allowed: {_ALLOWED[kind].format_map(bounds)}."
    if kind in _SIZES:
        bound, name, unit = _SIZES[kind]
        count = context[name]
        return f"Expected {bound} {count} {unit}{'' if count == 1 else 's'}."
    return f"{item['msg']}."


def kind_in_words(value: Any) -> str:
    """What a value is, where it may not be shown."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return "a text" if isinstance(value, str) else f"of type {type(value).__name__}"
