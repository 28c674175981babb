"""`amalgam estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amalgam.base.counting import counted
from amalgam.cli.options import refuse_unused, with_settings
from amalgam.config.settings import Settings

if TYPE_CHECKING:
    from amalgam.tools.cost import CostReport, Measurements, Wanted
    from amalgam.tools.estimate import Estimate

_UTILISATION = "1,0.5,0.1"


@with_settings(needs_model=False)
def command(
    settings: Settings,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence. Default: max_seq_length.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at a time. Default: max_batch_size.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="24GB[@1008GB/s]|CARD",
            help="Ask about a card that is not here: its memory, how fast that is read, or a known card such as "
            "rtx-4090.",
        ),
    ] = None,
    cost: Annotated[bool, typer.Option("--cost", help="Estimate what tokens cost, from measured throughput.")] = False,
    measured: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Output of `amalgam bench` or `bench serve`. Default: measure now."),
    ] = None,
    expected: Annotated[
        bool,
        typer.Option(
            "--expected", help="Use the speed model of this machine (a few layers timed) instead of a full measurement."
        ),
    ] = False,
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Price list. Default: the bundled one.")
    ] = None,
    machine: Annotated[
        list[str] | None, typer.Option(help="Row of the price list for the measured machine. Repeatable.")
    ] = None,
    per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of the machine per hour, instead of a row.")
    ] = None,
    utilisation: Annotated[str, typer.Option(help="Shares of the time in which the machine works.")] = _UTILISATION,
    prompt_tokens: Annotated[
        float | None,
        typer.Option(min=0, help="Prompt tokens per new token, if no load was measured. Default: 1."),
    ] = None,
    currency: Annotated[str, typer.Option(help="Currency of the answer. Default: that of the price list.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Estimate the memory that a model needs, part by part, or what its tokens cost. Memory needs headers only."""
    from amalgam.cli.console import print_json
    from amalgam.errors import ConfigError

    if not cost:
        given = {
            "--measured": measured, "--expected": expected, "--prices": prices, "--machine": machine,
            "--per-hour": per_hour is not None, "--utilisation": utilisation != _UTILISATION,
            "--prompt-tokens": prompt_tokens is not None, "--currency": currency,
        }  # fmt: skip
        refuse_unused(given, "--cost", "Add --cost.")
    if measured is None and not settings.model.base_path:
        raise ConfigError("No model is given.", remedy="Give --config FILE or --model FOLDER.")
    if not cost:
        _memory(settings, length, batch, gpu, as_json=as_json)
        return
    refuse_unused({"--gpu": gpu}, "a model's memory", "Leave out --cost, or --gpu.")
    from amalgam.tools.cost import Wanted, read_prices
    from amalgam.tools.cost import cost as cost_of

    refuse_unused({"--expected": measured is not None and expected}, "a model alone", "Leave out --measured.")
    if machine and per_hour is not None:
        raise ConfigError("--machine and --per-hour are both given.", remedy="Give one of them.")
    wanted = Wanted(tuple(machine or ()), per_hour, _shares(utilisation), currency)
    table = read_prices(prices)
    paces = _measurements(settings, measured, 1.0 if prompt_tokens is None else prompt_tokens, is_expected=expected)
    report = cost_of(paces, table, wanted)
    if as_json:
        print_json(report.as_json())
    else:
        _show_cost(report, wanted)


def _measurements(settings: Settings, file: Path | None, prompt_tokens: float, *, is_expected: bool) -> Measurements:
    from amalgam.cli.console import progress_bar
    from amalgam.tools.cost import read_measurements

    if file is not None:
        return read_measurements(file, prompt_tokens)
    from amalgam.tools.cost_measuring import expected_now, measured_now

    with progress_bar() as progress:
        return (expected_now if is_expected else measured_now)(settings, prompt_tokens, progress)


def _shares(text: str) -> tuple[float, ...]:
    from amalgam.errors import ConfigError

    try:
        shares = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"--utilisation is {text!r}.", remedy="Expected shares above 0, up to 1: 1,0.5,0.1.")
    return shares


def _memory(settings: Settings, length: int | None, batch: int | None, gpu: str | None, *, as_json: bool) -> None:
    from amalgam.cli.console import print_json, progress_bar
    from amalgam.planning.cards import parse_card
    from amalgam.runtime.derive import ensure_derived
    from amalgam.tools.estimate import estimate

    card = None if gpu is None else parse_card(gpu, "--gpu")
    with progress_bar() as progress:
        ensure_derived(settings, progress)
    result = estimate(settings, length, batch, card)
    if as_json:
        print_json(result.as_json())
    else:
        _show_memory(result)


def _show_memory(result: Estimate) -> None:
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import note, print_table, say

    rows = [(f"weights in {name}", human_bytes(size)) for name, size in result.weights.items()]
    if result.mapped_bytes:
        rows.append(("less what the packed cache maps", f"-{human_bytes(result.mapped_bytes)}"))
    rows += [
        (f"KV cache ({human_bytes(result.kv_bytes_per_token)} per token)", human_bytes(result.kv_bytes)),
        *([("recurrent states", human_bytes(result.state_bytes))] if result.state_bytes else []),
        *([("draft that guesses tokens", human_bytes(result.draft_bytes))] if result.draft_bytes else []),
        ("workspace of a step", human_bytes(result.workspace_bytes)),
        ("the program itself", human_bytes(result.process_bytes)),
        ("all", human_bytes(result.total_bytes)),
        ("available now", human_bytes(result.available_bytes)),
    ]
    title = f"{counted(result.batch_size, 'sequence')} of {counted(result.seq_length, 'token')}"
    print_table(("memory for", "bytes"), rows, title, num_totals=2)
    if not result.has_tokenizer:
        note("The checkpoint has no tokenizer, so that the memory of one is not counted.")
    if len(result.devices) > 1 or result.devices[0].name != "cpu":
        _show_devices(result)
    verdict = "fits" if result.fits else "does NOT fit"
    say(f"It {verdict}. Beside the weights there is room for {result.max_tokens_that_fit:,} tokens of context.")
    say(
        f"The rule of thumb, 2 bytes × 1.2 × {result.num_parameters / 1e9:.3g} billion parameters, says "
        f"{human_bytes(result.rule_bytes)}. Here the weights take {result.bytes_per_parameter:.2f} bytes for each, and "
        f"the rest {result.share_beside_weights:+.0%} of them.\n"
    )
    uniform = [
        (row.format, human_bytes(row.weights_bytes), human_bytes(row.total_bytes), "yes" if row.fits else "no")
        for row in result.uniform
    ]
    print_table(("all linear weights in", "weights", "all", "fits"), uniform, "The same model in one precision")


def _show_devices(result: Estimate) -> None:
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import print_table, say

    rows = [
        (
            each.name,
            human_bytes(each.dense_bytes),
            f"{each.num_experts}, {human_bytes(each.expert_bytes)}" if each.num_experts else "none",
            human_bytes(each.other_bytes) if each.other_bytes else "",
            human_bytes(each.total_bytes),
            "" if each.limit_bytes is None else human_bytes(each.limit_bytes),
            "not known" if each.available_bytes is None else human_bytes(each.available_bytes),
            "yes" if each.fits else f"no, lacks {human_bytes(each.lacking_bytes)}",
            human_bytes(each.read_bytes),
        )
        for each in result.devices
    ]
    columns = (
        "device",
        "dense",
        "experts",
        "KV and others",
        "all",
        "weights may take",
        "available",
        "fits",
        "a step reads",
    )
    print_table(columns, rows, "What lies where")
    for each in result.devices:
        if each.seconds:
            say(
                f"On {each.name} those bytes take {each.seconds * 1e3:.2f} ms at the bandwidth of the card, by "
                "arithmetic and not measured: no step of one sequence is faster."
            )
    first = result.devices[0]
    if not first.fits and first.num_experts and first.name.startswith("cuda"):
        say("Experts can lie in the processors' memory instead: amalgam fit --gpu says how many, amalgam plan which.")


def _show_cost(report: CostReport, wanted: Wanted) -> None:
    from amalgam.cli.console import print_table, say

    unit = report.currency
    for item in report.machines:
        rows = [
            (
                f"{load.load} ({load.kind})",
                f"{load.tokens_per_second:,.1f}",
                *(f"{price:,.5f}" for price in load.per_1000_tokens.values()),
                f"{load.tokens_per_month / 1e6:,.1f}",
                "" if load.joules_per_token is None else f"{load.joules_per_token:,.2f}",
            )
            for load in item.loads
        ]
        shares = (f"{share:.0%} busy" for share in wanted.utilisations)
        title = f"{item.machine}: {item.per_hour:,.4f} {unit} an hour, {item.per_month:,.2f} a month"
        columns = ("load", "tokens/s", *shares, "million a month", "J a token")
        print_table(columns, rows, title)
        origin = f"{item.date}, {item.source}" if item.date else f"given with {item.source}"
        say(f"Cost: {unit} for 1,000 new tokens, their prompts included. Price: {origin}.\n")
    if report.break_even:
        rows = [
            (
                row.api,
                row.machine,
                f"{row.api_per_million:,.2f}",
                f"{row.tokens_per_month / 1e6:,.1f}",
                f"{row.utilisation:.0%}" if row.utilisation <= 1 else "never: more than it can give",
                f"{row.date}, {row.source}",
            )
            for row in report.break_even
        ]
        columns = ("API", "machine", f"{unit}/million", "equal at, million a month", "of what it can give", "price of")
        print_table(columns, rows, "From where on the machine is cheaper than an API (new tokens, with their prompts)")
        say("An API's model is another one: compare those that would do for you.\n")
    if report.others:
        rows = [
            (
                row.machine,
                f"{row.per_hour:,.4f}",
                f"{row.per_month:,.2f}",
                "" if row.needed_tokens_per_second is None else f"{row.needed_tokens_per_second:,.1f}",
                f"{row.date}, {row.source}",
            )
            for row in report.others
        ]
        columns = ("machine (a card of it)", f"{unit}/hour", "a month", "tokens/s to be as cheap", "price of")
        print_table(columns, rows, "Others: not measured, so only what they would have to give")
    where = report.hardware or "hardware that the measurement does not name"
    say(f"Throughput of {report.model} on {where}, from {report.origin}.")
    if report.energy_note:
        say(f"{report.energy_note[:1].upper()}{report.energy_note[1:]}.")
