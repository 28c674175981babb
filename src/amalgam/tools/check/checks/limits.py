"""What is too much: prompts, answers, bodies, requests a minute."""

from __future__ import annotations

import asyncio
import time

from amalgam.base.counting import counted
from amalgam.tools.check.asking import Reply, Response
from amalgam.tools.check.contract import LATE, Finding, check, failed, passed, warned
from amalgam.tools.check.target import Target

_UNKNOWN_LENGTH = 100_000
_CROWD = 8  # requests at a time, where a limit of the rate is looked for
_OVERLOADED = 503


@check(
    "limits.prompt",
    "A prompt that is too long",
    why="One user's prompt must not end the process, take all the memory, or be cut without a word.",
    remedy="Refuse what does not fit the context with 400 or 413, and say how long it was.",
    requests=2,
)
async def prompt(target: Target) -> Finding:
    count = target.thresholds.limits.prompt_tokens or 2 * (target.max_tokens or _UNKNOWN_LENGTH // 2)
    # A word of this text has at least a token in every vocabulary, so that there are at least so many.
    text = " ".join(str(number % 10) for number in range(count))
    response = await target.post(target.path, target.body(text, 1))
    sent = f"{count:,} words"
    if fault := _fault(response):
        return failed(f"{sent}: {fault}", "4xx")
    if response.is_refusal:
        return await _if_alive(target, passed(f"{sent}: {response.said}", "4xx"))
    read = Reply(response).num_prompt_tokens
    if read is not None and read < count:
        return failed(f"{sent} were cut to {read:,} tokens without a word", "4xx")
    if target.max_tokens is not None:
        return failed(f"{sent} were answered, though the server says that it takes {target.max_tokens:,}", "4xx")
    return warned(
        f"{sent} were answered in {response.seconds:.1f} s",
        "4xx",
        remedy="Raise limits.prompt_tokens above its length.",
    )


@check(
    "limits.max_tokens",
    "An answer that is too long",
    why="A request for endless text must not hold its place for ever, nor fail in the middle.",
    remedy="Refuse a max_tokens beyond the context with 4xx, or end the answer there.",
    requests=3,
)
async def max_tokens(target: Target) -> Finding:
    limit = target.thresholds.limits.max_tokens
    for wrong in (-5, 0):
        response = await target.post(target.path, target.body("Hello", wrong))
        if fault := _fault(response):
            return failed(f"max_tokens {wrong}: {fault}", "4xx")
    body = target.body("Hello", limit, stream=True)
    response = await target.post(target.path, body, leave_after=2)
    sent = f"max_tokens {limit:,}"
    if fault := _fault(response):
        return failed(f"{sent}: {fault}", "4xx")
    if response.is_refusal:
        return passed(f"{sent}: {response.said}", "4xx")
    if target.max_tokens is not None:
        return passed(f"{sent} is taken; the context of {target.max_tokens:,} tokens ends the answer", "4xx, or an end")
    return warned(f"{sent} is taken, and the server says of no length that ends the answer", "4xx, or an end")


@check(
    "limits.body",
    "A body that is too large",
    why="Bodies are read into memory before anybody looks at them.",
    remedy="Limit the size of a body (server.max_body_bytes, client_max_body_size) and refuse more with 413.",
    requests=2,
)
async def body(target: Target) -> Finding:
    size = target.thresholds.limits.body_bytes
    content = target.body("Hello", 1, user="x" * size)
    response = await target.post(target.path, content)
    sent = f"{size / 2**20:.0f} MiB"
    if response.error_kind == "timeout" or response.status >= 500:
        return failed(f"{sent}: {response.said}", "413")
    if response.status == 200:
        return warned(f"{sent} were read and answered", "413")
    seen = response.said if response.status else "the connection was closed before all of it was read"
    return await _if_alive(target, passed(f"{sent}: {seen}", "413"))


def _fault(response: Response) -> str:
    """Why an answer is none that a client can make sense of; empty if it is."""
    return "" if response.status and response.status < 500 and not response.error_kind else response.said


async def _if_alive(target: Target, finding: Finding) -> Finding:
    after = await target.get("/v1/models")
    if after.status in (200, 429):
        return finding
    return failed(f"{finding.value}; then the server did not answer any more ({after.said})", finding.threshold)


@check(
    "limits.rate",
    "Requests a minute",
    why="One client must not take the machine from all others.",
    remedy="Limit requests and tokens per key (server.requests_per_minute, tokens_per_minute) here or in a gateway.",
    requests=lambda thresholds: thresholds.limits.rate_requests,
    order=LATE,
)
async def rate(target: Target) -> Finding:
    wanted = target.thresholds.limits
    started, sent, answers = time.monotonic(), 0, list[Response]()

    def is_seen() -> bool:
        return any(response.status == 429 for response in answers)

    async def client() -> None:
        nonlocal sent
        while sent < wanted.rate_requests and time.monotonic() - started < wanted.rate_seconds and not is_seen():
            sent += 1
            answers.append(await target.post(target.path, target.body("Hello", 1)))

    first = await target.post(target.path, target.body("Hello", 1))
    if told := sorted(name for name in first.headers if "ratelimit" in name and "limit" in name.split("-")):
        return passed("; ".join(f"{name}: {first.headers[name]}" for name in told))
    answers.append(first)
    async with asyncio.TaskGroup() as group:
        for _ in range(_CROWD):
            group.create_task(client())
    refused = [response for response in answers if response.status == 429]
    if refused:
        if "retry-after" in refused[0].headers:
            return passed(
                f"429 with Retry-After after {counted(len(answers) - len(refused), 'request')}", "429, Retry-After"
            )
        return warned(
            f"429 after {counted(len(answers) - len(refused), 'request')}, but no Retry-After", "429, Retry-After",
            remedy="Say in Retry-After when the next request will be taken.",
        )  # fmt: skip
    if bad := [response for response in answers if response.status != 200]:
        if all(response.status == _OVERLOADED for response in bad):
            return warned(f"no limit per client; {len(bad)} of {len(answers)} were refused as too many at once (503)")
        return failed(f"{len(bad)} of {len(answers)} requests: {bad[0].said}", "429, Retry-After")
    seconds = time.monotonic() - started
    return warned(
        f"none within {counted(len(answers), 'request')} in {seconds:.0f} s, nor a header", "429, Retry-After"
    )


@check(
    "limits.recovery",
    "The server is as it was",
    why="What wrong and large requests leave behind shows in the next right one.",
    remedy="The server's log has what happened; limit what one request can take.",
    requests=2,
    order=LATE - 1,
)
async def recovery(target: Target) -> Finding:
    reply = await target.try_asking("Hello", 4)
    if reply.response.status != 200 or not reply.text:
        return failed(f"after all these checks a plain request: {reply.response.said}")
    if reply.response.seconds > target.thresholds.timeout_seconds / 2:
        return failed(f"after all these checks 4 tokens took {reply.response.seconds:.1f} s")
    if target.kept.get("health_path"):
        health = await target.get(target.kept["health_path"], key="")
        if health.status != 200:
            return failed(f"after all these checks {target.kept['health_path']}: {health.said}")
    return passed("after all these checks it answers, and says that it is well")
