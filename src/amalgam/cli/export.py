"""`amalgam export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.cli.options import refuse_unused, with_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError

if TYPE_CHECKING:
    from amalgam.tools.export.contract import ExportReport

_MAX_NAMED = 20
_SHARES = ("widest", "narrowest", "none")


@with_settings
def command(
    settings: Settings,
    folder: Annotated[
        Path,
        typer.Argument(help="Folder to write; must not exist. Repeat the command to resume an interrupted export."),
    ],
    target: Annotated[str, typer.Option("--to", help="What to write: hf, vllm, modelopt, gguf or ollama.")],
    share: Annotated[
        str,
        typer.Option(
            help="Where the engine wants one format for several weights, such as all experts of a layer: the widest "
            "of theirs, or the narrowest. none: each keeps its own, for engines that can."
        ),
    ] = "widest",
    activations: Annotated[
        str | None,
        typer.Option(help="vllm: declare 8-bit activations for all 8-bit weights (dynamic), as its CPU build needs."),
    ] = None,
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="gguf, ollama: llama.cpp's type for weights that it has no exact type for, such as Q4_K or Q8_0. "
            "[default: the nearest that is at least as wide]",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse the export if any weight's value would change.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written; write nothing.")] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="[NAME=]FILE",
            help="Measure the KL divergence from the base checkpoint on this text, before and after. Repeatable.",
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="--text: tokens computed as one prompt.")] = 256,
    tokens: Annotated[int | None, typer.Option(min=2, help="--text: most tokens.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a plan, or a model, as one checkpoint folder that other engines open."""
    from amalgam.cli.console import print_json, progress_bar, resumable
    from amalgam.tools.evaluate import TextOptions
    from amalgam.tools.export.contract import ExportOptions
    from amalgam.tools.export.exporting import export_model

    if share not in _SHARES:
        raise ConfigError(f"--share is {share!r}.", remedy=f"Allowed: {', '.join(_SHARES)}.")
    if activations not in (None, "dynamic"):
        raise ConfigError(f"--activations is {activations!r}.", remedy="Allowed: dynamic.")
    if not text:
        refuse_unused({"--window": window != 256, "--tokens": tokens is not None}, "--text", "Name a file of text.")
    if dry_run:
        refuse_unused({"--text": text}, "writing anything", "Leave --dry-run out to measure.")
    options = ExportOptions(share, activations, type_name)  # type: ignore[arg-type]
    with resumable(), progress_bar() as progress:
        report = export_model(
            settings,
            target,
            folder.expanduser(),
            options,
            is_strict=strict,
            is_dry=dry_run,
            texts=TextOptions(text, window, tokens) if text else None,
            progress=progress,
        )
    if as_json:
        print_json(_as_json(report))
    else:
        _show(report)


def _as_json(report: ExportReport) -> dict[str, Any]:
    return asdict(report) | {"folder": str(report.folder)}


def _show(report: ExportReport) -> None:
    from amalgam.base.escaping import one_line
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import interval, print_table, say

    groups: dict[tuple[str, str, str, bool], list[Any]] = {}
    for change in report.changes:
        groups.setdefault((change.before, change.after, change.reason, change.is_exact), []).append(change)
    if groups:
        rows = [
            (
                f"{before} → {after}",
                str(len(changes)),
                human_bytes(sum(change.bytes_before for change in changes)),
                human_bytes(sum(change.bytes_after for change in changes)),
                "same" if is_exact else "other",
                reason,
            )
            for (before, after, reason, is_exact), changes in groups.items()
        ]
        print_table(("stored otherwise", "weights", "before", "after", "values", "because"), rows)
    verb = "Wrote" if report.is_written else "Would write"
    say(
        f"{verb} {report.folder} ({report.target}): {human_bytes(report.nbytes)}; the plan's weights are "
        f"{human_bytes(report.plan_bytes)}."
    )
    if report.divergence:
        names = {"before": "the plan", "after": "what was written"}
        measured = [
            (names[when], interval(quality.divergence, "{:.5f}"), interval(quality.agreement, "{:.2%}"))
            for when, quality in report.divergence.items()
        ]
        print_table(("against base", "KL divergence", "top-1"), measured)
    if report.left_out:
        rest = len(report.left_out) - _MAX_NAMED
        more = f" and {rest} more (all with --json)" if rest > 0 else ""
        say(f"Not carried over: {', '.join(map(one_line, report.left_out[:_MAX_NAMED]))}{more}")
    for note in report.notes:
        say(note)
