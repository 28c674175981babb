"""Requests that no client should send: numbers, grammars, bodies, a chat template."""

from __future__ import annotations

import json
from typing import Any

_NUMBERS = ("-1", "NaN", "Infinity", "1e999", "true", str(2**63), "9" * 400, '"1"', "[1]")
_FIELDS = ("max_new_tokens", "top_k", "temperature", "top_p", "min_p", "repetition_penalty")
NUMBERS = [f'{{"prompt":"a","{field}":{number}}}'.encode() for field in _FIELDS for number in _NUMBERS]
# Fields of a completion: deep, wide, or costly to compile or to follow.
GRAMMARS: list[dict[str, Any]] = [
    {"guided_json": {"type": "integer", "multipleOf": 9999991}},
    {"guided_json": {"properties": {f"p{index}": {"type": "string"} for index in range(2000)}}},
    {"guided_json": {"allOf": [{"$ref": "#"}]}},
    {"guided_json": {"type": "string", "pattern": "(a|b)*a(a|b){40}"}},
    {"guided_regex": "((a{1,100}){1,100}){1,100}"},
    {"guided_regex": "(x+x+)+y"},
    {"guided_grammar": "start: start start | "},
]
TEMPLATE = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
_CHAT = b'{"model":"amalgam-demo","messages":[{"role":"user","content":[%s1]}]}'
_MANY = ((b"1,", 2_000_000), (b"[],", 2_000_000), (b'{"type":"text"},', 33_000))
BODIES = [_CHAT % (part * count) for part, count in _MANY]
BODIES += [b"[" * 100_000, json.dumps({f"k{index}": index for index in range(200_000)}).encode()]
