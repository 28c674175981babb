"""Answers: whole streams, right counts, nobody else's text, the same text again, errors that programs can read."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from amalgam.base.counting import counted
from amalgam.tools.check.asking import Reply, Response, text_of
from amalgam.tools.check.contract import Finding, check, failed, passed, skipped, warned
from amalgam.tools.check.failures import CannotTellError
from amalgam.tools.check.metrics import gauge_of_running
from amalgam.tools.check.process import cpu_seconds
from amalgam.tools.check.target import Target
from amalgam.tools.check.thresholds import Thresholds

_PROMPT = "Tell me of the sea, the wind and the ships."
_NUM_TOKENS = 24
_BUFFERED_SHARE, _BUFFERED_SECONDS = 0.05, 0.5  # all text in this last part of an answer that took at least so long
_LOOK_SECONDS, _IDLE_SHARE = 0.5, 0.3  # of a process: for how long, and below how much of a core it is idle
_TOPICS = ("rivers", "music", "iron", "winter", "bread", "stars", "horses", "letters", "gardens", "clocks")
# Control tokens of the families that are served most.
_SPECIAL = (
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "</s>", "<end_of_turn>",
    "<eos>",
)  # fmt: skip
_LEAKS = ("Traceback (most recent call last)", 'File "/', "site-packages")


@check(
    "answers.stream",
    "A stream is whole",
    why="Clients read events one by one; a cut or a buffered stream looks like a server that hangs.",
    remedy="Send one JSON object in each `data:` line, end with [DONE]; switch off buffering in proxies in front.",
    requests=2,
)
async def stream(target: Target) -> Finding:
    whole = await target.ask(_PROMPT, _NUM_TOKENS)
    reply = await target.stream(_PROMPT, _NUM_TOKENS)
    if problems := list(_stream_problems(reply)):
        return failed("; ".join(problems))
    texts = [now for now, event in reply.events if any(map(text_of, event.get("choices") or ()))]
    seen = f"{counted(len(reply.events), 'event')}, [DONE], finish_reason {reply.finish_reason}"
    new_tokens = reply.num_new_tokens or whole.num_new_tokens or 0
    if len(texts) < 2 and new_tokens >= 8:
        return failed(f"{new_tokens} tokens came in {len(texts)} event: it is no stream")
    took = reply.response.seconds
    if texts and took > _BUFFERED_SECONDS and texts[-1] - texts[0] < _BUFFERED_SHARE * took and new_tokens >= 8:
        return warned(f"{seen}; all text came at the end of {took:.1f} s: something holds the stream back")
    if reply.text != whole.text:
        return warned(
            f"{seen}; the text is another one than without a stream",
            remedy="See answers.determinism; if that passes, streaming loses or adds text.",
        )
    return passed(f"{seen}, the same text as without a stream", figures={"events": len(reply.events)})


def _stream_problems(reply: Reply) -> list[str]:
    found = []
    if not reply.is_stream:
        return [f"the content type is {reply.response.headers.get('content-type', 'missing')!r}, not text/event-stream"]
    if any(not isinstance(event, dict) for _, event in reply.events):
        found.append("an event is no JSON object")
        return found
    if not reply.has_done:
        found.append("there is no [DONE] at its end")
    if len(reply.finish_reasons) != 1:
        found.append(f"{len(reply.finish_reasons)} events have a finish_reason, not one")
    if len({event.get("id") for _, event in reply.events if event.get("choices")}) > 1:
        found.append("its events have different ids")
    if any("error" in event for _, event in reply.events):
        found.append("it has an error")
    return found


@check(
    "answers.usage",
    "Token counts are right",
    why="Bills, limits and budgets are made of usage.",
    remedy="Count the tokens that went in and came out; a stream's usage is that of the same answer without.",
    requests=5,
)
async def usage(target: Target) -> Finding:
    short, again = await target.ask(_PROMPT, _NUM_TOKENS), await target.stream(_PROMPT, _NUM_TOKENS)
    long = await target.ask(f"{_PROMPT} {_PROMPT} {_PROMPT}", 4)
    if not short.usage:
        return failed("An answer has no usage.")
    problems = list(_usage_problems(short, _NUM_TOKENS)) + list(_usage_problems(long, 4))
    if again.usage:
        problems += _usage_problems(again, _NUM_TOKENS)
        problems += [
            f"{name} is {short.usage.get(name)}, streamed {again.usage.get(name)}"
            for name in ("prompt_tokens", "completion_tokens")
            if short.usage.get(name) != again.usage.get(name) and (name == "prompt_tokens" or short.text == again.text)
        ]
    before, after = short.num_prompt_tokens or 0, long.num_prompt_tokens or 0
    if after <= before:
        problems.append(f"a prompt three times as long has {after} tokens, the short one {before}")
    if counted := await _counted_by_logprobs(target):
        problems.append(counted)
    if problems:
        return failed("; ".join(dict.fromkeys(problems)))
    seen = f"{before} + {short.num_new_tokens} tokens, the same streamed" if again.usage else f"{before} tokens"
    if not again.usage:
        return warned(f"{seen}, but a stream has no usage", remedy="Honour stream_options.include_usage.")
    return passed(seen)


def _usage_problems(reply: Reply, asked: int) -> list[str]:
    new, prompt, total = reply.num_new_tokens, reply.num_prompt_tokens, reply.usage.get("total_tokens")
    if new is None or prompt is None:
        return ["usage has no completion_tokens or no prompt_tokens"]
    found = []
    if total is not None and total != new + prompt:
        found.append(f"total_tokens is {total}, and {prompt} + {new} are its parts")
    if new > asked:
        found.append(f"completion_tokens is {new} where max_tokens was {asked}")
    if reply.finish_reason == "length" and new != asked and new + prompt > asked:
        found.append(f"finish_reason is length after {new} tokens of {asked}")
    if not prompt:
        found.append("prompt_tokens is 0")
    if reply.text and not new:
        found.append("completion_tokens is 0 of an answer with text")
    return found


async def _counted_by_logprobs(target: Target) -> str:
    """What is wrong with the count, where the server gives a log-probability for each token."""
    fields: dict[str, Any] = {"logprobs": True} if target.is_chat else {"logprobs": 1}
    reply = await target.try_asking(_PROMPT, _NUM_TOKENS, **fields)
    if reply.response.status != 200 or not reply.choices:
        return ""
    given = reply.choices[0].get("logprobs")
    if not isinstance(given, Mapping):
        return ""
    items = given.get("content") if target.is_chat else given.get("tokens")
    # A token that ends the answer counts in some servers, and has no log-probability.
    if not isinstance(items, list) or not items or reply.num_new_tokens in (len(items), len(items) + 1):
        return ""
    return f"completion_tokens is {reply.num_new_tokens}, and {len(items)} tokens have a log-probability"


@check(
    "answers.determinism",
    "The same question, the same answer",
    why="An answer that cannot be had again cannot be looked into.",
    remedy="Temperature 0 has to choose the likeliest token; `seed` has to seed the sampler of its request alone.",
    requests=5,
)
async def determinism(target: Target) -> Finding:
    greedy = [(await target.ask(_PROMPT, _NUM_TOKENS)).text for _ in range(3)]
    seeded = [(await target.ask(_PROMPT, _NUM_TOKENS, temperature=1.0, seed=7)).text for _ in range(2)]
    problems = []
    if len(set(greedy)) > 1:
        problems.append(f"temperature 0 gave {len(set(greedy))} answers in 3 tries")
    if len(set(seeded)) > 1:
        problems.append("seed 7 gave 2 answers in 2 tries")
    if problems:
        return warned("; ".join(problems))
    return passed("temperature 0 three times and a seed twice: the same text each")


@check(
    "answers.isolation",
    "Answers do not mix",
    why="Text of one user in the answer to another is the worst that a server can do.",
    remedy="Take the server out of service; look at how its batches and caches tell requests apart.",
    requests=lambda thresholds: 3 * _num_prompts(thresholds) + 2,
)
async def isolation(target: Target) -> Finding:
    count = _num_prompts(target.thresholds)
    codes = [secrets.token_hex(4) for _ in range(count)]
    questions = [f"Code {code}. Write about {_TOPICS[i % len(_TOPICS)]}." for i, code in enumerate(codes)]
    fields = await _telling_fields(target, questions)
    alone = [await target.ask(text, _NUM_TOKENS, **more) for text, more in zip(questions, fields, strict=True)]
    texts = [reply.text for reply in alone]
    changed, ids = 0, [reply.id for reply in alone]
    for _ in range(2):
        asking = (target.ask(text, _NUM_TOKENS, **more) for text, more in zip(questions, fields, strict=True))
        together = await asyncio.gather(*asking)
        ids += [reply.id for reply in together]
        for index, reply in enumerate(together):
            if whose := _owner(reply.text, index, codes, texts):
                return failed(f"Answer {index} of {count} at a time {whose}")
            changed += reply.text != texts[index]
    if any(ids) and (twice := [id for id, times in Counter(ids).items() if times > 1]):
        return failed(f"{len(twice)} ids belong to several answers, such as {twice[0]!r}")
    if len(set(texts)) < count:
        raise CannotTellError(
            f"{len(set(texts))} different answers to {count} prompts: a mixture of them could not be seen. None has "
            "the code of another prompt."
        )
    seen = f"{2 * count} answers, {count} at a time: none is another's"
    if changed:
        return warned(
            f"{seen}; {changed} are not what they are alone",
            remedy="In most engines rounding depends on who shares a step; if answers are to be reproducible, "
            "choose batch-invariant kernels.",
        )
    return passed(f"{seen}, each as it is alone")


async def _telling_fields(target: Target, questions: Sequence[str]) -> list[dict[str, Any]]:
    """What makes answers differ most: sampling by a seed for each, where a seed gives the same again."""
    seeded: dict[str, Any] = {"temperature": 1.0, "seed": 1000}
    first, again = [await target.ask(questions[0], _NUM_TOKENS, **seeded) for _ in range(2)]
    if first.text != again.text:
        return [{} for _ in questions]
    return [{"temperature": 1.0, "seed": 1000 + index} for index in range(len(questions))]


def _owner(text: str, index: int, codes: Sequence[str], texts: Sequence[str]) -> str:
    """Which other prompt an answer belongs to; empty: none."""
    for other, (code, alone) in enumerate(zip(codes, texts, strict=True)):
        if code != codes[index] and code in text:
            return f"has the code of prompt {other}"
        if text and text == alone and text != texts[index]:
            return f"is that of prompt {other}"
    return ""


def _num_prompts(thresholds: Thresholds) -> int:
    return min(8, max(3, thresholds.performance.clients))


@check(
    "answers.special_tokens",
    "Control tokens in messages stay text",
    why="Whoever can write a control token can end his turn and speak as the system; documents bring in such text too.",
    remedy="Tokenize what users write without special tokens, and put the template's around it.",
    requests=2 * len(_SPECIAL) + 1,
)
async def special_tokens(target: Target) -> Finding:
    if not target.is_chat:
        return skipped("The server has no chat: a completion's prompt is the whole text, control tokens included.")

    async def count(text: str) -> int:
        number = (await target.ask(f"a {text} b" if text else "a b", 1)).num_prompt_tokens
        if number is None:
            raise CannotTellError("Usage does not say how many tokens a prompt has.")
        return number

    bare, obeyed = await count(""), []
    for token in _SPECIAL:
        # One letter changed: no control token of anybody, and as long.
        letter = next(index for index in range(len(token) - 1, -1, -1) if token[index].isalpha())
        other = token[:letter] + ("q" if token[letter] != "q" else "x") + token[letter + 1 :]
        as_token, as_text = await count(token) - bare, await count(other) - bare
        if 1 <= as_token <= 2 and as_text >= as_token + 2:
            obeyed.append(token)
    if obeyed:
        return failed(f"taken for control tokens: {', '.join(obeyed)}", figures={"tokens": obeyed})
    return passed(f"{len(_SPECIAL)} control tokens of common families are text")


@check(
    "answers.cancellation",
    "Who leaves makes room",
    why="Users close their pages; a server that goes on computing for nobody is slow for all others.",
    remedy="Watch for the client's end of the connection, also behind proxies, and drop its request.",
    requests=12,
)
async def cancellation(target: Target) -> Finding:
    gauge = await gauge_of_running(target)
    process = None if gauge is not None else target.process
    if gauge is None and process is None:
        return skipped(
            "Neither do metrics say how many requests are under way, nor is the server's process on this machine."
        )
    body = target.body("Count from one to a thousand.", _long_answer(target), stream=True)
    for _ in range(2):
        response = await target.post(target.path, body, leave_after=1)
        if response.status != 200:
            raise CannotTellError(f"A long answer is refused ({response.said}).")
    limit, left = target.thresholds.cancel_seconds, time.monotonic()
    if gauge is not None:

        async def is_free() -> bool:
            now = await gauge_of_running(target)
            return now is not None and now <= gauge

        if await target.until(is_free, limit, 0.25):
            return passed(f"2 clients left, and the metrics' requests under way are {gauge:g} again", f"≤ {limit:g} s")
        return failed("2 clients have left, and their requests are still under way", f"≤ {limit:g} s")
    assert process is not None

    async def is_idle() -> bool:
        before, started = cpu_seconds(process), time.monotonic()
        await asyncio.sleep(_LOOK_SECONDS)
        return cpu_seconds(process) - before < _IDLE_SHARE * (time.monotonic() - started)

    if await target.until(is_idle, limit, 0.0):
        seconds = time.monotonic() - left
        return passed(f"2 clients left, and process {process} was idle {seconds:.1f} s later", f"≤ {limit:g} s")
    return failed(f"2 clients have left, and process {process} still computes", f"≤ {limit:g} s")


def _long_answer(target: Target) -> int:
    return 1024 if target.max_tokens is None else max(16, min(1024, target.max_tokens // 2))


@check(
    "answers.errors",
    "What is wrong is refused, and said in JSON",
    why="Clients retry a 5xx and show a 4xx; an error page or a stack trace helps nobody but attackers.",
    remedy='Answer 4xx with {"error": {"message": …, "type": …}}; never with a stack trace.',
    requests=9,
)
async def errors(target: Target) -> Finding:
    good = target.body("Hello", 1)
    field = "messages" if target.is_chat else "prompt"
    without = {key: value for key, value in good.items() if key != field}
    cases: dict[str, dict[str, Any] | bytes] = {
        "no JSON": b'{"model": ',
        "a list": b"[1, 2]",
        f"no {field}": without,
        f"{field} that is a number": {**good, field: 7},
        "max_tokens that is text": {**good, "max_tokens": "many"},
        "10,000 nested lists": b'{"' + field.encode() + b'": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        "bytes that are not UTF-8": b'{"' + field.encode() + b'": "\xff\xfe"}',
    }
    broken: list[str] = []
    formless: list[str] = []
    for name, body in cases.items():
        response = await target.post(target.path, body)
        _judge(name, response, broken, formless)
    _judge("an unknown path", await target.get("/v1/no-such-path"), broken, formless, needs_form=False)
    _judge("a wrong method", await target.get(target.path), broken, formless, needs_form=False)
    if broken:
        return failed("; ".join(broken), "4xx")
    if formless:
        return warned(f"refused without an error object: {', '.join(formless)}", '{"error": {"message": …}}')
    return passed(f"{len(cases) + 2} wrong requests were refused, with an error object each", "4xx")


def _judge(name: str, response: Response, broken: list[str], formless: list[str], *, needs_form: bool = True) -> None:
    if any(leak in response.text for leak in _LEAKS):
        broken.append(f"{name}: the answer has a stack trace")
    elif not response.is_refusal:
        broken.append(f"{name}: {response.said}")
    elif needs_form:
        error = response.json.get("error") if isinstance(response.json, dict) else None
        if not (isinstance(error, dict) and error.get("message")):
            formless.append(name)
