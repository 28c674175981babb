"""`amalgam bench serve`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.base.counting import counted
from amalgam.cli.options import refuse_unused
from amalgam.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from amalgam.tools.load.benchmark import Benchmark, Extent, Work
    from amalgam.tools.load.client import Endpoint
    from amalgam.tools.load.metrics import Distribution, Point
    from amalgam.tools.load.running import Load

_INTERRUPTED = 130
_CLIENTS = "1,4,16"  # where neither rates nor clients are given
_SECONDS = 20.0  # of a load, where neither requests nor seconds are given
_LEAST = 150  # requests of a rate, where it is searched: with fewer, chance hides what is 10% too much
_BURST, _MAX_CLIENTS, _ATTAINMENT = 8, 256, 0.9
_OUTPUT_TOKENS = "64"
_PROMPT_TOKENS = "256"
_ARRIVALS = ("poisson", "constant", "burst")
_ENDPOINTS = ("completions", "chat")

_LOAD, _WORK, _SERVER, _JUDGE = "Load", "What is asked", "The server", "Objectives"


def command(
    more_objectives: Annotated[list[str] | None, typer.Argument(metavar="[NAME:TIME]...", hidden=True)] = None,
    url: Annotated[
        str, typer.Option(help="Address of any server that speaks OpenAI's interface.", rich_help_panel=_SERVER)
    ] = "http://127.0.0.1:8080",
    model: Annotated[
        str, typer.Option(help="Its name. Default: the first that the server lists.", rich_help_panel=_SERVER)
    ] = "",
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.", rich_help_panel=_SERVER)
    ] = "",
    endpoint: Annotated[
        str,
        typer.Option(
            metavar="completions|chat",
            help="What is asked. Default: chat for a dataset of messages, else completions.",
            rich_help_panel=_SERVER,
        ),
    ] = "",
    body: Annotated[
        str,
        typer.Option(
            metavar="JSON", help="Fields of every request, such as '{\"temperature\": 0}'.", rich_help_panel=_SERVER
        ),
    ] = "{}",
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds for a whole answer.", rich_help_panel=_SERVER)
    ] = 600.0,
    usage: Annotated[
        bool,
        typer.Option(help="Ask the server for token counts; without, events are counted.", rich_help_panel=_SERVER),
    ] = True,
    rate: Annotated[
        str, typer.Option(metavar="R,…", help="Requests a second, one load after the other.", rich_help_panel=_LOAD)
    ] = "",
    arrivals: Annotated[
        str, typer.Option(metavar="poisson|constant|burst", help="How they come, with --rate.", rich_help_panel=_LOAD)
    ] = "poisson",
    burst: Annotated[
        int, typer.Option(min=1, help="Requests that come together, with --arrivals burst.", rich_help_panel=_LOAD)
    ] = _BURST,
    concurrency: Annotated[
        str,
        typer.Option(
            metavar="C,…",
            help=f"Clients, each of which asks again when it has its answer; one load after the other [{_CLIENTS}]. "
            "With --rate, one number: the most requests under way.",
            rich_help_panel=_LOAD,
        ),
    ] = "",
    requests: Annotated[int | None, typer.Option(min=1, help="Requests of each load.", rich_help_panel=_LOAD)] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help=f"Send for so long; all answers are waited for [{_SECONDS:g} unless --requests is given].",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests before each load that do not count.", rich_help_panel=_LOAD)
    ] = 4,
    find_saturation: Annotated[
        bool,
        typer.Option(
            "--find-saturation",
            help="Search the highest rate that the server bears, or that meets --slo.",
            rich_help_panel=_LOAD,
        ),
    ] = False,
    max_concurrency: Annotated[
        int, typer.Option(min=1, help="Most clients that --find-saturation tries.", rich_help_panel=_LOAD)
    ] = _MAX_CLIENTS,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N|LOW-HIGH", help="Length of made-up prompts [256].", rich_help_panel=_WORK)
    ] = "",
    output_tokens: Annotated[
        str,
        typer.Option(
            metavar="N|LOW-HIGH",
            help="Length of answers [64; with --dataset the server's own end, unless a row says].",
            rich_help_panel=_WORK,
        ),
    ] = "",
    shared_prefix: Annotated[
        int, typer.Option(min=0, help="Tokens with which all made-up prompts begin.", rich_help_panel=_WORK)
    ] = 0,
    num_prefixes: Annotated[int, typer.Option(min=1, help="So many different beginnings.", rich_help_panel=_WORK)] = 1,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The model's, for made-up prompts of the very length. Default: the server's counts are asked.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON lines, or a list, of prompts, messages, ShareGPT's conversations or OpenAI's batch requests.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Answers of the full length. Default: for made-up prompts.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, lengths and arrivals.", rich_help_panel=_WORK)] = 0,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:TIME …",
            help="Objectives of ttft, itl, tpot or e2e: ttft:500ms itl:50ms. Goodput counts what meets all.",
            rich_help_panel=_JUDGE,
        ),
    ] = None,
    attainment: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, help="Share of requests that must meet --slo at saturation.", rich_help_panel=_JUDGE
        ),
    ] = _ATTAINMENT,
    out: Annotated[Path | None, typer.Option(metavar="OUT.html", help="Draw it.")] = None,
    records: Annotated[Path | None, typer.Option(metavar="OUT.jsonl", help="Write the times of each answer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, and no table.")] = False,
) -> int:
    """Measure a running server: latencies, throughput, goodput, and the rate at which it is saturated.

    The exit code is 0 when all loads were measured, 6 when the server does not answer or went away (what was measured
    until then is reported), 130 after Ctrl-C (likewise).
    """
    from amalgam.base.files import check_writable
    from amalgam.cli.console import note, print_json, progress_bar
    from amalgam.tools.load.benchmark import Benchmark, Target, body_fields, run_until_interrupted
    from amalgam.tools.load.http import Address
    from amalgam.tools.load.metrics import parse_objectives
    from amalgam.tools.load.running import Load

    if arrivals not in _ARRIVALS:
        raise ConfigError(f"--arrivals is {arrivals!r}.", remedy=f"Expected {', '.join(_ARRIVALS)}.")
    if more_objectives and not slo:
        raise ConfigError(f"{more_objectives[0]!r} belongs to no option.", remedy="Objectives follow --slo.")
    objectives = parse_objectives([*(slo or ()), *(more_objectives or ())])
    form = Load(arrivals=arrivals, burst=burst)  # type: ignore[arg-type]
    loads = _loads(rate, concurrency, form)
    if find_saturation and (rate or concurrency):
        raise ConfigError("--find-saturation chooses the loads.", remedy="Leave out --rate and --concurrency.")
    if not rate and not find_saturation:
        refuse_unused(
            {"--arrivals": arrivals != "poisson"}, "--rate", "Add --rate: clients ask when they are answered."
        )
    if arrivals != "burst":
        refuse_unused({"--burst": burst != _BURST}, "--arrivals burst", "Add it.")
    if not find_saturation:
        searching = {"--max-concurrency": max_concurrency != _MAX_CLIENTS, "--attainment": attainment != _ATTAINMENT}
        refuse_unused(searching, "--find-saturation", "Add it, or leave this out.")
    if not slo:
        refuse_unused({"--attainment": attainment != _ATTAINMENT}, "--slo", "Add --slo, for instance ttft:500ms.")
    if not shared_prefix:
        refuse_unused({"--num-prefixes": num_prefixes != 1}, "--shared-prefix", "Say how long they are.")
    for written in (out, records):
        if written is not None:
            check_writable(written)
    address = Address.parse(url)
    endpoint_, work = _work(
        endpoint, dataset, prompt_tokens, output_tokens, shared_prefix, num_prefixes, tokenizer, seed
    )
    fields = body_fields(body)
    if ignore_eos or (ignore_eos is None and dataset is None):
        fields = {"ignore_eos": True, **fields}
    benchmark = Benchmark(
        Target(address, endpoint_, model, api_key, fields, usage, timeout),
        work,
        _extent(requests, seconds, warmup, is_search=find_saturation),
        objectives,
    )
    with progress_bar("requests") as progress:
        if find_saturation:
            working = benchmark.find_saturation(
                form, max_clients=max_concurrency, attainment=attainment, progress=progress
            )
        else:
            working = benchmark.run(loads, progress)
        is_whole = run_until_interrupted(working)
    document = {"command": _command(api_key), **_client(), **benchmark.as_json(), "interrupted": not is_whole}
    if as_json:
        print_json(document)
    else:
        _show(benchmark)
        print_json(document, is_indented=False)
    _write(benchmark, out, records)
    if not is_whole:
        note("Interrupted.")
        return _INTERRUPTED
    if benchmark.is_gone:
        note(f"Error: {address} went away; the figures are of what it had answered.")
    return UnavailableError.exit_code if benchmark.is_gone or not _has_answers(benchmark) else 0


def _extent(requests: int | None, seconds: float | None, warmup: int, *, is_search: bool) -> Extent:
    from amalgam.tools.load.benchmark import Extent

    if requests is None and seconds is None:
        return Extent(None, _SECONDS, warmup, least=_LEAST if is_search else 0)
    return Extent(requests, seconds, warmup)


def _has_answers(benchmark: Benchmark) -> bool:
    return any(point.num_completed for point in benchmark.points)


def _loads(rates: str, clients: str, form: Load) -> list[Load]:
    from dataclasses import replace

    numbers = _numbers("--concurrency", clients or ("" if rates else _CLIENTS), whole=True)
    if not rates:
        return [replace(form, concurrency=int(number)) for number in numbers]
    if len(numbers) > 1:
        raise ConfigError(f"--concurrency is {clients!r}.", remedy="With --rate, give one number.")
    most = int(numbers[0]) if numbers else None
    return [replace(form, rate=number, concurrency=most) for number in _numbers("--rate", rates)]


def _numbers(flag: str, text: str, *, whole: bool = False) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
        if all(0 < number < 1e6 and (number.is_integer() or not whole) for number in numbers) and (numbers or not text):
            return numbers
    except ValueError:
        pass
    kind = "whole numbers" if whole else "numbers"
    raise ConfigError(f"{flag} is {text!r}.", remedy=f"Expected {kind} above 0, separated by commas: 1,4,16.")


def _work(
    endpoint: str,
    dataset: Path | None,
    prompt_tokens: str,
    output_tokens: str,
    shared_prefix: int,
    num_prefixes: int,
    tokenizer: Path | None,
    seed: int,
) -> tuple[Endpoint, Work]:
    from amalgam.tools.load import datasets
    from amalgam.tools.load.benchmark import Work

    if endpoint not in ("", *_ENDPOINTS):
        raise ConfigError(f"--endpoint is {endpoint!r}.", remedy=f"Expected {' or '.join(_ENDPOINTS)}.")
    prompts = datasets.Lengths.parse("--prompt-tokens", prompt_tokens or _PROMPT_TOKENS)
    outputs = datasets.Lengths.parse("--output-tokens", output_tokens or _OUTPUT_TOKENS)
    if dataset is not None:
        made_up = {"--prompt-tokens": prompt_tokens, "--shared-prefix": shared_prefix, "--tokenizer": tokenizer}
        if given := [name for name, value in made_up.items() if value]:
            raise ConfigError(f"{given[0]} is for made-up prompts.", remedy="Leave it out, or --dataset.")
        chosen: Endpoint = "completions" if endpoint == "completions" else "chat"
        if not endpoint and not datasets.has_messages(dataset):
            chosen = "completions"
        rows = datasets.from_file(dataset, chosen, outputs if output_tokens else None, seed)
        return chosen, Work(prompts, outputs, rows=rows, seed=seed)
    if shared_prefix >= prompts.low:
        raise ConfigError(
            f"--shared-prefix is {shared_prefix}.", remedy=f"A prompt has {prompts} tokens: it must be shorter."
        )
    chosen = "chat" if endpoint == "chat" else "completions"
    count = None if tokenizer is None else _counter(tokenizer, is_chat=chosen == "chat")
    return chosen, Work(prompts, outputs, shared_prefix, num_prefixes, count=count, seed=seed)


def _counter(tokenizer: Path, *, is_chat: bool) -> Callable[[str], int]:
    """Tokens of a prompt; of a chat with what its template puts around it."""
    from amalgam.text.tokenizer import Tokenizer

    read = Tokenizer.load(tokenizer)
    if is_chat and read.has_chat_template:
        return lambda text: len(read.encode_chat([{"role": "user", "content": text}]))
    return lambda text: len(read.encode(text))


def _command(api_key: str) -> list[str]:
    """As it was typed, but for the key."""
    return ["amalgam", *(word.replace(api_key, "…") if api_key else word for word in sys.argv[1:])]


def _client() -> dict[str, Any]:
    from amalgam.base.machine import detect_machine
    from amalgam.version import __version__, commit

    machine = detect_machine()
    return {
        "version": __version__,
        "commit": commit(),
        "client": {"processor": machine.processor, "cores": machine.cores},
    }


def _write(benchmark: Benchmark, out: Path | None, records: Path | None) -> None:
    from amalgam.base.files import replace_file, writing
    from amalgam.cli.console import note

    if records is not None:
        with writing(records):
            benchmark.write_records(records)
        note(f"Wrote {records}.")
    if out is not None:
        from amalgam.tools.load.drawing import benchmark_html

        title = f"{benchmark.model} at {benchmark.target.address}"
        measured = [measured for measured in benchmark.measured if measured.num_sent]
        html = benchmark_html(benchmark.points, measured, dict(benchmark.objectives), benchmark.saturation, title)
        with writing(out):
            replace_file(out, html)
        note(f"Wrote {out}.")


def _show(benchmark: Benchmark) -> None:
    from amalgam.cli.console import note, print_table, say

    points = benchmark.points
    work = benchmark.work
    asked = (
        counted(len(work.rows), "row")
        if work.rows
        else f"{work.prompt_lengths} tokens and {work.output_lengths} new ones"
    )
    title = f"{benchmark.model} at {benchmark.target.address}: {asked}"
    goodput = ("goodput/s", "met") if benchmark.objectives else ()
    columns = ("load", "sent", "failed", "answers/s", "new tokens/s", "under way", *goodput)
    print_table(columns, [_throughput_row(point) for point in points], title)
    rows = [row for point in points for row in _latency_rows(point)]
    print_table(("load", "ms", "mean", "p50", "p90", "p95", "p99", "max"), rows)
    for point in points:
        for kind, error in point.errors.items():
            note(f"{point.load}: {error.count} × {kind}: {error.example}")
        if point.distortion:
            note(f"{point.load}: {point.distortion}")
        if point.num_short:
            note(f"{point.load}: {counted(point.num_short, 'answer')} ended before the length that was asked for.")
    for text in benchmark.notes + _counting(points):
        note(text)
    found = benchmark.saturation
    if found is not None:
        reasons = [(f"{probe.rate:.4g}", "yes" if probe.is_borne else "no", probe.reason) for probe in found.probes]
        print_table(("req/s", "borne", "why not"), reasons)
        above = f"; {found.not_borne:.4g} are too many" if found.not_borne else ""
        say(
            f"Saturated at {found.requests_per_second:.4g} requests/s{above}. {found.clients} clients that ask one "
            f"after the other get {found.capacity:.4g} answers/s."
        )


def _throughput_row(point: Point) -> list[str]:
    goodput = point.goodput
    judged = [f"{goodput.requests_per_second:.2f}", f"{goodput.share:.1%}"] if goodput else []
    speeds = [f"{value:.2f}" for value in (point.requests_per_second, point.output_tokens_per_second)]
    return [
        str(point.load),
        str(point.num_sent),
        str(point.num_failed),
        *speeds,
        f"{point.mean_concurrency:.1f}",
        *judged,
    ]


def _latency_rows(point: Point) -> list[list[str]]:
    def cells(found: Distribution | None) -> list[str]:
        if found is None:
            return ["–"] * 6
        return [f"{s * 1e3:.1f}" for s in (found.mean, found.p50, found.p90, found.p95, found.p99, found.max)]

    return [[str(point.load), name.upper(), *cells(found)] for name, found in point.latencies.items()]


def _counting(points: Sequence[Point]) -> list[str]:
    """How tokens were counted, where it is not by the server's usage with a token in each event."""
    said = []
    whole = [point for point in points if point.num_completed]
    for by in dict.fromkeys(point.counted_by for point in whole if point.counted_by != "usage"):
        said.append(f"New tokens are counted by {by}: an event may carry several.")
    several = [point.tokens_per_event for point in whole if point.tokens_per_event and point.tokens_per_event > 1.05]
    if several:
        said.append(f"Events carried up to {max(several):.2f} tokens on the average: ITL is between events.")
    if whole and (lengths := {point.prompt_tokens for point in whole}) != {(0, 0)}:
        low, high = min(low for low, _ in lengths), max(high for _, high in lengths)
        said.append(f"Prompts had {low} to {high} tokens, as the server counts.")
    if cached := sum(point.num_cached_tokens or 0 for point in whole):
        total = sum(point.num_prompt_tokens for point in whole)
        said.append(f"{cached / max(1, total):.1%} of the prompt tokens came from the server's prefix cache.")
    return said
