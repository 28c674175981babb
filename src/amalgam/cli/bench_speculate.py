"""`amalgam bench speculate`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from amalgam.cli.options import with_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError

if TYPE_CHECKING:
    from amalgam.tools.bench_speculate import Measured
    from amalgam.tools.speculation_costs import Costs


@with_settings(needs_model=False, shown=("speculation.kind", "speculation.num_tokens", "speculation.draft"))
def command(
    settings: Settings,
    draft_cost: Annotated[
        float | None,
        typer.Option(min=0, max=10, help="A step of the draft, in steps of the model. [default: 0.1; for ngram 0]"),
    ] = None,
    row_cost: Annotated[
        float, typer.Option(min=0, max=10, help="What one more token adds to a step beside what it reads.")
    ] = 0.02,
    experts: Annotated[
        str, typer.Option(metavar="K/N", help="Active experts and all, of a layer, where no model is given.")
    ] = "8/128",
    expert_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a step's reading that is experts, the same.")
    ] = 0.6,
    shape: Annotated[
        str | None, typer.Option(help="Measure this shape with random weights instead of a model: S.")
    ] = None,
    weights: Annotated[str, typer.Option(help="Format of the shape's weights, as for `amalgam bench`.")] = "bf16",
    chances: Annotated[
        str, typer.Option(metavar="P,P", help="Measure guesses that come true so often and cost nothing: 0.6,0.9.")
    ] = "",
    batches: Annotated[str, typer.Option(help="Numbers of sequences that are measured together.")] = "1,4",
    num_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, and no table.")] = False,
) -> None:
    """Estimate the gain of speculative decoding; with --speculation KIND or --chances also measure it, in turns."""
    from amalgam.cli.bench import numbers_of
    from amalgam.cli.console import print_json, print_table
    from amalgam.tools import bench

    kind = settings.speculation.kind
    if draft_cost is None:
        draft_cost = 0.0 if kind == "ngram" else 0.1
    shares, chosen = _shares(chances), {"batches": numbers_of("--batches", batches)}
    plan = _Plan(shares, {**chosen, "num_tokens": num_tokens, "repeats": repeats})
    document: dict[str, Any] = {"command": ["amalgam", *sys.argv[1:]], "commit": bench.commit()}
    if shape is not None:
        if kind != "none" or not shares:
            raise ConfigError("A shape has no text to guess.", remedy="Give --chances, and no --speculation.")
        machines, name, rows = _measure_shape(shape, weights, settings, plan, draft_cost, row_cost)
    elif settings.model.base_path:
        machines, name, rows = _measure_model(settings, plan, draft_cost, row_cost)
    else:
        if kind != "none" or shares:
            raise ConfigError(
                "There is no model to measure.", remedy="Give --config FILE, --model FOLDER or --shape S."
            )
        machines, name, rows = _any(draft_cost, row_cost, experts, expert_share), "", []
    _show(document, machines, as_json=as_json)
    if rows:
        measured = [row.as_json() for row in rows]
        document |= {"model": name, "hardware": bench.hardware(), "kind": kind, "measured": measured}
    if rows and not as_json:
        columns = ("prompt", "sequences", "guesses", "tok/s", "by off", "came true", "declined", "tokens a step")
        table = [
            (
                row.prompt, str(row.num_sequences), row.mode, f"{row.tokens_per_second:.1f}", f"{row.by_off:.2f}",
                _share(row.acceptance), _share(row.declined), f"{row.num_tokens_per_step:.2f}",
            )
            for row in rows
        ]  # fmt: skip
        print_table(columns, table, f"{name}: measured in turns, each answer the same with and without guesses")
    print_json(document, is_indented=as_json)


class _Plan(NamedTuple):
    """What is to be measured."""

    chances: list[float]
    chosen: dict[str, Any]  # of `amalgam.tools.bench_speculate.measure`


def _any(draft_cost: float, row_cost: float, experts: str, expert_share: float) -> dict[str, Costs]:
    from amalgam.tools.speculation_costs import Costs

    active, total = _experts(experts)
    return {
        "a dense model": Costs(draft=draft_cost, per_row=row_cost),
        f"{active} of {total} experts": Costs(draft_cost, 0.0, row_cost, expert_share, total, active),
    }


def _measure_shape(
    shape: str, weights: str, settings: Settings, plan: _Plan, draft_cost: float, row_cost: float
) -> tuple[dict[str, Costs], str, list[Measured]]:
    from amalgam.cli.console import progress_bar
    from amalgam.tools import bench
    from amalgam.tools import bench_speculate as tool

    batch, num_tokens = max(plan.chosen["batches"]), plan.chosen["num_tokens"]
    name = f"shape {shape}, {weights}"
    with ExitStack() as stack:
        with progress_bar() as progress:
            engine, spec = stack.enter_context(
                bench.shape_engine(
                    shape, weights, settings, max_tokens=64 + num_tokens, max_batch=batch, progress=progress
                )
            )
        prompts = {"random tokens": bench.random_ids(spec, 64, 0)}
        with progress_bar("rounds") as progress:
            rows = tool.measure_chances(
                engine, spec, prompts, plan.chances, settings.speculation.num_tokens, progress=progress, **plan.chosen
            )
    return {name: tool.costs_of(spec, draft_cost, row_cost)}, name, rows


def _measure_model(
    settings: Settings, plan: _Plan, draft_cost: float, row_cost: float
) -> tuple[dict[str, Costs], str, list[Measured]]:
    import torch

    from amalgam.cli.console import progress_bar
    from amalgam.composition.loader import ModelLoader
    from amalgam.runtime.opening import open_deployment
    from amalgam.tools import bench_speculate as tool

    if settings.speculation.kind == "none" and not plan.chances:
        loader = ModelLoader(settings.model, settings.inference, torch.device("cpu"), 1)
        name = settings.model.name or loader.base_folder.name
        return {name: tool.costs_of(loader.spec, draft_cost, row_cost)}, name, []
    with progress_bar() as progress:
        deployment = open_deployment(settings, progress)
    rows: list[Measured] = []
    try:
        spec, name = deployment.spec, deployment.model_name
        prompts = {key: deployment.tokenizer.encode(text) for key, text in tool.PROMPTS.items()}
        with progress_bar("rounds") as progress:
            if settings.speculation.kind != "none":
                rows += tool.measure(deployment.engine, prompts, progress=progress, **plan.chosen)
            rows += tool.measure_chances(
                deployment.engine, spec, {"prose": prompts["prose"]}, plan.chances, settings.speculation.num_tokens,
                progress=progress, **plan.chosen,
            )  # fmt: skip
    finally:
        deployment.close()
    return {name: tool.costs_of(spec, draft_cost, row_cost)}, name, rows


def _show(document: dict[str, Any], machines: dict[str, Costs], *, as_json: bool) -> None:
    from amalgam.cli.console import print_table
    from amalgam.tools.bench_speculate import LENGTHS, simulated

    document["simulated"] = {
        name: [
            {"chance": chance, "speed_up": dict(zip(map(str, LENGTHS), values, strict=True))}
            for chance, values in simulated(costs)
        ]
        for name, costs in machines.items()
    }
    if as_json:
        return
    for name, costs in machines.items():
        rows = [(f"{chance:.0%}", *(f"{value:.2f}" for value in values)) for chance, values in simulated(costs)]
        columns = ("comes true", *(f"{length} guessed" for length in LENGTHS))
        print_table(columns, rows, f"{name}: speed of one sequence with guesses, 1: as without")


def _experts(text: str) -> tuple[int, int]:
    active, slash, total = text.partition("/")
    if slash and active.isdigit() and total.isdigit() and 0 < int(active) < int(total) <= 65536:
        return int(active), int(total)
    raise ConfigError(f"--experts is {text!r}.", remedy="Expected the active and all experts of a layer: 8/128.")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _shares(text: str) -> list[float]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        found = [float(part) for part in parts]
    except ValueError:
        found = [-1.0]
    if not all(0 <= value <= 1 for value in found):
        raise ConfigError(f"--chances is {text!r}.", remedy="Expected numbers from 0 to 1, for instance 0.6,0.9.")
    return found
