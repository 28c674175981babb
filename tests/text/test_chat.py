"""Chat templates give what transformers makes of them, and cannot do more than that."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from amalgam.errors import RequestError
from amalgam.text import sandbox
from amalgam.text.chat import ChatPrompt, ChatTemplates
from amalgam.text.gguf.metadata import chat_templates
from amalgam.text.rendering import TemplateError
from tests.errors import raises
from tests.lazy import Lazy
from tests.text.processes import running

render_jinja_template = Lazy("transformers.utils.chat_template_utils", "render_jinja_template")

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


def rendered(source: str, messages: Any, **options: Any) -> str:
    text, mark = ChatTemplates({"default": source}, NAMES).render(ChatPrompt(messages, **options))
    assert not mark
    return text


def expected(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    options = {"add_generation_prompt": True, **NAMES, **options}
    texts, _ = render_jinja_template([messages], chat_template=source, **options)
    return str(texts[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CHATS, ids=["short", "long"])
def test_the_text_is_that_of_transformers(name: str, messages: list[dict[str, str]]) -> None:
    assert rendered(TEMPLATES[name], messages) == expected(TEMPLATES[name], messages)


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
    with pytest.raises(TemplateError):
        rendered(source, CHATS[0])


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells <it>", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
WITH_CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "tool_call_id": "abc", "content": "rain"},
]
# As the families have them, in short.
WITH_TOOLS = {
    "qwen": "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "mistral": "{{ bos_token }}{% if tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m['content'] | trim }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }}:{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls is defined %}[TOOL_CALLS]{{ m.tool_calls | map(attribute='function') | list | tojson }}"
    "{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "glm": "[gMASK]<sop>{% if tools %}{{ tools[0].function.name }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>"
    "{{ v if v is string else v | tojson(ensure_ascii=False) }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    "{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}<|assistant|>",
    "gpt-oss": "{{ tools | length }}"
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.thinking %}<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}{{ documents | length }}",
}


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}], ids=["", "variable"])
def test_tools_and_variables_are_shown_as_transformers_shows_them(name: str, variables: dict[str, Any]) -> None:
    documents = [{"title": "t", "text": "x"}]
    options = {"tools": [WEATHER], "documents": documents}
    wanted = expected(WITH_TOOLS[name], WITH_CALLS, **options, **variables)
    assert rendered(WITH_TOOLS[name], WITH_CALLS, **options, variables=variables) == wanted
    as_text = [{**message} for message in WITH_CALLS]
    as_text[1]["tool_calls"] = [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}]
    as_text[1]["content"] = None
    assert rendered(WITH_TOOLS[name], as_text, **options, variables=variables) == wanted


def test_arguments_are_text_where_a_template_wants_it() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ 'json' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    assert rendered("{{ tools }}" + source, WITH_CALLS) == 'Nonejson{"city": "Zürich"}'


def test_of_several_templates_the_one_for_tools() -> None:
    templates = ChatTemplates({"default": "plain", "tool_use": "{{ tools | length }}"}, NAMES)
    assert templates.render(ChatPrompt(CHATS[0], tools=[WEATHER]))[0] == "1"
    assert templates.render(ChatPrompt(CHATS[0]))[0] == "plain"


def test_tools_are_described_where_a_template_knows_of_none() -> None:
    text = rendered(TEMPLATES["chatml"], WITH_CALLS, tools=[WEATHER])
    assert text.startswith("<|im_start|>system\n") and json.dumps(WEATHER["function"]) in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>" in text
    assert rendered(TEMPLATES["chatml"], CHATS[1], tools=[WEATHER]).count("<|im_start|>system") == 1


def test_parts_of_a_content() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    loop = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    assert rendered(loop, messages) == "[a][b]"
    assert rendered("{{ messages[0].content }}", messages) == "a\nb"


@pytest.mark.parametrize("name", ["chatml", "llama-2", "generation"])
@pytest.mark.parametrize("last", ["The answer is", "It is ", " so\n"])
def test_the_last_message_can_be_continued(name: str, last: str) -> None:
    messages = [*CHATS[0], {"role": "assistant", "content": last}]
    wanted = expected(TEMPLATES[name], messages, add_generation_prompt=False, continue_final_message=True)
    found = rendered(TEMPLATES[name], messages, add_generation_prompt=False, continue_final_message=True)
    assert found == wanted


def test_what_cannot_be_continued_is_refused() -> None:
    def refused(source: str, message: dict[str, Any], **options: Any) -> None:
        options = {"add_generation_prompt": False, "continue_final_message": True, **options}
        with raises(RequestError, "continue_final_message"):
            rendered(source, [message], **options)

    refused(TEMPLATES["chatml"], {"role": "user", "content": "x"}, add_generation_prompt=True)
    refused("{{ messages | length }}", {"role": "user", "content": "x"})
    refused(TEMPLATES["chatml"], {"role": "assistant", "content": None, "tool_calls": [CALL]})


def test_variables_cannot_be_what_a_field_says() -> None:
    with raises(RequestError, "'messages'"):
        rendered("", CHATS[0], variables={"messages": []})


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a long string": "{{ 'a' * 10 ** 11 }}",
    "a large number": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set x = 'aaaaaaaaaaaaaaaa' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "nesting": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "a wide number": "{{ '%1000000000000d' % 1 }}{{ '{:>9999999999}'.format(1) }}",
    "filters": "{{ 'a' | center(10 ** 12) }}",
    "replacement": "{{ ('a' * 100000) | replace('a', 'b' * 100000) | length }}",
    "one filter for each": "{{ range(99999) | map('string') | map('center', 99999) | join | length }}",
    "much text": "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaa' * 9999 }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(99999999) }}",
    "deep source": "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_does_not_end_is_ended(name: str) -> None:
    with pytest.raises(TemplateError):
        rendered(HOSTILE[name], CHATS[0])
    assert rendered("{{ 'next' }}", CHATS[0]) == "next"


def test_a_template_reads_no_files() -> None:
    """The process that runs templates could not, whatever its sandbox let through."""
    assert rendered("{{ 1 }}", CHATS[0]) == "1"
    found = running(sandbox.__file__)
    assert found
    for pid in found:
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max open files +0 +0 ", limits) and re.search(r"Max file size +0 +0 ", limits)


def test_many_threads_may_render() -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda index: rendered(f"{{{{ {index} }}}}", CHATS[0]), range(64)))
    assert texts == [str(index) for index in range(64)]


def test_a_template_cannot_change_what_it_is_given() -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    source = "{% set messages = 3 %}{% for m in [1] %}{{ m }}{% endfor %}"
    assert rendered(source, messages) == "1"
    assert messages == [{"role": "user", "content": "hi"}]


def test_templates_of_a_gguf_file_by_name() -> None:
    key = "tokenizer.chat_template"
    assert chat_templates({key: "a", f"{key}.tool_use": "b", f"{key}s": ["tool_use"]}) == {
        "default": "a", "tool_use": "b",
    }  # fmt: skip
    assert chat_templates({key: "a"}) == "a"
    assert chat_templates({}) is None
