"""`amalgam prune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.cli.options import refuse_unused, with_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError

if TYPE_CHECKING:
    from amalgam.tools.pruning.options import PruneOptions

_TOKENS, _WINDOW = 16_384, 256
_WHAT, _COMPARING = "What goes", "Comparing with plans of the same bytes"


@with_settings
def command(
    settings: Settings,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder to write; must not exist. Repeat the command to resume an interrupted run."
        ),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(
            help="Experts to remove from each layer: 25%, or a number. Repeatable without --out.", rich_help_panel=_WHAT
        ),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Layers to remove: a share or a number.", rich_help_panel=_WHAT)
    ] = None,
    channels: Annotated[
        list[str] | None,
        typer.Option(help="Channels to remove from each MLP and expert: a share or a number.", rich_help_panel=_WHAT),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Single weights to set to zero: a share, or n:m such as 2:4 (of 4 neighbours, 2 remain).",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Criterion. Experts: reap (default), gate-mass, use, random; layers: influence, kl; channels: "
            "activation, magnitude; weights: wanda, magnitude. Repeatable without --out.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Experts: merge removed experts into those that remain.", rich_help_panel=_WHAT),
    ] = False,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="Experts: as many go in all, and of each layer as many as matter least. Other engines take the same "
            "number in each layer only.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    use: Annotated[
        str | None,
        typer.Option(
            help="Experts by use or gate-mass: saved expert statistics, or a server's address, in place of texts.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Texts to choose by: FILE, or NAME=FILE for a domain. Repeatable.", rich_help_panel=_WHAT),
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, help="Tokens of the texts to read.", rich_help_panel=_WHAT)] = _TOKENS,
    window: Annotated[int, typer.Option(min=2, help="Tokens computed as one prompt.", rich_help_panel=_WHAT)] = _WINDOW,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.", rich_help_panel=_WHAT)] = 0,
    compare: Annotated[
        bool,
        typer.Option(help="Compare with plans of the same size.", rich_help_panel=_COMPARING),
    ] = True,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--heldout",
            help="Texts to measure on. Default: a part of --text, used for nothing else.",
            rich_help_panel=_COMPARING,
        ),
    ] = None,
    precisions: Annotated[
        str | None,
        typer.Option(
            help="Formats for the plans to choose from, besides base: int8,int4,…", rich_help_panel=_COMPARING
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="Sizes to compare at, in mean bits per weight: 8,4.5,…", rich_help_panel=_COMPARING),
    ] = None,
    curve: Annotated[
        Path | None, typer.Option(help="Page to write: divergence against bytes.", rich_help_panel=_COMPARING)
    ] = None,
    copies: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the model's copies in those formats.", rich_help_panel=_COMPARING),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps sensitivities between runs.", rich_help_panel=_COMPARING)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Remove the experts, layers, channels or weights that matter least, and compare with plans of the same size."""
    from amalgam.cli.console import note, print_json, progress_bar, resumable, say
    from amalgam.cli.plan_view import announce
    from amalgam.cli.prune_view import show
    from amalgam.tools.pruning.running import prune

    kind, amounts = _kind({"experts": experts, "layers": layers, "channels": channels, "weights": weights})
    if kind != "experts":
        of_experts = {"--merge": merge, "--per-layer": per_layer, "--use": use}
        refuse_unused(of_experts, "--experts", "They are about experts.")
    if not compare:
        about = {"--heldout": held_out, "--precisions": precisions, "--bits": bits, "--curve": curve}
        refuse_unused({**about, "--copies": copies, "--cache": cache}, "--compare", "Leave out --no-compare.")
        if out is None:
            raise ConfigError("--no-compare is given without --out: there is nothing to do.", remedy="Give --out.")
    if not text:
        given = {"--tokens": tokens != _TOKENS, "--window": window != _WINDOW}
        refuse_unused(given, "--text", "Give a file of texts.")
    options = _options(kind, amounts, by or [], text or [], window, tokens, merges=merge, per_layer=per_layer)
    options = replace(
        options,
        held_out=held_out or [],
        use=None if use is None else _statistics(use),
        compares=compare,
        copies=copies,
        cache=cache,
        seed=seed,
        precisions=options.precisions if precisions is None else [name.strip() for name in precisions.split(",")],
        bits=options.bits if bits is None else _numbers(bits),
    )
    with resumable(), progress_bar(unit="steps") as progress:
        report = prune(settings, options, out and out.expanduser(), curve, progress, announce)
    if as_json:
        print_json(report.as_json())
        return
    show(report)
    for remark in report.remarks:
        note(remark)
    if curve is not None:
        say(f"Written: {curve}")


def _kind(given: dict[str, list[str] | None]) -> tuple[Any, list[str]]:
    named = [(kind, amounts) for kind, amounts in given.items() if amounts]
    if len(named) != 1:
        what = " and ".join(f"--{kind}" for kind, _ in named) or "Nothing"
        raise ConfigError(
            f"{what} {'are' if len(named) > 1 else 'is'} given.",
            remedy="Give one of --experts, --layers, --channels and --weights; prune the result again for another.",
        )
    return named[0]


def _options(
    kind: Any,
    amounts: list[str],
    criteria: list[str],
    files: list[str],
    window: int,
    tokens: int,
    *,
    merges: bool,
    per_layer: bool,
) -> PruneOptions:
    from amalgam.tools.evaluate import TextOptions
    from amalgam.tools.pruning.options import CRITERIA, PruneOptions

    by = criteria or list(CRITERIA[kind][:1])
    texts = TextOptions(files, window, tokens)
    return PruneOptions(kind, amounts, by, texts, merges=merges, per_layer=per_layer)


def _statistics(place: str) -> Any:
    from amalgam.cli.experts import saved_set_of
    from amalgam.experts.saved.files import load

    return (saved_set_of(place) if place.startswith(("http://", "https://")) else load(place)), place


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value <= 32 for value in found):
        raise ConfigError(f"--bits is {text!r}.", remedy="Expected numbers from 0 to 32, such as 8,4.5,3.5.")
    return found
