"""How much to think, and what else a request tells the chat template by name.

In: what an interface's fields say. Out: variables of the template. Must never know: whose fields these are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from amalgam.errors import RequestError
from amalgam.text.chat import RESERVED

_SWITCHES = {  # what turns thinking on in a template; a message's own thoughts are called `thinking`, too
    "enable_thinking": re.compile(r"\benable_thinking\b"),  # as Qwen and GLM call it
    "thinking": re.compile(r"\b(?:if|not|and|or)\s+thinking\b(?!\.)"),  # as DeepSeek does
}
_LEVELS = "reasoning_effort"
_HIGHEST = {"xhigh": "high", "max": "high"}  # templates know no more


def template_variables(
    template: str | None,
    given: Mapping[str, Any] | None = None,
    *,
    effort: str | None = None,
    thinks: bool | None = None,
) -> dict[str, Any]:
    """What the chat template may refer to.

    Args:
        template: its source.
        given: what the request gives by name, which comes before all else.
        effort: how much is to be thought, from `none` to `max`. For a template with no more than a switch, any but
            `none` turns it on, unless `thinks` says otherwise.
        thinks: whether anything is.

    Clients and agents say both unasked, so that a template that cannot be told is no error: the model thinks, or does
    not, as it was trained to. `takes_effort` tells which it is.

    Raises:
        RequestError: a name that is not the request's to give.
    """
    source, variables = template or "", dict(given or {})
    if reserved := sorted(RESERVED & variables.keys()):
        raise RequestError(
            f"chat_template_kwargs has {reserved[0]!r}.",
            remedy="Give it as a field of the request.",
            param="chat_template_kwargs",
        )
    switches = [name for name, pattern in _SWITCHES.items() if pattern.search(source)]
    if effort is not None and _LEVELS in source:
        variables.setdefault(_LEVELS, _HIGHEST.get(effort, effort))
    elif effort is not None and thinks is None:
        thinks = effort != "none"
    if thinks is not None:
        for name in switches:
            variables.setdefault(name, thinks)
    return variables


def takes_effort(template: str | None) -> bool:
    """Whether a chat template can be told how much to think."""
    source = template or ""
    return _LEVELS in source or any(pattern.search(source) for pattern in _SWITCHES.values())
