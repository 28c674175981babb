"""`amalgam bench speculate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.cli.options import with_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError

if TYPE_CHECKING:
    from amalgam.engine.speculation.simulation import Costs


@with_settings(needs_model=False, shown=("speculation.kind", "speculation.num_tokens", "speculation.draft"))
def command(
    settings: Settings,
    draft_cost: Annotated[
        float, typer.Option(min=0, max=10, help="A step of the draft, in steps of the model; n-grams: 0.")
    ] = 0.1,
    row_cost: Annotated[
        float, typer.Option(min=0, max=10, help="What one more token adds to a step beside what it reads.")
    ] = 0.02,
    experts: Annotated[
        str, typer.Option(metavar="K/N", help="Active experts and all, of a layer, where no model is given.")
    ] = "8/128",
    expert_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a step's reading that is experts, the same.")
    ] = 0.6,
    batches: Annotated[str, typer.Option(help="Numbers of sequences that are measured together.")] = "1,4",
    num_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, and no table.")] = False,
) -> None:
    """Say what guessing tokens ahead would bring; with a model and --speculation KIND, measure it too."""
    from amalgam.cli.bench import numbers_of
    from amalgam.cli.console import print_json, print_table, progress_bar
    from amalgam.engine.speculation.simulation import Costs
    from amalgam.tools import bench
    from amalgam.tools import bench_speculate as tool

    counts = numbers_of("--batches", batches)
    document: dict[str, Any] = {"command": ["amalgam", *sys.argv[1:]], "commit": bench.commit()}
    if not settings.model.base_path:
        if settings.speculation.kind != "none":
            raise ConfigError("There is no model to measure.", remedy="Give --config FILE or --model FOLDER.")
        active, total = _experts(experts)
        machines = {
            "a dense model": Costs(draft=draft_cost, per_row=row_cost),
            f"{active} of {total} experts": Costs(draft_cost, 0.0, row_cost, expert_share, total, active),
        }
        _show(document, machines, as_json=as_json)
    else:
        import torch

        from amalgam.composition.loader import ModelLoader

        loader = ModelLoader(settings.model, settings.inference, torch.device("cpu"), 1)
        name = settings.model.name or loader.base_folder.name
        _show(document, {name: tool.costs_of(loader.spec, draft_cost, row_cost)}, as_json=as_json)
    if settings.speculation.kind != "none":
        from amalgam.runtime.opening import open_deployment

        with progress_bar() as progress:
            deployment = open_deployment(settings, progress)
        try:
            with progress_bar("rounds") as progress:
                rows = tool.measure(deployment, counts, num_tokens, repeats, progress)
            document |= {
                "model": deployment.model_name,
                "hardware": bench.hardware(),
                "kind": settings.speculation.kind,
                "measured": [row.as_json() for row in rows],
            }
        finally:
            deployment.close()
        if not as_json:
            columns = ("prompt", "sequences", "guesses", "tok/s", "by off", "came true", "declined", "tokens a step")
            table = [
                (
                    row.prompt, str(row.num_sequences), row.mode, f"{row.tokens_per_second:.1f}", f"{row.by_off:.2f}",
                    _share(row.acceptance), _share(row.declined), f"{row.num_tokens_per_step:.2f}",
                )
                for row in rows
            ]  # fmt: skip
            print_table(columns, table, f"{deployment.model_name}: {settings.speculation.kind}, measured in turns")
    print_json(document, is_indented=as_json)


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
