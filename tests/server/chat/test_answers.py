"""What the chat page makes of an answer: its text, its tools, the experts it used."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from tests.server.browser import Page
from tests.server.chat.saying import MARKDOWN, answers, prompt, say, wait_for_end
from tests.server.scripted import NUM_EXPERTS, NUM_LAYERS, TOP_K, Script, ScriptedModel, routed, routing

HOSTILE = r"""<script>window.hit = 1</script> <img src=x onerror="window.hit = 1"> <svg/onload=window.hit=1>
[a](javascript:window.hit=1) [b](JaVaScRiPt:window.hit=1) [c](java&#115;cript:window.hit=1) [d](data:text/html,x)
[e](<javascript:window.hit=1>) <javascript:window.hit=1> [f]( javascript:window.hit=1)
[g](vbscript:x) [h](//evil.example/x)
![i](javascript:window.hit=1) ![j](https://evil.example/pixel.png) [k](https://ok.example/"onmouseover="window.hit=1)
&lt;script&gt;window.hit = 1&lt;/script&gt; [l](file:///etc/passwd) [m](blob:x)
<iframe srcdoc="<script>window.hit=1</script>">

# <img src=x onerror=window.hit=1>

| <b onclick=window.hit=1>x</b> | [n](javascript:1) |
|--|--|
| `<i>` | <style>*{display:none}</style> |

```"><img src=x onerror=window.hit=1>
</code></pre><script>window.hit = 1</script>
```

- <details open ontoggle=window.hit=1>
> <math><mtext></form><form><mglyph><style></math><img src onerror=window.hit=1>
"""
READ_NPY = """
    const [text, done] = arguments;
    import(new URL("npy.js", document.querySelector("script[type=module]").src)).then(({readNpy}) => {
        const {shape, values} = readNpy(text);
        done([shape, [...values]]);
    });
"""
CODE = {
    "python": (
        'def f(x):  # a "comment"\n    return f"{x}" + 1.5e3',
        [("keyword", "def"), ("call", "f"), ("comment", '# a "comment"'), ("keyword", "return"), ("string", '"{x}"'),
         ("number", "1.5e3")],
    ),
    "json": ('{"a": [1, true, "b"]}', [("key", '"a"'), ("number", "1"), ("keyword", "true"), ("string", '"b"')]),
    "diff": ("+new\n-old\n same", [("added", "+new\n"), ("removed", "-old\n")]),
    "c": ("/* a\n*/ int n = 'x';", [("comment", "/* a\n*/"), ("keyword", "int"), ("string", "'x'")]),
    "sql": ("SELECT 1 -- all", [("keyword", "SELECT"), ("number", "1"), ("comment", "-- all")]),
    "unheard-of": ("if 1: 'a'", []),
}  # fmt: skip


def test_markdown(page: Page, model: ScriptedModel) -> None:
    model.scripts["md"] = [Script(re.findall(r"(?s).{1,7}", MARKDOWN))]
    say(page, "md")
    texts = "return [...document.querySelectorAll('.markdown ' + arguments[0])].map((node) => node.textContent)"
    assert page.run(texts, ".size-1") == ["One"]
    assert page.run(texts, "strong") == ["bold", "中文："]
    assert page.run(texts, "em") == ["emphasis"]
    assert page.run(texts, "del") == ["gone"]
    assert page.run(texts, "ul ul li") == ["b"]
    assert page.run(texts, "ol li") == ["x", "y"]
    assert page.run(texts, "th") == ["n", "m"]
    assert page.run(texts, "td") == ["1", "a|b"]
    assert page.run(texts, "blockquote") == ["quoted"]
    assert page.run(texts, "pre code") == ['def f():\n    return "<b>"']
    assert page.text(".code-language") == "python"
    assert page.run(texts, "p")[-1] == "中文：后文 $a_1 * b_1 * c$ and \\(x_1*y*z\\)"
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    page.click(".code .copy")
    page.wait("return document.querySelector('.code .copy').dataset.state === 'copied'")
    paste = "const done = arguments[0]; navigator.clipboard.readText().then(done)"
    assert page.driver.execute_async_script(paste) == 'def f():\n    return "<b>"'


def test_images_stay_text(page: Page, model: ScriptedModel) -> None:
    text = "![a *cat*](https://a.example/cat.png) [![badge](https://a.example/b.svg)](https://b.example/) ![no] (image)"
    model.scripts["images"] = [Script([text])]
    say(page, "images")
    assert answers(page) == [
        "![a *cat*](https://a.example/cat.png) ![badge](https://a.example/b.svg) ![no] (image)",
    ]
    links = "return [...document.querySelectorAll('.markdown a')].map((node) => node.href)"
    assert page.run(links) == ["https://b.example/"]


def test_code_is_shown_in_colours(page: Page, model: ScriptedModel) -> None:
    model.scripts["code"] = [Script([f"```{name}\n{text}\n```\n" for name, (text, _) in CODE.items()])]
    say(page, "code")
    found = page.run(
        """return [...document.querySelectorAll('.markdown pre code')].map((code) => [code.textContent,
            [...code.querySelectorAll('span')].map((one) => [one.className.replace('code-', ''), one.textContent])])"""
    )
    assert found == [[text, [list(piece) for piece in pieces]] for text, pieces in CODE.values()]


def test_nothing_a_model_writes_is_read_as_html(page: Page, model: ScriptedModel, url: str) -> None:
    hidden: list[dict[str, Any]] = [{"reasoning_content": HOSTILE}]
    hidden.append({"tool_calls": [tool_call(0, "c", HOSTILE, HOSTILE)]})
    model.scripts[HOSTILE.strip()] = [
        Script([HOSTILE[at : at + 9] for at in range(0, len(HOSTILE), 9)]),
        Script(hidden),
    ]
    page.run("document.querySelector('#prompt').value = arguments[0]", HOSTILE.strip())
    page.run("document.querySelector('#composer').requestSubmit()")
    wait_for_end(page)
    page.run("document.querySelector('.do-regenerate').click()")
    wait_for_end(page)
    page.run("document.querySelector('.assistant .do-branch_before').click()")
    found = page.run(
        """const thread = document.querySelector('#thread');
        const attributes = [...thread.querySelectorAll('*')].flatMap((node) => [...node.attributes]);
        return {
            hit: window.hit ?? null,
            tags: [...new Set([...thread.querySelectorAll('.markdown *')].map((node) => node.tagName))],
            handlers: attributes.filter(({name}) => name.startsWith('on') || name === 'srcdoc').length,
            protocols: [...new Set([...thread.querySelectorAll('.markdown a')].map((node) => node.protocol))],
            rel: [...new Set([...thread.querySelectorAll('.markdown a')].map((node) => node.rel))],
        }"""
    )
    assert found["hit"] is None
    assert not set(found["tags"]) & {"SCRIPT", "IMG", "IFRAME", "STYLE", "FORM", "MATH", "OBJECT", "EMBED", "DETAILS"}
    assert found["handlers"] == 0
    assert set(found["protocols"]) <= {"https:", "http:", "mailto:"}
    assert found["rel"] == ["noopener noreferrer"]
    assert page.strangers(url) == set()
    assert page.complaints == []


def test_a_hostile_answer_does_not_stop_the_page(page: Page, model: ScriptedModel) -> None:
    texts = [
        "[" * 50_000,
        "*a **b " * 4_000,
        "`a``b" * 5_000,
        ">" * 5_000,
        "\\(" * 20_000,
        "|a\n|-\n" * 5_000,
        "- " * 20_000,
    ]
    texts += [f"```js\n{text * 5_000}" for text in ('"\\', "`\\`", "/*#")]
    texts.append("\n".join("  " * depth + "- a" for depth in range(1_000)))
    for index, text in enumerate(texts):
        model.scripts[f"q{index}"] = [Script([text])]
        page.click("#new")  # what the page has to draw again is this text alone
        say(page, f"q{index}")
        assert page.count(".assistant .markdown > *") > 0


def tool_call(index: int, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_reasoning_and_tools(page: Page, model: ScriptedModel) -> None:
    pieces: list[dict[str, Any]] = [
        {"reasoning_content": "let me ", "reasoning": "let me "},
        {"reasoning": "look", "reasoning_content": "look"},
        {"tool_calls": [tool_call(0, "c1", "weather", "")]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
        {"tool_calls": [tool_call(1, "c2", "time", "{}")]},
    ]
    model.scripts["ask"] = [Script(pieces, finish="tool_calls")]
    model.scripts["20 °C"] = [Script(["It is ", "warm."])]
    page.click("#settings-open")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    page.driver.find_element("css selector", "#tools").send_keys(json.dumps(tools))
    say(page, "ask")
    assert model.requests[-1]["tools"] == tools
    assert page.text(".thoughts-text") == "let me look"
    assert not page.run("return document.querySelector('.thoughts').open")
    assert page.text(".call h3") == "Calls weather"
    assert json.loads(page.text(".call pre")) == {"city": "Paris"}
    first, second = page.driver.find_elements("css selector", ".call textarea")
    first.send_keys("noon")
    second.send_keys("20 °C")
    page.click(".do-results")
    page.wait("return document.querySelectorAll('.assistant').length === 2")
    wait_for_end(page)
    assert answers(page)[-1] == "It is warm."
    assert model.requests[-1]["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
                {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "noon", "tool_call_id": "c1"},
        {"role": "tool", "content": "20 °C", "tool_call_id": "c2"},
    ]


def test_experts_and_precisions_stand_beside_the_answer(page: Page, model: ScriptedModel) -> None:
    num_prompt, num_new = 12, 9
    model.scripts["go"] = [Script(list("abcdefghi"), num_prompt_tokens=num_prompt)]
    say(page, "go")
    trace = routed(num_prompt + num_new - 1)[num_prompt - 1 :]
    assert len(trace) == num_new
    used = sum(len(np.unique(trace[:, layer])) for layer in range(NUM_LAYERS))
    text = f"{used} of {NUM_LAYERS * NUM_EXPERTS} experts in {NUM_LAYERS} layers, {TOP_K} for each token"
    assert page.text(".use > p") == text
    page.click(".use-foot button")
    rows = page.run(
        """return [...document.querySelectorAll('dialog tbody tr')].map((row) => [
            row.cells[0].textContent,
            [...row.querySelectorAll('.expert')].map(({children: [, id, text]}) => [id.textContent, text.textContent]),
        ])"""
    )
    formats = ["bf16", "fp8", "int4"]
    for layer, (name, experts) in enumerate(rows):
        assert name == str(layer + 1)
        ids, counts = np.unique(trace[:, layer], return_counts=True)
        names = [formats[(layer + expert) % 3] for expert in ids.tolist()]
        expected = {
            (str(expert), f"{'int4 + bf16' if (layer, expert) == (0, 1) else name} ×{count}")
            for expert, count, name in zip(ids.tolist(), counts.tolist(), names, strict=True)
        }
        assert {(expert, text) for expert, text in experts} == expected
    assert len(rows) == NUM_LAYERS
    page.click("dialog .ghost")
    parts = page.run(
        "return [...document.querySelectorAll('.use .formats b')].map((node) => parseInt(node.textContent))"
    )
    assert sum(parts) == pytest.approx(100, abs=2)
    assert page.run("return document.querySelector('.use a').getAttribute('href')") == "dashboard#precision"

    shape, values = page.driver.execute_async_script(READ_NPY, routing(3))  # of several tokens, in their order
    assert np.array_equal(np.array(values).reshape(shape), routed(3))


def test_a_model_without_experts(page: Page, model: ScriptedModel, url: str) -> None:
    model.num_experts = 0
    page.open(url + "/")
    say(page, "hi")
    assert "routed_experts" not in model.requests[-1]
    assert page.text(".use h3") == "Precision of the weights"
    assert "bf16" in page.text(".use .formats")


def formats(page: Page, number: int) -> set[str]:
    """The formats beside one of the answers, counted from 0."""
    names: list[str] = page.run(
        """return [...document.querySelectorAll('.assistant')][arguments[0]].querySelectorAll('.formats span').values()
            .map((node) => node.textContent).toArray()""",
        number,
    )
    return set(names)


def test_precisions_are_those_of_the_weights_that_answered(page: Page, model: ScriptedModel, url: str) -> None:
    say(page, "hi")
    assert formats(page, 0) == {"bf16", "fp8", "int4", "int4 + bf16"}
    model.formats = {1: ("bf16",)}  # another process, whose first version is another one
    say(page, "after a restart")
    assert formats(page, 1) == {"bf16", "int4 + bf16"}
    assert formats(page, 0) == {"bf16", "fp8", "int4", "int4 + bf16"}

    model.formats[2] = ("fp8",)
    model.scripts["candidate"] = [Script(["a", "b"], weight_version=2)]
    say(page, "candidate")
    assert formats(page, 2) == {"fp8", "int4 + bf16"}
    model.scripts["replaced"] = [Script(["a", "b"], weight_version=3, is_held=True)]
    model.formats[3] = ("int4",)
    prompt(page).send_keys("replaced", Keys.ENTER)
    page.wait("return [...document.querySelectorAll('.markdown')].at(-1)?.textContent === 'a'")
    page.wait(lambda: 3 in model.asked)
    del model.formats[3]
    model.is_released.set()
    wait_for_end(page)
    assert formats(page, 3) == {"int4", "int4 + bf16"}

    model.counts_experts = False
    page.open(url + "/")
    say(page, "nothing is counted")
    assert answers(page) == ["You said: nothing is counted"]
    assert page.count(".use") == 0 and page.count(".problem") == 0
