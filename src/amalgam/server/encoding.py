"""Prompts → token ids, without one request holding up the others.

In: texts and conversations. Out: token ids. Must never know: HTTP, the engine.

Work is done in turns of bounded size in daemon threads. A request asks for one turn after another, so that a short
prompt waits for a turn of each long one at most, a request whose client has left takes no further turn, and an exit
waits for none.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from amalgam.base.threads import StoppableThread
from amalgam.errors import RequestError, about
from amalgam.server.interface import Tokenizer
from amalgam.text.chat import ChatPrompt
from amalgam.text.pieces import PIECE_CHARS


@dataclass(frozen=True)
class TextPrompt:
    """A text, with or without the tokens that the tokenizer puts around every text."""

    text: str
    add_special_tokens: bool = True


Prompt = str | TextPrompt | ChatPrompt
T = TypeVar("T")

NUM_LONG_BODIES = 2  # parsed and not yet encoded; as text, one may take four times its bytes


class Place:
    """One of the few that a long body takes from its parsing until its prompts are encoded."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places = places
        self._is_taken = True

    def leave(self) -> None:
        """Harmless when repeated."""
        if self._is_taken:
            self._is_taken = False
            self._places.release()


_place: ContextVar[Place | None] = ContextVar("place", default=None)  # of the request that runs


class Encoder:
    """Encodes prompts, at most `num_threads` turns at a time."""

    def __init__(self, num_threads: int) -> None:
        self._turns = asyncio.Semaphore(num_threads)
        self._places = asyncio.Semaphore(NUM_LONG_BODIES)

    @contextlib.asynccontextmanager
    async def long_body(
        self, wait: Callable[[Coroutine[Any, Any, bool]], Coroutine[Any, Any, bool]]
    ) -> AsyncIterator[None]:
        """A place for the request that runs in the context, which `encode` leaves early.

        Args:
            wait: awaits until there is one.
        """
        await wait(self._places.acquire())
        place = Place(self._places)
        _place.set(place)
        try:
            yield
        finally:
            place.leave()

    async def encode(
        self, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_tokens: int, name: str = "prompts"
    ) -> list[list[int]]:
        """Token ids of each prompt. Cancelling the caller ends the work after the turn that is going on.

        Args:
            name: of the field that the prompts stand in.

        Raises:
            RequestError: a prompt cannot be encoded; with several, a note names it.
            PromptTooLongError: one has more than `max_tokens` tokens.
        """
        token_ids: list[list[int]] = []
        work = _encode(tokenizer, prompts, max_tokens, name, token_ids)
        try:
            while not await self.turn(lambda: _advance(work)):
                pass
        finally:
            if (place := _place.get()) is not None:
                place.leave()
        return token_ids

    async def refuse_too_long(
        self, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_tokens: int, name: str = "prompts"
    ) -> None:
        """Begin to encode long prompts: what cannot fit costs nothing else.

        Raises:
            PromptTooLongError, RequestError: see `encode`; of a prompt whose length says so.
        """
        for index, prompt in enumerate(prompts):
            num_chars = len(repr(prompt.messages)) if isinstance(prompt, ChatPrompt) else _num_chars(prompt)
            if num_chars > PIECE_CHARS:
                with naming(name, index, len(prompts)):
                    await self.turn(partial(next, _pieces(tokenizer, prompt, max_tokens), None))

    async def turn(self, call: Callable[[], T]) -> T:
        """Run a blocking call of bounded length in a thread when it has its turn."""
        await self._turns.acquire()
        loop = asyncio.get_running_loop()
        try:
            future = start_thread(call)
        except BaseException:  # no memory for a thread: the turn is the next one's
            self._turns.release()
            raise

        def release(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._turns.release)

        future.add_done_callback(release)  # not when the caller is cancelled: the thread works on
        return await asyncio.wrap_future(future)


@contextlib.contextmanager
def naming(name: str, index: int, num_prompts: int) -> Iterator[None]:
    """Errors are about the field, and say which one of several prompts.

    Args:
        name: of the field that they stand in.
    """
    try:
        with about(name):
            yield
    except RequestError as error:
        if num_prompts > 1:
            error.add_note(f"This is {name}[{index}]")
        raise


def start_thread(call: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Run a blocking call in a thread of its own: unlike a pool's, it takes no turn from others.

    It cannot be stopped; an exit waits a little for it, and then ends the process without it.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # from here on it cannot be cancelled, only abandoned

    def work() -> None:
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    StoppableThread(work, "amalgam-call", lambda: None).start()
    return future


def _encode(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], max_tokens: int, name: str, token_ids: list[list[int]]
) -> Iterator[int]:
    """Fill `token_ids`; yields after each piece of work how many characters it was, at most."""
    for index, prompt in enumerate(prompts):
        ids: list[int] = []
        with naming(name, index, len(prompts)):
            for piece in _pieces(tokenizer, prompt, max_tokens):
                ids += piece
                yield PIECE_CHARS if isinstance(prompt, ChatPrompt) else min(_num_chars(prompt), PIECE_CHARS)
        token_ids.append(ids)


def _num_chars(prompt: str | TextPrompt) -> int:
    return len(prompt if isinstance(prompt, str) else prompt.text)


def _pieces(tokenizer: Tokenizer, prompt: Prompt, max_tokens: int) -> Iterator[list[int]]:
    if isinstance(prompt, str):
        return tokenizer.encode_by_piece(prompt, max_tokens)
    if isinstance(prompt, TextPrompt):
        return tokenizer.encode_by_piece(prompt.text, max_tokens, add_special_tokens=prompt.add_special_tokens)
    return tokenizer.encode_chat_by_piece(
        prompt.messages,
        max_tokens,
        tools=prompt.tools,
        documents=prompt.documents,
        variables=prompt.variables,
        add_generation_prompt=prompt.add_generation_prompt,
        continue_final_message=prompt.continue_final_message,
    )


def _advance(work: Iterator[int]) -> bool:
    """One turn; whether the work is done."""
    num_chars = 0
    for done in work:
        num_chars += done
        if num_chars >= PIECE_CHARS:
            return False
    return True
