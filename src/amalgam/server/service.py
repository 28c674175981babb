"""What the handlers share: the deployment once it is loaded, the server's status, and the work in flight.

In: a callable that opens a deployment, run in a thread of its own so that the server answers meanwhile.
Out: the deployment, or the reason why there is none. Must never know: HTTP, tensors.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeVar

from amalgam.base.machine import ProcessFigures, this_process
from amalgam.base.threads import StoppableThread
from amalgam.config.settings import Settings
from amalgam.engine.params import SamplingParams
from amalgam.errors import ModelNotFoundError, OverloadedError, UnavailableError, UnsupportedError, describe
from amalgam.server.encoding import Encoder, Prompt, TextPrompt, start_thread
from amalgam.server.filtering import filtering
from amalgam.server.filters import FilterCount, Filters, RefusedPrompt
from amalgam.server.http.record import current_record
from amalgam.server.interface import Deployment, Statistics
from amalgam.server.sharing import SharedAnswers
from amalgam.server.watching import watched
from amalgam.text.answers.format import AnswerFormat
from amalgam.text.answers.registry import answer_format, check_parsers
from amalgam.text.grammar import CompiledGrammar, Grammar, compile_grammar

if TYPE_CHECKING:
    from prometheus_client.core import Metric

logger = logging.getLogger("amalgam.server")
T = TypeVar("T")


class Status(enum.StrEnum):
    LOADING = "loading"
    HEALTHY = "healthy"
    DRAINING = "draining"
    FAILED = "failed"


# Why requests are refused: the codes of errors, and, for a server that is not ready, its status.
REFUSALS = (
    "overloaded",
    "prompt_too_long",
    "invalid_request",
    "invalid_json",
    "body_too_large",
    "unsupported_media_type",
    "foreign_host",
    "foreign_origin",
    "unauthorized",
    "forbidden",
    "rate_limited",
    "token_rate_limited",
    "timed_out",
    "content_filtered",
    "filter_failed",
    "body_timeout",
    "headers_too_large",
    "unsupported",
    Status.LOADING.value,
    Status.DRAINING.value,
    Status.FAILED.value,
    "unavailable",
    "conflict",
    "out_of_memory",
    "invalid_plan",
    "invalid_checkpoint",
    "invalid_config",
    "non_finite_logits",
    "weights_failed",
    "weights_lost",
    "replica_lost",
    "not_found",
    "model_not_found",
    "version_not_found",
    "method_not_allowed",
    "internal_error",
)


class Service:
    """The state of one server.

    Args:
        open_deployment: opens the model; blocking, called once in a thread by `start`.
        stopping: set when the model is no longer wanted, so that what opens it may raise.
        url: where the server listens, for its log.
    """

    def __init__(
        self,
        settings: Settings,
        open_deployment: Callable[[], Deployment],
        stopping: threading.Event | None = None,
        url: str = "",
    ) -> None:
        check_parsers(settings.server.tool_parser, settings.server.reasoning_parser)
        self.settings = settings
        self._url = url
        self.num_active = 0  # requests admitted and not yet answered; touched by the event loop only
        self.refusals = dict.fromkeys(REFUSALS, 0)  # answers that were errors; changed by the event loop only
        self.shared_answers = SharedAnswers()
        self.more_families: Callable[[], Iterable[Metric]] = tuple  # of figures, beside the server's own
        self.started_at = time.time()  # Unix seconds, as the clock was set then
        self._started_at = time.monotonic()
        self._open_deployment = open_deployment
        self._deployment: Deployment | None = None
        self._answer_format: AnswerFormat | None = None
        self._load_error: Exception | None = None
        self._stopping = threading.Event() if stopping is None else stopping
        self._is_draining = False
        self._is_aborted = False
        self._is_closed = False
        self._num_encoding = 0
        self.encoder = Encoder(settings.server.max_workers)
        self.filters = Filters(settings.filters, self.encoder) if settings.filters.rules else None
        # What may be of several processes. Blocking. Without a host's name: of this one.
        self.filter_counts: Callable[[], Mapping[FilterCount, int]] = lambda: (
            {} if self.filters is None else self.filters.counts
        )
        self.processes: Callable[[], Mapping[str, ProcessFigures]] = lambda: {"": this_process()}

    def start(self) -> None:
        """Begin to load; returns at once."""
        StoppableThread(self._load, "amalgam-load", self._stopping.set).start()

    def _load(self) -> None:
        try:
            deployment = self._open_deployment()
        except Exception as error:
            if not self._stopping.is_set():
                self._load_error = error
            return
        deployment = watched(deployment)
        self._deployment = deployment if self.filters is None else filtering(deployment, self.filters)
        pages = f"; chat at {self._url}/, endpoints at {self._url}/docs, dashboard at {self._url}/dashboard"
        logger.info("ready after %.1f s: %s%s", self.uptime_seconds, deployment.model_name, pages if self._url else "")
        if self._is_closed:
            deployment.close()

    def drain(self) -> None:
        """Admit nothing more; what has been admitted goes on. A model that is still loading is given up, and so is a
        change of the weights that no client waits for."""
        self._is_draining = True
        if self._deployment is None:
            self._stopping.set()
        else:
            self._deployment.jobs.drain()

    def abort(self) -> None:
        """End what is still in flight with an error. Blocking."""
        self._is_aborted = True
        if self._deployment is not None:
            self._deployment.engine.stop()
            self._deployment.jobs.close()

    def close(self) -> None:
        """Release the deployment and the threads. Blocking."""
        self._is_closed = True
        self._stopping.set()
        if self._deployment is not None:
            self._deployment.close()

    @property
    def failure(self) -> Exception | None:
        """Why the server cannot go on: the model did not load, or the engine has died."""
        if self._load_error is not None:
            return self._load_error
        has_ended = self._is_aborted or self._is_closed
        if self._deployment is None or has_ended or self._deployment.engine.status().is_alive:
            return None
        return UnavailableError("The engine has stopped.", remedy="Restart the server; its log has the cause.")

    @property
    def status(self) -> Status:
        if self.failure is not None:
            return Status.FAILED
        if self._is_draining:
            return Status.DRAINING
        return Status.LOADING if self._deployment is None else Status.HEALTHY

    @property
    def deployment(self) -> Deployment:
        """
        Raises:
            UnavailableError: it is still loading, or has failed.
        """
        if self._deployment is None or self.failure is not None:
            raise UnavailableError(f"The server is {self.status}.", remedy="GET /ready tells when it takes requests.")
        return self._deployment

    @property
    def statistics(self) -> Statistics:
        """Of the deployment.

        Raises:
            UnavailableError: it is still loading, or has failed.
            UnsupportedError: nothing is counted.
        """
        statistics = self.deployment.statistics
        if statistics is None:
            raise UnsupportedError(
                "Expert statistics are not kept here.", remedy="Set statistics.enabled, and serve a model with experts."
            )
        return statistics

    @property
    def answer_format(self) -> AnswerFormat:
        """How the model writes tool calls and reasoning.

        Raises:
            UnavailableError: it is still loading, or has failed.
        """
        if self._answer_format is None:
            tokenizer, server = self.deployment.tokenizer, self.settings.server
            self._answer_format = answer_format(
                tokenizer.chat_template, tokenizer.special_tokens, server.tool_parser, server.reasoning_parser
            )
        return self._answer_format

    @property
    def has_loaded(self) -> bool:
        return self._deployment is not None

    def check_ready(self) -> None:
        """
        Raises:
            UnavailableError: the server is loading, draining or has failed.
        """
        if (status := self.status) is not Status.HEALTHY:
            raise UnavailableError(f"The server is {status}.", remedy="GET /ready tells when it takes requests.")

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count one request as in flight for as long as the context lasts.

        Raises:
            UnavailableError: see `check_ready`.
        """
        self.check_ready()
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1

    async def encode(
        self,
        prompts: Sequence[Prompt],
        name: str,
        max_tokens: int | None = None,
        *,
        is_answered: bool = True,
        is_filtered: bool = True,
    ) -> list[list[int]]:
        """Token ids of each prompt as filters let it pass; none of one that they refuse, which the engine answers too.

        Args:
            prompts: texts, or chats.
            name: of the field that they stand in, for errors.
            max_tokens: of each; None: as many as the engine takes.
            is_answered: whether an answer can be a refusal.
            is_filtered: whether filters look at them here.

        Raises:
            ContentFilteredError, FilterFailedError: see `Filters.prompts`.
            OverloadedError: the queue is full. Checked first, so that overload costs no tokenizing.
            PromptTooLongError: a prompt leaves no room for a new token; told from its length where that is enough.
            RequestError: a prompt cannot be encoded.
        """
        filters = self.filters if is_filtered else None
        return [token_ids for token_ids, _ in await self._encode(prompts, max_tokens, name, filters, is_answered)]

    async def encode_texts(
        self, prompts: Sequence[TextPrompt], name: str, max_tokens: int, *, is_answered: bool = True
    ) -> list[tuple[list[int], str]]:
        """The same of texts, each with the text that was encoded."""
        encoded = await self._encode(prompts, max_tokens, name, self.filters, is_answered)
        return [(ids, prompt.text if isinstance(prompt, TextPrompt) else "") for ids, prompt in encoded]

    async def _encode(
        self, prompts: Sequence[Prompt], max_tokens: int | None, name: str, filters: Filters | None, is_answered: bool
    ) -> list[tuple[list[int], Prompt | RefusedPrompt]]:
        deployment = self.deployment
        self.check_room()
        self._num_encoding += 1  # a batch takes places in the queue one after the other
        try:
            await self._note_prompts(prompts)
            max_tokens = deployment.engine.max_prompt_tokens if max_tokens is None else max_tokens
            passed: Sequence[Prompt | RefusedPrompt] = prompts
            if filters is not None:
                await self.encoder.refuse_too_long(deployment.tokenizer, prompts, max_tokens, name)
                passed = await filters.prompts(prompts, name, is_answered=is_answered)
            texts = [prompt for prompt in passed if not isinstance(prompt, RefusedPrompt)]
            encoded = iter(await self.encoder.encode(deployment.tokenizer, texts, max_tokens, name))
            return [(prompt if isinstance(prompt, RefusedPrompt) else next(encoded), prompt) for prompt in passed]
        finally:
            self._num_encoding -= 1

    async def _note_prompts(self, prompts: Sequence[Prompt]) -> None:
        """For the request's line in the log, if they are wanted there."""
        if not self.settings.server.log_prompts or (record := current_record.get()) is None:
            return
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else repr(prompt)
            record.prompts.append(text if self.filters is None else await self.filters.masked(text))

    def check_room(self) -> None:
        """To be called before a request costs anything.

        Raises:
            UnavailableError: see `deployment`.
            OverloadedError: the queue is full.
        """
        status, settings = self.deployment.engine.status(), self.settings
        num_free = max(0, settings.inference.max_batch_size - status.num_running)
        num_waiting = status.num_waiting + self._num_encoding
        if num_waiting >= settings.engine.max_queue + num_free:  # as the scheduler counts
            raise OverloadedError(f"{num_waiting} requests are waiting already.", remedy="Try again later.")

    async def compile_grammar(self, grammar: Grammar) -> CompiledGrammar:
        """A grammar that an answer has to follow, made ready in a thread. Takes turns with prompts.

        Raises:
            RequestError: it is wrong, too large or unsupported.
        """
        tokenizer = self.deployment.tokenizer
        return await self.encoder.turn(lambda: compile_grammar(tokenizer, grammar))  # type: ignore[arg-type] # a protocol

    def count_refusal(self, code: str) -> None:
        """An answer was an error; `code` as its body has it."""
        status = self.status
        reason = status.value if code == UnavailableError.code and status is not Status.HEALTHY else code
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    @property
    def max_batch_in_flight(self) -> int:
        """How many requests of one batch are in the engine at a time: as many as compute and as many again to follow,
        but never more than half of the queue, so that others find a place.
        """
        return max(1, min(2 * self.settings.inference.max_batch_size, self.settings.engine.max_queue // 2))

    @property
    def default_params(self) -> SamplingParams:
        """What a request gets where it says nothing."""
        return SamplingParams() if self._deployment is None else self._deployment.defaults.params

    @property
    def model_name(self) -> str:
        if self._deployment is not None:
            return self._deployment.model_name
        return self.settings.model.name or PurePath(self.settings.model.base_path).name

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names under which the model can be asked for; answers bear the first."""
        return self.settings.server.served_model_names or (self.model_name,)

    def choose_weights(self, weights: str | int | None, key: str | None = None) -> int:
        """Give a request the weight version that it asks for, for all that is computed of it; returns its id.

        Args:
            weights: a name or an id; None: what new requests start on now, or what is being tried.
            key: requests with the same one stay together; where the client names a session, that goes before.

        Raises:
            VersionNotFoundError: there is none, or it takes no new requests.
            UnavailableError: see `deployment`.
        """
        record = current_record.get()
        version = self.deployment.version_for(weights, (record.session if record is not None else "") or key)
        if record is not None:
            record.weights, record.weight_version = version, version.version_id
            record.may_move = weights is None
        return version.version_id

    def check_model(self, name: str | None) -> str:
        """The name that an answer bears.

        Raises:
            ModelNotFoundError: `name` is none of the model's.
        """
        names = self.model_names
        if name is not None and name not in names:
            raise ModelNotFoundError(
                f"The model {describe(name)} does not exist here.",
                remedy=f"This server has {', '.join(map(repr, names))}.",
                param="model",
            )
        return names[0]

    @property
    def weight_version(self) -> int | None:
        """The version that new requests start on; None while loading."""
        return None if self._deployment is None else self._deployment.version_id

    @property
    def uptime_seconds(self) -> float:
        """Since the server started; the model may have been loaded later."""
        return time.monotonic() - self._started_at


async def in_own_thread(call: Callable[[], T]) -> T:
    """Run a blocking call in a thread of its own: unlike a pool's, it takes no turn from others.

    It cannot be stopped from here: closing the deployment ends what takes long.
    """
    return await asyncio.wrap_future(start_thread(call))
