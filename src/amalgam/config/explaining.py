"""What is wrong with settings, in plain words and without secrets.

In: pydantic's errors, or a value and what it is declared as. Out: sentences. Must never know: which settings there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from amalgam.base.validation import expectation, kind_in_words
from amalgam.config.fields import holds_secrets
from amalgam.config.text import ENV_PREFIX
from amalgam.errors import describe


def explain(error: ValidationError, root: type[BaseModel], origins: Mapping[str, str] | None = None) -> list[str]:
    """A line for each mistake: the key, its value unless that may hold a secret, and what is allowed.

    Args:
        root: what was validated; keys are as they are in it.
        origins: dotted key → where its value comes from.
    """
    lines = []
    for item in error.errors(include_url=False):
        location = item["loc"]
        key = ".".join(str(part) for part in location) or "(top level)"
        origin = (origins or {}).get(key, "")
        if origin.startswith(ENV_PREFIX):
            key = f"{key} ({origin})"
        if item["type"] == "extra_forbidden":
            lines.append(f"  {key}: unknown setting. {_suggestion(location, root)}")
        elif item["type"] == "missing":
            lines.append(f"  {key}: is required. Give --config FILE, or set it by its flag or environment variable.")
        elif item["type"] == "value_error":
            lines.append(f"  {key}: {item['ctx']['error']}.")
        else:
            lines.append(f"  {key}: is {shown(item['input'], _declared(location, root))}. {expectation(item)}")
    return lines


def shown(value: Any, kind: Any) -> str:
    """A value as a message may show it: of what may hold a secret, only whether it is a list, a mapping or a text.

    Args:
        kind: what it is declared as.
    """
    return f"{kind_in_words(value)}, not shown" if holds_secrets(kind) else describe(value)


def _declared(location: Sequence[str | int], root: type[BaseModel]) -> Any:
    """What a value is declared as, or the nearest thing around it of which that can be told."""
    kind: Any = root
    for part in location:
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated:
            kind = arguments[0]
            origin, arguments = get_origin(kind), get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel) and str(part) in kind.model_fields:
            kind = kind.model_fields[str(part)].rebuild_annotation()
        elif origin in (dict, tuple):
            kind = arguments[1 if origin is dict else 0]
        else:
            break
    return kind


def _suggestion(location: Sequence[str | int], root: type[BaseModel]) -> str:
    """What to do about a setting that there is not: the section may have one of nearly that name."""
    section = _declared(location[:-1], root)
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return "Remove it or correct its name."
    close = difflib.get_close_matches(str(location[-1])[:64], section.model_fields, n=1)
    if not close:
        return "Remove it or correct its name; `amalgam config` lists the settings."
    return f"Did you mean {'.'.join(map(str, (*location[:-1], close[0])))}?"
