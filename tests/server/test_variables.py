"""What the chat template is told, the same for every interface."""

from __future__ import annotations

from typing import Any

import pytest

from amalgam.errors import RequestError
from amalgam.server.api.variables import takes_effort, template_variables
from tests.errors import raises

SWITCH, DEEPSEEK, LEVELS = "{% if enable_thinking %}", "{% if not thinking is defined %}", "{{ reasoning_effort }}"


@pytest.mark.parametrize(
    ("template", "said", "wanted"),
    [
        (None, {}, {}),
        ("{{ message.thinking }}", {"thinks": True}, {}),
        (SWITCH, {"thinks": False}, {"enable_thinking": False}),
        (DEEPSEEK, {"thinks": True}, {"thinking": True}),
        (SWITCH, {"effort": "low"}, {"enable_thinking": True}),
        (DEEPSEEK, {"effort": "max"}, {"thinking": True}),
        (SWITCH, {"effort": "none"}, {"enable_thinking": False}),
        (SWITCH, {"effort": "high", "thinks": False}, {"enable_thinking": False}),
        (LEVELS, {"effort": "minimal"}, {"reasoning_effort": "minimal"}),
        (LEVELS, {"effort": "xhigh"}, {"reasoning_effort": "high"}),
        (LEVELS + SWITCH, {"effort": "max", "thinks": True}, {"reasoning_effort": "high", "enable_thinking": True}),
        ("", {"effort": "none"}, {}),
        ("", {"effort": "high"}, {}),
        (SWITCH, {"given": {"enable_thinking": 1, "x": 2}, "thinks": False}, {"enable_thinking": 1, "x": 2}),
    ],
)
def test_a_template_is_told_what_it_has_a_name_for(
    template: str | None, said: dict[str, Any], wanted: dict[str, Any]
) -> None:
    assert template_variables(template, **said) == wanted


def test_what_cannot_be_told() -> None:
    with raises(RequestError, "tools"):
        template_variables("", {"tools": []})


def test_whether_an_effort_changes_anything() -> None:
    assert [takes_effort(template) for template in (SWITCH, DEEPSEEK, LEVELS)] == [True] * 3
    assert not takes_effort("{{ message.thinking }}") and not takes_effort(None)
