"""The filters of one server: what becomes of prompts, of pieces of answers, of lines of the log; and counts.

In: rules; texts. Out: those that have passed. Must never know: HTTP, the engine, the shape of any interface.

Built-in rules look at a text where they are asked, at a long one in turns in a thread, and hooks in threads of their
own, for a bounded time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from amalgam.config.filters import FiltersSettings
from amalgam.server.encoding import Encoder, Prompt, TextPrompt, naming
from amalgam.server.interface import Tokenizer
from amalgam.text.filters.contract import ContentFilteredError, FilterFailedError, Finding, Hook, Where
from amalgam.text.filters.passing import Found, Look, Passed, TextFilter
from amalgam.text.filters.rules import Rule, make_rules

_PIECE_CHARS = 4096  # of a text, looked at in one turn of a thread
_SHORT_CHARS = 256  # take less time than a thread does
_KEYWORDS = {"role", "type"}  # of messages: words of the interface
_NAMES = {"id", "tool_call_id", "name"}  # what others refer to: it may be blocked, but not replaced
_FAILED = "failed"
_PLACES: tuple[Where, ...] = ("prompts", "answers", "logs")

FilterCount = tuple[str, Where, str]  # a rule, a kind of text, what was done

logger = logging.getLogger("amalgam.server")


class RefusedPrompt(list[int]):
    """The tokens of a prompt that a filter has blocked, none; and what is answered in place of the model."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer


class Example(NamedTuple):
    """What the filters make of a whole text."""

    text: str
    found: tuple[Found, ...]
    blocked_by: Rule | None


class Filters:
    """The rules of one server, and what they have found.

    Args:
        encoder: whose turns long texts are looked at in.

    Attributes:
        counts: by rule, kind of text, and what was done: an action, or `failed` for a hook. Changed by the event loop
            only.

    Raises:
        ConfigError: a rule cannot be used.
    """

    def __init__(self, settings: FiltersSettings, encoder: Encoder) -> None:
        self.settings = settings
        self._encoder = encoder
        self.rules = make_rules(settings)
        self.counts: Counter[FilterCount] = Counter(
            {(rule.name, where, self.action(rule, where)): 0 for rule in self.rules for where in sorted(rule.where)}
        )
        self._by_place = {where: [rule for rule in self.rules if where in rule.where] for where in _PLACES}
        # A line of the log is always written: what would block an answer is taken out of it.
        self._by_place["logs"] = [_redacting(rule) for rule in self._by_place["logs"]]
        # A call that hangs keeps its turn until it ends, so that no more than these hang.
        self._turns = {rule.name: Encoder(settings.hook_threads).turn for rule in self.rules if rule.hook is not None}
        self._shown_tokens: dict[int, bool] = {}

    def action(self, rule: Rule, where: Where) -> str:
        """What is done about something found."""
        return "redact" if where == "logs" and rule.action == "block" else rule.action

    def looks_at(self, where: Where) -> bool:
        return bool(self._by_place[where])

    def passing(self, where: Where, context: str = "") -> TextFilter:
        """For one text."""
        return TextFilter(self._by_place[where], context)

    async def look(self, passing: TextFilter, where: Where) -> None:
        """Show hooks what they are to look at by now.

        Raises:
            FilterFailedError: one has failed.
        """
        for look in passing.looks():
            try:
                passing.take(look, await self._call(look, where))
            except FilterFailedError:
                self.counts[look.rule.name, where, _FAILED] += 1
                raise

    def released(self, passing: TextFilter, where: Where) -> Passed:
        """What has passed by now, counted."""
        passed = passing.release()
        if passed.found or passed.blocked_by is not None:
            self._count(passed, where)
        return passed

    def _count(self, passed: Passed, where: Where) -> None:
        for found in passed.found:
            self.counts[found.rule.name, where, found.rule.action] += 1
        if passed.blocked_by is not None:
            self.counts[passed.blocked_by.name, where, passed.blocked_by.action] += 1

    async def _call(self, look: Look, where: Where) -> Sequence[Finding]:
        """Fails closed: a hook that raises or does not come back lets nothing pass."""
        name, hook = look.rule.name, look.rule.hook
        assert hook is not None
        try:
            async with asyncio.timeout(self.settings.hook_seconds):
                return await self._turns[name](lambda: _findings(hook, look.text, where))
        except TimeoutError:
            what = f"has taken longer than filters.hook_seconds, {self.settings.hook_seconds:g}"
        except _HookError as error:
            what = f"has failed ({error.kind})"
        logger.error("filter %s %s", name, what)
        raise FilterFailedError(
            f"The filter {name!r} {what}.", remedy="Nothing passes without it: see to its hook, or take the rule out."
        )

    async def check(self, text: str, where: Where, *, is_counted: bool = True) -> Example:
        """What becomes of a whole text.

        Raises:
            FilterFailedError: a hook has failed.
        """
        passing = self.passing(where)
        if len(text) <= _SHORT_CHARS:
            passing.push(text)
            await asyncio.sleep(0)  # there may be many of them
        else:
            for start in range(0, len(text), _PIECE_CHARS):
                await self._encoder.turn(partial(passing.push, text[start : start + _PIECE_CHARS]))
        passing.end()
        await self.look(passing, where)
        passed = self.released(passing, where) if is_counted else passing.release()
        return Example(passed.text, passed.found, passed.blocked_by)

    async def text(self, text: str, name: str) -> str:
        """A prompt, or a part of one, as it may be computed.

        Raises:
            ContentFilteredError: it is blocked.
            FilterFailedError: a hook has failed.
        """
        return self._unless_blocked(await self.check(text, "prompts"), name).text

    async def masked(self, text: str) -> str:
        """What may stand of a text in the log."""
        return (await self.check(text, "logs")).text if self._by_place["logs"] else text

    async def prompts(self, prompts: Sequence[Prompt], name: str, *, is_answered: bool) -> list[Prompt | RefusedPrompt]:
        """Prompts as they may be computed.

        Args:
            name: of the field that they stand in.
            is_answered: whether a refusal can be an answer.

        Raises:
            ContentFilteredError, FilterFailedError: see `text`.
        """
        if not self._by_place["prompts"]:
            return list(prompts)
        passed: list[Prompt | RefusedPrompt] = []
        for index, prompt in enumerate(prompts):
            with naming(name, index, len(prompts)):
                try:
                    passed.append(await self._prompt(prompt, name))
                except ContentFilteredError as error:
                    passed.append(self._refusal(error, is_answered=is_answered))
        return passed

    async def token_ids(
        self, tokenizer: Tokenizer, prompt_ids: list[int], name: str, *, is_answered: bool
    ) -> list[int]:
        """A prompt that came as tokens. Its text can be blocked; with a part of it replaced it would be another one.

        Raises:
            ContentFilteredError: something in it may not pass.
        """
        if not self._by_place["prompts"]:
            return prompt_ids
        text = await self._encoder.turn(lambda: tokenizer.decode(prompt_ids))
        example = await self.check(text, "prompts")
        try:
            self._unless_blocked(example, name)
        except ContentFilteredError as error:
            return self._refusal(error, is_answered=is_answered)
        if example.found:
            names = ", ".join(sorted({found.rule.name for found in example.found}))
            raise ContentFilteredError(
                f"{name} is given as tokens, and filters ({names}) would replace some of its text.",
                remedy="Give it as text.",
                param=name,
            )
        return prompt_ids

    def _unless_blocked(self, example: Example, name: str) -> Example:
        """
        Raises:
            ContentFilteredError: it is blocked.
        """
        if example.blocked_by is not None:
            raise ContentFilteredError(
                f"The filter {example.blocked_by.name!r} blocks {name}.",
                remedy="Leave out what it is about.",
                param=name,
            )
        return example

    def _refusal(self, error: ContentFilteredError, *, is_answered: bool) -> RefusedPrompt:
        """What is answered to a prompt that is blocked; `error` is raised if nothing can be."""
        if not is_answered or self.settings.blocked_prompt == "error":
            raise error
        return RefusedPrompt(self.settings.refusal)

    async def _prompt(self, prompt: Prompt, name: str) -> Prompt:
        async def text(value: str) -> str:
            return await self.text(value, name)

        if isinstance(prompt, str):
            return await text(prompt)
        if isinstance(prompt, TextPrompt):
            return replace(prompt, text=await text(prompt.text))
        return replace(
            prompt,
            messages=await _mapped(prompt.messages, text),
            tools=await _mapped(prompt.tools, text, only={"description"}),
            documents=await _mapped(prompt.documents, text),
            variables=await _mapped(prompt.variables, text),
        )  # fmt: skip

    def shows(self, tokenizer: Tokenizer, token_id: int) -> bool:
        """Whether a token may be named among the likeliest ones: its own text holds nothing that is found."""
        is_shown = self._shown_tokens.get(token_id)
        if is_shown is None:
            passing = self.passing("answers")
            passing.push(tokenizer.token_text(token_id))
            passing.end()
            passed = passing.release()
            is_shown = self._shown_tokens[token_id] = not passed.found and passed.blocked_by is None
        return is_shown


def _redacting(rule: Rule) -> Rule:
    return replace(rule, action="redact") if rule.action == "block" else rule


class _HookError(Exception):
    """What a hook has raised, by its kind only: its text may quote what it was given."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def _findings(hook: Hook, text: str, where: Where) -> list[Finding]:
    try:
        return list(hook.find(text, where))
    except BaseException as error:  # one that ends a thread must not end the event loop
        raise _HookError(type(error).__name__) from error


async def _mapped(
    value: Any, text: Callable[[str], Awaitable[str]], key: str = "", only: frozenset[str] | set[str] | None = None
) -> Any:
    """A value with every text in it as it may pass.

    Args:
        only: keys whose texts may be replaced; None: all but names.
    """
    if isinstance(value, str):
        if key in _KEYWORDS:
            return value
        passed = await text(value)
        return passed if (key in only if only is not None else key not in _NAMES) else value
    if isinstance(value, Mapping):
        return {name: await _mapped(item, text, name, only) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [await _mapped(item, text, key, only) for item in value]
    return value
