"""Chat templates as Ollama has them: Go's text/template in place of Jinja.

In: a chat template in Jinja, as a function. Out: the style of conversation that it writes, and that style in Go. Must
never know: files, models.

A style is known by what it writes: a template is of one if both make the same text of some conversations. So a Go
template never says anything else than the model was trained on; for a template of no known style Ollama keeps to the
one in the GGUF file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]
"""Conversation → the prompt for its next answer. Raises ValueError where the template refuses it."""

_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "Who are you?"}
_TALK: tuple[Message, ...] = (
    _USER,
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Which one?\nSay it."},
)


@dataclass(frozen=True)
class Style:
    """What stands around the messages of a conversation.

    Attributes:
        name: as people call it.
        user, assistant: what stands before and behind a message of theirs.
        system: likewise; None: it stands in the first message of the user, before what `in_user` has.
        in_user: what stands before and behind a system message there; None: the template takes none.
        prompt: what an answer begins with.
        default: the system message of conversations that have none.
    """

    name: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    system: tuple[str, str] | None = None
    in_user: tuple[str, str] | None = None
    default: str | None = None

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation that ends with a user's message, from behind the first special token."""
        found = [message["content"] for message in messages if message["role"] == "system"]
        system = found[-1] if found else self.default
        parts = [] if system is None or self.system is None else [_between(self.system, system)]
        is_first = True
        for message in messages:
            content = message["content"]
            if message["role"] == "user":
                if is_first and system is not None and self.system is None and self.in_user is not None:
                    content = _between(self.in_user, system) + content
                is_first = False
                parts.append(_between(self.user, content))
            elif message["role"] == "assistant":
                parts.append(_between(self.assistant, content))
        return "".join((*parts, self.prompt))

    def go(self) -> str:
        """The same as a template of Ollama's: messages one by one, the prompt for the answer at the end.

        Of the last message, if it is the assistant's, the end is left open, for an answer to go on.
        """
        system = ""
        if self.system is not None:
            system = f"{{{{ if .System }}}}{_go(self.system[0])}{{{{ .System }}}}{_go(self.system[1])}{{{{ end }}}}"
        merged = ""
        if self.system is None and self.in_user is not None:
            inner = f"{_go(self.in_user[0])}{{{{ $.System }}}}{_go(self.in_user[1])}"
            merged = f"{{{{ if and $.System (not $asked) }}}}{inner}{{{{ end }}}}"
        before, after = map(_go, self.user)
        opening, closing = map(_go, self.assistant)
        return (
            f"{system}{{{{ $asked := false }}}}{{{{ range $i, $_ := .Messages }}}}"
            "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq .Role "user" }}}}{before}{merged}{{{{ $asked = true }}}}{{{{ .Content }}}}{after}'
            f'{{{{ else if eq .Role "assistant" }}}}{opening}{{{{ .Content }}}}'
            f"{{{{ if not $last }}}}{closing}{{{{ end }}}}{{{{ end }}}}"
            f'{{{{ if and $last (ne .Role "assistant") }}}}{_go(self.prompt)}{{{{ end }}}}{{{{ end }}}}'
        )


def style_of(render: Render, begin: str) -> Style | None:
    """The style of a chat template; None if it is no known one.

    Args:
        begin: what may stand before every conversation, which the tokenizer puts there in Ollama; empty: nothing.
    """
    plain = _rendered(render, _TALK)
    if plain is None:
        return None
    prefixes = ("", begin) if begin and plain.startswith(begin) else ("",)
    with_system = _rendered(render, (_SYSTEM, *_TALK))
    for style in STYLES:
        for prefix in prefixes:
            for candidate in _with_defaults(style, plain.removeprefix(prefix)):
                if prefix + candidate.render(_TALK) != plain:
                    continue
                if with_system is None:
                    return replace(candidate, system=None, in_user=None)
                if prefix + candidate.render((_SYSTEM, *_TALK)) == with_system:
                    return candidate
    return None


def _rendered(render: Render, messages: Sequence[Message]) -> str | None:
    try:
        return render(messages)
    except ValueError:
        return None


def _with_defaults(style: Style, text: str) -> Iterator[Style]:
    """The style, and the same with a system message that stands in a conversation without one."""
    yield style
    first = style.user[0] + _TALK[0]["content"]
    if style.system is not None and text.startswith(style.system[0]) and first in text:
        inner = text[: text.index(first)].removeprefix(style.system[0])
        if inner.endswith(style.system[1]):
            yield replace(style, default=inner[: len(inner) - len(style.system[1])])


def _between(around: tuple[str, str], text: str) -> str:
    return f"{around[0]}{text}{around[1]}"


def _go(text: str) -> str:
    """A literal in a Go template; braces would begin an action."""
    return text.replace("{{", '{{ "{{" }}')


def _tagged(name: str, before: str, after: str, *, prompt: str, assistant: str = "assistant") -> Style:
    """Every message, a system message too, between tags that name its role."""
    user, system, answer = ((before.format(role), after) for role in ("user", "system", assistant))
    return Style(name, user, answer, prompt, system)


STYLES = (
    _tagged("ChatML", "<|im_start|>{}\n", "<|im_end|>\n", prompt="<|im_start|>assistant\n"),
    _tagged(
        "Llama 3",
        "<|start_header_id|>{}<|end_header_id|>\n\n",
        "<|eot_id|>",
        prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    Style(
        "Gemma",
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        "<start_of_turn>model\n",
        in_user=("", "\n\n"),
    ),
    Style(
        "DeepSeek",
        ("<｜User｜>", ""),
        ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        "<｜Assistant｜>",
        ("", ""),
    ),
    Style("DeepSeek V2", ("User: ", "\n\n"), ("Assistant: ", "<｜end▁of▁sentence｜>"), "Assistant:", ("", "\n\n")),
    Style("Mistral 7", ("[INST]", "[/INST]"), ("", "</s>"), "", ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    Style("Mistral 3", ("[INST] ", "[/INST]"), (" ", "</s>"), "", in_user=("", "\n\n")),
    Style("Mistral 3 Tekken", ("[INST]", "[/INST]"), ("", "</s>"), "", in_user=("", "\n\n")),
    Style("Mistral", ("[INST] ", " [/INST]"), ("", "</s>"), "", in_user=("", "\n\n")),
    Style("Mistral 2", ("[INST] ", " [/INST]"), (" ", "</s>"), "", in_user=("", "\n\n")),
    Style("Llama 2", ("<s>[INST] ", " [/INST]"), (" ", " </s>"), "", in_user=("<<SYS>>\n", "\n<</SYS>>\n\n")),
    _tagged("Phi 3", "<|{}|>\n", "<|end|>\n", prompt="<|assistant|>\n"),
    _tagged("Phi 4", "<|{}|>", "<|end|>", prompt="<|assistant|>"),
    _tagged("Zephyr", "<|{}|>\n", "</s>\n", prompt="<|assistant|>\n"),
    _tagged("GLM 4", "<|{}|>\n", "", prompt="<|assistant|>\n"),
    _tagged(
        "Granite",
        "<|start_of_role|>{}<|end_of_role|>",
        "<|end_of_text|>\n",
        prompt="<|start_of_role|>assistant<|end_of_role|>",
    ),
    _tagged("OLMo", "<|{}|>\n", "<|endoftext|>\n", prompt="<|assistant|>\n"),
    _tagged("OLMo 2", "<|{}|>\n", "\n", prompt="<|assistant|>\n"),
)
