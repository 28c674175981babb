"""The OpenAPI schema as tables, and as one HTML page: no scripts, nothing fetched from elsewhere.

In: the schema that FastAPI derives from the routes. Out: its endpoints with their fields, or a page of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import orjson

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
overflow-wrap: break-word; }
code { font: 14px ui-monospace, monospace; } h2 { margin: 2.5rem 0 0; font-size: 1.1rem; }
h2 code { font-size: 1.1rem; } h3 { font-size: .9rem; margin: 1rem 0 .2rem; }
.frame { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem;
border-bottom: 1px solid var(--line); } th { font-weight: 600; background: var(--soft); }
.method { display: inline-block; min-width: 3.2rem; font-weight: 700; }
"""


def with_defaults(schema: dict[str, Any], names: set[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with other defaults in the bodies that have all fields of `names`."""
    parts = schema["components"]["schemas"]
    changed = {
        name: {
            **part,
            "properties": {
                key: {**field, "default": defaults[key]} if key in defaults else field
                for key, field in part["properties"].items()
            },
        }
        for name, part in parts.items()
        if names <= part.get("properties", {}).keys()
    }
    return {**schema, "components": {**schema["components"], "schemas": {**parts, **changed}}}


@dataclass(frozen=True)
class Field:
    """A field of a query, a body or an answer. `default` is JSON, "required" or "none"."""

    name: str
    kind: str
    default: str
    description: str


@dataclass(frozen=True)
class Endpoint:
    """A method of a path. `tables` are those of "Query", "Body" and "Answer" that have fields."""

    method: str
    path: str
    tag: str
    description: str
    tables: Mapping[str, tuple[Field, ...]]


def endpoints(schema: dict[str, Any]) -> Iterator[Endpoint]:
    """Every endpoint of a schema, in its order."""
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            tag = next(iter(operation.get("tags", ())), "")
            tables = dict(_tables(operation, schema))
            yield Endpoint(method.upper(), path, tag, operation.get("description", ""), tables)


def render_docs(schema: dict[str, Any]) -> str:
    """A page with every endpoint, its fields, their defaults and what its answer holds."""
    info = schema["info"]
    sections = "".join(_section(endpoint) for endpoint in endpoints(schema))
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<link rel="icon" href="data:,">'  # so that browsers ask for no favicon.ico
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>{escape(info.get('description', ''))} "
        f'The same as a schema: <a href="openapi.json">openapi.json</a>.</p>{sections}</body></html>'
    )


def _section(endpoint: Endpoint) -> str:
    html = f'<h2><span class="method">{escape(endpoint.method)}</span> <code>{escape(endpoint.path)}</code></h2>'
    html += f"<p>{escape(endpoint.description)}</p>"
    return html + "".join(_table(title, fields) for title, fields in endpoint.tables.items())


def _table(title: str, fields: tuple[Field, ...]) -> str:
    is_answer = title == "Answer"
    rows = "".join(
        f"<tr><td><code>{escape(field.name)}</code></td><td>{escape(field.kind)}</td>"
        + ("" if is_answer else f"<td>{escape(field.default)}</td>")
        + f"<td>{escape(field.description)}</td></tr>"
        for field in fields
    )
    default_head = "" if is_answer else "<th>Default</th>"
    table = f"<table><tr><th>Field</th><th>Type</th>{default_head}<th></th></tr>{rows}</table>"
    return f'<h3>{title}</h3><div class="frame">{table}</div>'


def _tables(operation: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[str, tuple[Field, ...]]]:
    query = [parameter for parameter in operation.get("parameters", []) if parameter["in"] == "query"]
    parts = {
        "Query": {
            "properties": {
                item["name"]: {**item["schema"], "description": item.get("description", "")} for item in query
            },
            "required": [item["name"] for item in query if item.get("required")],
        },
        "Body": _resolve(_json_schema(operation.get("requestBody", {})), schema),
        "Answer": _resolve(_json_schema(operation.get("responses", {}).get("200", {})), schema),
    }
    for title, part in parts.items():
        required = part.get("required", [])
        fields = [
            Field(name, _kind(field, schema), _default(field, name in required), field.get("description", ""))
            for name, field in part.get("properties", {}).items()
        ]
        if title != "Answer":
            fields.sort(key=lambda field: field.default != "required")
        if fields:
            yield title, tuple(fields)


def _json_schema(content: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = content.get("content", {}).get("application/json", {}).get("schema", {})
    return result


def _resolve(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follow `$ref`, and take the object out of "object or null"."""
    for option in part.get("anyOf", []):
        if "$ref" in option:
            part = option
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        part = schema["components"]["schemas"][name]
    return part


def _default(field: dict[str, Any], is_required: bool) -> str:
    if is_required:
        return "required"
    return orjson.dumps(field["default"]).decode() if "default" in field else "none"


def _kind(field: dict[str, Any], schema: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(option, schema) for option in field["anyOf"])
    if "$ref" in field:
        target = _resolve(field, schema)
        return _kind(target, schema) if "enum" in target else "{" + ", ".join(target.get("properties", {})) + "}"
    if "enum" in field:
        return " or ".join(orjson.dumps(value).decode() for value in field["enum"])
    if "const" in field:
        return orjson.dumps(field["const"]).decode()
    kind = str(field.get("type", "any"))
    if kind == "array":
        kind = f"list of {_kind(field.get('items', {}), schema)}"
    return " ".join([kind, *_bounds(field)])


def _bounds(field: dict[str, Any]) -> Iterator[str]:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    for key, word in words.items():
        if key in field:
            yield f"{word} {field[key]:.15g}"
