"""`amalgam plan`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from amalgam.cli.options import refuse_unused, with_settings
from amalgam.config.server import ServerSettings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError

_PLANNING = "Planning for a budget"
_TOKENS, _WINDOW, _CHECKS, _SLACK = 16384, 256, 1, 0.01  # what planning takes where nothing is said


@with_settings(needs_model=False)
def command(
    settings: Settings,
    origins: Mapping[str, str],
    config_file: Path | None,
    explain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Say which rule decides this weight's source, and why.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="List every weight.")] = False,
    show_manifest: Annotated[
        bool, typer.Option("--manifest", help="Print the provenance of every weight, as JSON.")
    ] = False,
    sha256: Annotated[
        bool, typer.Option("--sha256", help="With --manifest: add a digest of every tensor; reads all files.")
    ] = False,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="Compare two plans: configurations (YAML), manifests (.json) or addresses of running servers.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="40GB|4.5bpw|30tok/s|cuda=24GB,cpu=128GB",
            help="Choose each weight's source for this budget, and prove the choice on held-out text. With several "
            "devices, choose where experts lie, too; 24GB@1008GB/s says how fast a device is read, and rtx-4090 or "
            "another known card stands for both.",
            rich_help_panel=_PLANNING,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="[NAME=]FILE",
            help="Text to measure sensitivities on. Repeatable.",
            rich_help_panel=_PLANNING,
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--heldout",
            metavar="[NAME=]FILE",
            help="Text to prove the plan on. Default: two fifths of --text, used for nothing else.",
            rich_help_panel=_PLANNING,
        ),
    ] = None,
    use: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL",
            help="How traffic uses the experts: a saved set or a server's address. Default: measured on --text.",
            rich_help_panel=_PLANNING,
        ),
    ] = None,
    sources: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Sources to choose from. Default: all.", rich_help_panel=_PLANNING),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SOURCE",
            help="Keep these weights at least as wide as in SOURCE. Repeatable.",
            rich_help_panel=_PLANNING,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="At most this many tokens of each domain.", rich_help_panel=_PLANNING)
    ] = _TOKENS,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens computed as one prompt.", rich_help_panel=_PLANNING)
    ] = _WINDOW,
    checks: Annotated[
        int,
        typer.Option(
            min=0, max=8, help="Rounds that correct sensitivities by measured divergences.", rich_help_panel=_PLANNING
        ),
    ] = _CHECKS,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per sequence in the KV cache. Default: inference.max_seq_length.",
            rich_help_panel=_PLANNING,
        ),
    ] = None,
    num_sequences: Annotated[
        int, typer.Option("--sequences", min=1, help="Number of such sequences.", rich_help_panel=_PLANNING)
    ] = 1,
    slack: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="With several devices: how much more divergence than the least may be expected, as a share, for a "
            "faster step.",
            rich_help_panel=_PLANNING,
        ),
    ] = _SLACK,
    out: Annotated[
        Path | None,
        typer.Option(metavar="OUT.yaml", help="Write a configuration for `serve`.", rich_help_panel=_PLANNING),
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.html",
            help="Draw divergence against size for this plan and its alternatives.",
            rich_help_panel=_PLANNING,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder that keeps sensitivities between runs.", rich_help_panel=_PLANNING),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.yaml.", rich_help_panel=_PLANNING)] = False,
) -> None:
    """Check the weight mapping and show the source of each weight; compare two plans; or find the best for a budget."""
    given = {
        "--text": text,
        "--heldout": held_out,
        "--use": use,
        "--sources": sources,
        "--floor": floor,
        "--tokens": tokens != _TOKENS,
        "--window": window != _WINDOW,
        "--checks": checks != _CHECKS,
        "--context": context,
        "--sequences": num_sequences != 1,
        "--slack": slack != _SLACK,
        "--out": out,
        "--frontier": frontier,
        "--cache": cache,
        "--force": force,
    }
    shown = {"--explain": explain is not None, "--all": show_all, "--manifest": show_manifest}
    views = [name for name, value in shown.items() if value]
    if len(views) > 1:
        raise ConfigError(f"{' and '.join(views)} are given.", remedy="Give one of them.")
    if not show_manifest:
        refuse_unused({"--sha256": sha256}, "--manifest", "Add --manifest.")
    if diff is not None:
        if budget is not None:
            raise ConfigError("--budget is given beside --diff.", remedy="Write the plan with --out, then compare it.")
        refuse_unused(given, "--budget", "Add --budget, and leave out --diff.")
        _compare(diff, settings.server, origins, views, as_json, show_all=show_all)
        return
    if not settings.model.base_path:
        raise ConfigError("model.base_path is required.", remedy="Give --config FILE or --model FOLDER.")
    if budget is None:
        refuse_unused(given, "--budget", "Add --budget, for instance 4.5bpw.")
        _show(settings, explain, as_json, show_all=show_all, show_manifest=show_manifest, sha256=sha256)
        return
    if views:
        raise ConfigError(
            f"--budget is given beside {views[0]}.",
            remedy="Write the plan with --out, and then ask about it with --config.",
        )
    if out is None:
        refuse_unused({"--force": force}, "--out", "Add --out.")
    if "=" not in budget:
        refuse_unused({"--slack": slack != _SLACK}, "--budget of several devices", "Such as cuda=24GB,cpu=128GB.")
    from amalgam.cli.plan_view import plan_for_budget
    from amalgam.planning.problem import parse_floor
    from amalgam.tools.evaluate import TextOptions
    from amalgam.tools.plan import PlanOptions

    options = PlanOptions(
        TextOptions(text or [], window, tokens),
        held_out or [],
        use,
        None if sources is None else [name.strip() for name in sources.split(",")],
        dict(map(parse_floor, floor or [])),
        checks,
        context,
        num_sequences,
        cache=cache,
        slack=slack,
    )
    plan_for_budget(settings, options, budget, out, config_file, frontier, force=force, as_json=as_json)


def _compare(
    places: tuple[str, str],
    server: ServerSettings,
    origins: Mapping[str, str],
    views: list[str],
    as_json: bool,
    *,
    show_all: bool,
) -> None:
    from amalgam.cli.console import progress_bar
    from amalgam.cli.plan_diff import manifest_of, show_difference
    from amalgam.tools.difference import difference

    for view in views:
        if view != "--all":
            raise ConfigError(f"{view} is given beside --diff.", remedy="Give one of them.")
    for key, origin in origins.items():
        if origin in ("flag", "file") and key != "server.admin_key":
            given = "--config" if origin == "file" else key
            raise ConfigError(f"{given} is given beside --diff.", remedy="The plans that are compared have their own.")
    with progress_bar() as progress:
        before, after = (manifest_of(place, server, progress) for place in places)
    show_difference(places, difference(before, after), as_json, show_all=show_all)


def _show(
    settings: Settings, explain: str | None, as_json: bool, *, show_all: bool, show_manifest: bool, sha256: bool
) -> None:
    """The plan that the settings make."""
    import torch

    from amalgam.cli.console import note, print_json, progress_bar
    from amalgam.composition.loader import ModelLoader
    from amalgam.composition.manifest import plan_manifest
    from amalgam.runtime.derive import ensure_derived

    with progress_bar() as progress:
        ensure_derived(settings, progress)
    loader = ModelLoader(settings.model, settings.inference, torch.device("cpu"), settings.engine.num_load_threads)
    if explain is not None:
        _explain(loader.choose().explain(explain), as_json)
        return
    planned = loader.plan()
    if show_manifest:
        with progress_bar() as progress:
            document = plan_manifest(planned, settings.engine.num_load_threads if sha256 else None, progress)
        print_json(document)
    elif as_json or show_all:
        _list(planned, as_json)
    else:
        _summarise(planned)
        for rule in loader.choose().overridden:
            note(f"Rule {rule.pattern!r} has no effect: for each weight that it matches, a stronger rule decides.")


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
                "device": choice.device,
                "placing_rules": [rule.model_dump() for rule in explanation.placing],
            }
        )
        return
    say(f"{choice.name} comes from {choice.source}: {explanation.why}.")
    for rank, rule in enumerate(explanation.matching, 1):
        mark = "wins" if rank == 1 else "loses"
        say(f"  {rank}. {rule.pattern} → {rule.source}  ({mark})")
    if choice.device is not None:
        say(f"It lies on {choice.device}: {explanation.placing[0].pattern!r} is the strongest rule that says a device.")


def _rows(planned: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": weight.choice.name,
            "source": weight.choice.source,
            "format": (weight.quantize_to or weight.stored.format).name,
            "shape": list(weight.slot.shape),
            "bytes": weight.stored.nbytes,
            "device": weight.device,
            "reason": weight.choice.reason,
            "rule": weight.choice.rule and weight.choice.rule.model_dump(),
        }
        for weight in planned
    ]


def _list(planned: Any, as_json: bool) -> None:
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import print_json, print_table

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
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import print_table

    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: defaultdict[tuple[str, str, str], int] = defaultdict(int)
    for weight in planned:
        key = (weight.slot.role, weight.choice.source, (weight.quantize_to or weight.stored.format).name)
        counts[key] += 1
        sizes[key] += weight.stored.nbytes
    rows = [(*key, str(counts[key]), human_bytes(sizes[key])) for key in sorted(counts)]
    rows.append(("all", "", "", str(sum(counts.values())), human_bytes(sum(sizes.values()))))
    print_table(("role", "source", "format", "weights", "bytes"), rows, num_totals=1)
