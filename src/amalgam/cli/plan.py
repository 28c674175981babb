"""`amalgam plan`."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Annotated, Any

import typer

from amalgam.cli.options import with_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError


@with_settings
def command(
    settings: Settings,
    explain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Say which rule decides for this weight, and why.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="List every weight.")] = False,
    show_manifest: Annotated[
        bool, typer.Option("--manifest", help="Print the provenance of every weight, as JSON.")
    ] = False,
    sha256: Annotated[
        bool, typer.Option("--sha256", help="With --manifest: digest every tensor; reads all of it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check the weight mapping and show which source each weight comes from. Reads headers only."""
    import torch

    from amalgam.cli.console import progress_bar
    from amalgam.composition.loader import ModelLoader
    from amalgam.runtime.derive import ensure_derived

    if sha256 and not show_manifest:
        raise ConfigError("--sha256 is given without --manifest.", remedy="Add --manifest.")
    with progress_bar() as progress:
        ensure_derived(settings, progress)
    loader = ModelLoader(settings.model, settings.inference, torch.device("cpu"), settings.engine.num_load_threads)
    if explain is not None:
        _explain(loader.choose().explain(explain), as_json)
        return
    planned = loader.plan()
    if show_manifest:
        from amalgam.cli.console import print_json
        from amalgam.composition.manifest import plan_manifest

        with progress_bar() as progress:
            document = plan_manifest(planned, settings.engine.num_load_threads if sha256 else None, progress)
        print_json(document)
        return
    if as_json or show_all:
        _list(planned, as_json)
    else:
        _summarise(planned)


def _explain(explanation: Any, as_json: bool) -> None:
    from amalgam.cli.console import print_json, say

    choice = explanation.choice
    if as_json:
        print_json(
            {
                "name": choice.name,
                "source": choice.source,
                "why": explanation.why,
                "matching_rules": [rule.model_dump() for rule in explanation.matching],
                "default_source": explanation.default_source,
            }
        )
        return
    say(f"{choice.name} comes from {choice.source}: {explanation.why}.")
    for rank, rule in enumerate(explanation.matching, 1):
        mark = "wins" if rank == 1 else "loses"
        say(f"  {rank}. {rule.pattern} → {rule.source}  ({mark})")


def _rows(planned: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": weight.choice.name,
            "source": weight.choice.source,
            "format": (weight.quantize_to or weight.stored.format).name,
            "shape": list(weight.slot.shape),
            "bytes": weight.stored.nbytes,
            "reason": weight.choice.reason,
            "rule": weight.choice.rule and weight.choice.rule.model_dump(),
        }
        for weight in planned
    ]


def _list(planned: Any, as_json: bool) -> None:
    from amalgam.cli.console import human_bytes, print_json, print_table

    rows = _rows(planned)
    if as_json:
        print_json(rows)
        return
    cells = [
        (row["name"], row["source"], row["format"], str(row["shape"]), human_bytes(row["bytes"]), row["reason"])
        for row in rows
    ]
    print_table(("weight", "source", "format", "shape", "bytes", "why"), cells)


def _summarise(planned: Any) -> None:
    from amalgam.cli.console import human_bytes, print_table

    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: defaultdict[tuple[str, str, str], int] = defaultdict(int)
    for weight in planned:
        key = (weight.slot.role, weight.choice.source, (weight.quantize_to or weight.stored.format).name)
        counts[key] += 1
        sizes[key] += weight.stored.nbytes
    rows = [(*key, str(counts[key]), human_bytes(sizes[key])) for key in sorted(counts)]
    rows.append(("all", "", "", str(sum(counts.values())), human_bytes(sum(sizes.values()))))
    print_table(("role", "source", "format", "weights", "bytes"), rows, num_totals=1)
