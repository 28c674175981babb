"""Chat messages → one text, by the Jinja template that a checkpoint brings along.

In: a template's source, a `ChatPrompt`. Out: the prompt's text. Must never know: token ids, files, HTTP.

The template is foreign code. It runs in Jinja's sandbox, with the functions and variables that templates are written
for (transformers' documentation "Writing a chat template"), and sees plain strings, lists and dictionaries only.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

DEFAULT = "default"


@dataclass(frozen=True)
class ChatPrompt:
    """What a chat template makes a prompt of.

    Attributes:
        messages: the conversation, oldest first, each as OpenAI's interface has it: `role`, `content` (a string, or a
            list of `{"type": "text", "text": …}`), `name`, `tool_calls`, `tool_call_id`, `reasoning_content`.
        tools: `{"type": "function", "function": {"name", "description", "parameters"}}`. None: none are offered.
        documents: `{"title", "text"}`, for templates that quote them.
        variables: what else the template may refer to, such as `enable_thinking`.
        add_generation_prompt: end with the beginning of the assistant's answer.
        continue_final_message: end within the last message, so that the answer goes on with it.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class ChatTemplate:
    """A template, compiled when it is first used. Any thread may use it.

    Args:
        source: Jinja.
        variables: what the template may refer to beside the messages, such as `bos_token`.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._source = source
        self._variables = dict(variables)
        self._lock = threading.Lock()
        self._compiled: Any = None

    def render(self, prompt: ChatPrompt) -> str:
        """The text of a conversation, up to where the assistant goes on.

        Raises:
            Exception: whatever goes wrong in the template, which is the model's.
        """
        with self._lock:
            if self._compiled is None:
                self._compiled = _environment().from_string(self._source)
        text: str = self._compiled.render(
            messages=[dict(message) for message in prompt.messages],
            tools=prompt.tools,
            documents=prompt.documents,
            **{**self._variables, **prompt.variables, "add_generation_prompt": prompt.add_generation_prompt},
        )
        return text


@cache
def _environment() -> Any:
    from jinja2 import ext, nodes, sandbox, utils
    from jinja2.exceptions import SecurityError, TemplateError

    class Generation(ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks an answer for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(utils.Namespace):
        """Takes no name with an underscore in front, through which a template could leave the sandbox."""

        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            utils.Namespace.__init__(self)
            for name, value in dict(*rest, **values).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}")
            super().__setitem__(name, value)

    class Dict:
        """`dict` and `dict.fromkeys`, without the methods of the type, which would change foreign objects."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
            return dict.fromkeys(keys, value)

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Unlike Jinja's own filter it escapes nothing for HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": Namespace,
        "dict": Dict(),
    }
    return environment
