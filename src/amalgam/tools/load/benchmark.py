"""A benchmark of a running server: the model it has, a check, how many tokens words have, then load after load.

In: a server's address, what to ask, loads. Out: a `Benchmark` with a point for each load, filled as they end. Must
never know terminals.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from amalgam.base.counting import counted
from amalgam.base.files import replace_file
from amalgam.base.strict_json import parse_json
from amalgam.errors import AmalgamError, ConfigError, RequestError, UnavailableError, describe
from amalgam.tools.load import datasets, saturation
from amalgam.tools.load.client import PATHS, Answer, Client, Endpoint, Question, model_names
from amalgam.tools.load.datasets import Lengths, Measure
from amalgam.tools.load.http import Address
from amalgam.tools.load.metrics import Point, figures
from amalgam.tools.load.running import Load, Measured, run
from amalgam.tools.load.saturation import Saturation

_CHECK_TOKENS = 2
_OWN_FIELDS = {  # of a body, and what says them
    "model": "--model",
    "prompt": "--dataset",
    "messages": "--dataset",
    "max_tokens": "--output-tokens",
    "stream": "nothing: answers are always streamed",
    "stream_options": "--usage or --no-usage",
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Target:
    """What is asked, and how.

    Attributes:
        model: empty: the first that the server lists.
        fields: of every request's body, beside those of a question.
    """

    address: Address
    endpoint: Endpoint
    model: str = ""
    api_key: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    wants_usage: bool = True
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class Work:
    """The questions.

    Attributes:
        rows: of a dataset; none: made up, of the lengths given.
        count: tokens of a text, with a tokenizer at hand.
    """

    prompt_lengths: Lengths
    output_lengths: Lengths
    shared_prefix: int = 0
    num_prefixes: int = 1
    rows: Sequence[Question] = ()
    count: Callable[[str], int] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Extent:
    """How long a load lasts: requests, seconds, or whichever ends first; and requests before it that do not count.

    Attributes:
        least: requests of a load with a rate, however long they take.
    """

    requests: int | None = None
    seconds: float | None = None
    warmup: int = 4
    least: int = 0

    def of(self, load: Load) -> tuple[int | None, float | None]:
        """Requests and seconds of a load, as `run` takes them."""
        if load.rate is not None and self.seconds is not None and self.least > load.rate * self.seconds:
            return self.least, None
        return self.requests, self.seconds


@dataclass
class Benchmark:
    """What has been measured; each part is there as soon as it is known.

    Attributes:
        measure: tokens of made-up prompts, as the server's own counts tell.
        is_gone: the server went away.
    """

    target: Target
    work: Work
    extent: Extent
    objectives: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    measure: Measure = field(default_factory=Measure)
    measured: list[Measured] = field(default_factory=list)
    saturation: Saturation | None = None
    notes: list[str] = field(default_factory=list)
    is_gone: bool = False

    @property
    def points(self) -> list[Point]:
        return [figures(measured, self.objectives) for measured in self.measured if measured.num_sent]

    async def run(self, loads: Sequence[Load], progress: Progress) -> None:
        """Measure one load after the other.

        Raises:
            AmalgamError: the server does not answer as it must before anything is measured.
        """
        async with self._prepared() as (client, questions):
            for load in loads:
                await self._measure(client, questions, load, progress)
                if self.is_gone:
                    break

    async def find_saturation(self, load: Load, *, max_clients: int, attainment: float, progress: Progress) -> None:
        """Search the highest rate that the server bears; `load` says how requests arrive.

        Raises:
            AmalgamError: as `run`.
        """
        self.saturation = Saturation()
        async with self._prepared() as (client, questions):
            await saturation.find(
                lambda tried: self._measure(client, questions, tried, progress),
                self.saturation,
                arrivals=load.arrivals,
                burst=load.burst,
                max_clients=max_clients,
                attainment=attainment,
            )

    def as_json(self) -> dict[str, Any]:
        work, target = self.work, self.target
        return {
            "server": {"url": str(target.address), "model": self.model, "path": PATHS[target.endpoint]},
            "work": {
                "rows": len(work.rows),
                "prompt_tokens": None if work.rows else str(work.prompt_lengths),
                "output_tokens": str(work.output_lengths),
                "shared_prefix": work.shared_prefix,
                "num_prefixes": work.num_prefixes,
                "seed": work.seed,
                "body": dict(target.fields),
            },
            "objectives_ms": {name: seconds * 1e3 for name, seconds in self.objectives.items()},
            "points": [point.as_json() for point in self.points],
            "saturation": self.saturation and self.saturation.as_json(),
            "notes": self.notes,
            "server_gone": self.is_gone,
        }

    def write_records(self, path: Path) -> None:
        """One JSON line for each answer; times in seconds from its load's beginning.

        Raises:
            OSError: it cannot be written.
        """
        lines = [
            orjson.dumps(_record(measured, answer)) + b"\n" for measured in self.measured for answer in measured.answers
        ]
        replace_file(path, b"".join(lines))

    @asynccontextmanager
    async def _prepared(self) -> AsyncIterator[tuple[Client, Iterator[Question]]]:
        """A client that has been heard, and questions of the right lengths."""
        gc.collect()
        gc.freeze()  # the collector, which stops everything, does not walk over what is there by now
        target = self.target
        try:
            self.model = target.model or await self._first_model()
            client = Client(
                target.address,
                target.endpoint,
                self.model,
                api_key=target.api_key,
                fields=target.fields,
                wants_usage=target.wants_usage,
                timeout_seconds=target.timeout_seconds,
            )
            with closing(client):
                yield client, await self._questions(client)
        finally:
            gc.unfreeze()

    async def _first_model(self) -> str:
        names = await model_names(self.target.address, self.target.api_key)
        if not names:
            raise UnavailableError(f"{self.target.address} lists no model.", remedy="Name one with --model.")
        if len(names) > 1:
            self.notes.append(f"The server lists {len(names)} models; the first is asked. --model names another.")
        return names[0]

    async def _questions(self, client: Client) -> Iterator[Question]:
        """After the server has answered a first one."""
        work, extent = self.work, self.extent
        if num_rows := len(work.rows):
            await self._checked(client, work.rows[0])
            if extent.requests is None or extent.requests + extent.warmup > num_rows:
                self.notes.append(
                    f"The dataset has {counted(num_rows, 'row')}: asked again and again, so that a prefix cache shows."
                )
            return datasets.repeated(work.rows)
        if work.count is None:
            self.measure = await self._calibrate(client)
        else:
            self.measure = Measure.of(work.count)
            await self._checked(client, Question(" time", _CHECK_TOKENS))
        return datasets.synthetic(
            work.prompt_lengths,
            work.output_lengths,
            self.measure,
            shared_prefix=work.shared_prefix,
            num_prefixes=work.num_prefixes,
            seed=work.seed,
            count=work.count,
        )

    async def _checked(self, client: Client, question: Question) -> Answer:
        """
        Raises:
            RequestError: the server refuses the question.
            UnavailableError: it does not answer as OpenAI's interface does.
        """
        answer = await client.ask(question)
        if answer.error_kind and answer.error_kind != "no text":
            kind = RequestError if 400 <= answer.status < 500 else UnavailableError
            remedy = "Fields that a server does not know are left out with --no-ignore-eos and --no-usage."
            raise kind(
                f"{self.target.address}{PATHS[self.target.endpoint]} does not answer a first request "
                f"({answer.error_kind}): {answer.error}",
                remedy=remedy if answer.status in (400, 422) else "Check --url, --endpoint, --model and --api-key.",
            )
        return answer

    async def _calibrate(self, client: Client) -> Measure:
        """How many tokens words have, from the server's own counts of two prompts."""
        chances = random.Random(self.work.seed - 1)
        most = max(16, self.work.prompt_lengths.high // 2)
        sizes, counts = (max(1, most // 8), most), []
        for size in sizes:
            prompt = datasets.text_of(datasets.words(chances, size))
            answer = await self._checked(client, Question(prompt, _CHECK_TOKENS))
            if answer.num_prompt_tokens is None:
                self.notes.append(
                    "The server does not count prompt tokens: each word of a prompt is taken for one. "
                    "--tokenizer FOLDER counts them here."
                )
                return Measure()
            counts.append(answer.num_prompt_tokens)
        few, many = zip(sizes, counts, strict=True)
        return Measure.through(few, many)

    async def _measure(self, client: Client, questions: Iterator[Question], load: Load, progress: Progress) -> Point:
        extent = self.extent
        if extent.warmup:
            await run(client, questions, Measured(Load(concurrency=extent.warmup)), count=extent.warmup, seconds=None)
        measured = Measured(load)
        self.measured.append(measured)
        count, seconds = extent.of(load)
        expected = _expected(load, count, seconds)

        def tell(num_ended: int) -> None:
            progress(str(load), num_ended, max(expected, num_ended))

        number = len(self.measured)
        await run(
            client,
            questions,
            measured,
            count=count,
            seconds=seconds,
            seed=self.work.seed + number,
            progress=tell,
        )
        progress(str(load), len(measured.answers), len(measured.answers))
        if any(answer.error_kind in ("cut", "connect") for answer in measured.answers):
            measured.is_gone = measured.is_gone or not await self._is_there()
        self.is_gone |= measured.is_gone
        return figures(measured, self.objectives)

    async def _is_there(self) -> bool:
        try:
            await model_names(self.target.address, self.target.api_key)
        except UnavailableError:
            return False
        except AmalgamError:
            pass
        return True


def _expected(load: Load, count: int | None, seconds: float | None) -> int:
    """How many answers a load will have, as far as it is known: for a progress bar."""
    if load.rate is None or seconds is None:
        return count or 0
    by_time = max(1, round(load.rate * seconds))
    return min(by_time, count) if count else by_time


def _record(measured: Measured, answer: Answer) -> dict[str, Any]:
    begin = measured.started
    return {
        "load": str(measured.load),
        "due": answer.due - begin,
        "sent": answer.sent - begin,
        "arrivals": [time - begin for time in answer.arrivals],
        "ended": answer.ended - begin,
        "status": answer.status,
        "error_kind": answer.error_kind,
        "error": answer.error,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.num_prompt_tokens,
        "new_tokens": answer.num_tokens,
        "cached_tokens": answer.num_cached_tokens,
    }


def body_fields(text: str) -> dict[str, Any]:
    """
    Raises:
        ConfigError: it is no JSON object, has a field that an option says, or what cannot be sent.
    """
    try:
        value = parse_json(text.encode())
    except ValueError as error:
        raise ConfigError(f"--body is no JSON: {error}.", remedy='Expected an object: {"temperature": 0}.') from None
    if not isinstance(value, dict):
        raise ConfigError(f"--body is {text!r}.", remedy='Expected an object: {"temperature": 0}.')
    if own := [name for name in value if name in _OWN_FIELDS]:
        raise ConfigError(f"--body has {own[0]}.", remedy=f"That is said by {_OWN_FIELDS[own[0]]}.")
    try:
        orjson.dumps(value)
    except TypeError:
        raise ConfigError(f"--body is {describe(text)}.", remedy="Expected numbers of at most 64 bits.") from None
    return value


def run_until_interrupted(work: Any) -> bool:
    """Run a coroutine. False: the user interrupted it, and it has let go of what it held."""
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        return False
    return True
