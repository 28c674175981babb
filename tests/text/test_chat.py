"""Chat templates give what transformers makes of them, and cannot do more than that."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from amalgam.text.chat import ChatPrompt, ChatTemplate

CHATS = (
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": " <b>'hi'</b> & \"hö\" 你好\n"},
        {"role": "assistant", "content": "Hello\nworld\n"},
        {"role": "user", "content": "more"},
    ],
)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama-2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}\n"
    "{% for m in rest %}\n    {% if loop.index0 == 0 and system != false %}\n"
    "        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}\n    {% else %}\n"
    "        {% set content = m.content %}\n    {% endif %}\n"
    "    {% if m.role == 'user' %}\n{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\n"
    "    {% elif m.role == 'assistant' %}\n{{ ' ' + content.strip() + ' ' + eos_token }}\n    {% endif %}\n"
    "{% endfor %}",
    "whitespace": "a  \n   {%- if true -%}   b {% endif %}\n\n  {# note #}\n c {{ eos_token }}\n",
    "namespace": "{% set ns = namespace(seen=0, names=dict(a=1)) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.seen = ns.seen + 1 %}{% endif %}{% endfor %}{{ ns.seen }}{{ dict.fromkeys(['x'], 2) }}{{ ns.names }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% if m.role == 'system' %}"
    "{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = m.content %}"
    "{{ x }}\n{{ loop.index }}{% endgeneration %}{{ x }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': '<&é>'} | tojson(sort_keys=true) }}"
    "{{ [1] | tojson(separators=(',', ':')) }}{{ 'é' | tojson(ensure_ascii=true) }}",
    "what is not given": "{{ tools }}{{ documents }}{{ unk_token }}{% if tools %}x{% endif %}{{ tools is defined }}"
    "{{ enable_thinking is defined }}{{ messages[0].name }}",
    "filters": "{{ messages[-1].content | trim | upper }}{{ messages | length }}"
    "{{ messages | map(attribute='role') | list }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a-b'.split('-')[1] }}{{ 7 // 2 }}",
    "macros": "{% macro turn(m) %}[{{ m.role }}]{{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "time": "{{ strftime_now('%Y-%m') }}",
    "carriage returns": "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\n",
}


def expected(source: str, messages: list[dict[str, str]]) -> str:
    texts, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **NAMES)
    return str(texts[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CHATS, ids=["short", "long"])
def test_the_text_is_that_of_transformers(name: str, messages: list[dict[str, str]]) -> None:
    template = ChatTemplate(TEMPLATES[name], NAMES)
    assert (
        template.render(ChatPrompt(messages))
        == template.render(ChatPrompt(messages))
        == expected(TEMPLATES[name], messages)
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].role }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__.os }}",
        "{{ strftime_now.__globals__.json }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% include 'config.json' %}",
        "{% import 'os' as os %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_what_goes_wrong_or_leaves_the_sandbox_is_an_error(source: str) -> None:
    with pytest.raises((jinja2.TemplateError, ArithmeticError, OverflowError, TypeError)):
        ChatTemplate(source, NAMES).render(ChatPrompt(CHATS[0]))


def test_a_template_cannot_change_what_it_is_given() -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    source = "{% set messages = 3 %}{% for m in [1] %}{{ m }}{% endfor %}"
    assert ChatTemplate(source, NAMES).render(ChatPrompt(messages)) == "1"
    assert messages == [{"role": "user", "content": "hi"}]
