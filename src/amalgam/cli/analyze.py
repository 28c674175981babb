"""`amalgam analyze`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from amalgam.errors import ConfigError


def _precision(role: str) -> Any:
    names = (f"--{role}_precision", f"--{role.replace('_', '-')}-precision")
    return typer.Option(*names, metavar="NAME", help=f"Precision of the {role} weights.", rich_help_panel="Export")


def command(
    model: Annotated[str | None, typer.Argument(metavar="FOLDER_OR_HUB_ID", help="The checkpoint.")] = None,
    model_path: Annotated[
        str | None, typer.Option("--model_path", "--model-path", metavar="DIR", help="The same, as an option.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    export_file: Annotated[
        Path | None,
        typer.Option(
            "--export_config",
            "--export-config",
            metavar="OUT.yaml",
            help="Write a configuration that gives roles the precisions below: bf16, fp8, int4, or any source's name.",
            rich_help_panel="Export",
        ),
    ] = None,
    attention: Annotated[str | None, _precision("attention")] = None,
    mlp: Annotated[str | None, _precision("mlp")] = None,
    expert: Annotated[str | None, _precision("expert")] = None,
    shared_expert: Annotated[str | None, _precision("shared_expert")] = None,
    embedding: Annotated[str | None, _precision("embedding")] = None,
    head: Annotated[str | None, _precision("head")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.yaml.", rich_help_panel="Export")] = False,
) -> None:
    """Show a checkpoint's layers, experts, sizes and formats, from headers or index; write a configuration for it."""
    from amalgam.cli.console import print_json
    from amalgam.tools.analyze import analyze_checkpoint
    from amalgam.tools.export_config import export_config

    given = [path for path in (model, model_path) if path is not None]
    if len(given) != 1:
        raise ConfigError("No model is given." if not given else "Two models are given.", remedy="Give one folder.")
    wishes = {
        "attention": attention,
        "mlp": mlp,
        "expert": expert,
        "shared_expert": shared_expert,
        "embedding": embedding,
        "head": head,
    }
    precisions = {role: precision for role, precision in wishes.items() if precision is not None}
    if export_file is None and (precisions or force):
        raise ConfigError("Precisions and --force are for a configuration.", remedy="Add --export_config OUT.yaml.")

    analysis = analyze_checkpoint(given[0])
    export = export_config(analysis, export_file, precisions, force) if export_file is not None else None
    if as_json:
        print_json({**analysis.to_dict(), "export": export and {**asdict(export), "file": str(export.file)}})
        return
    _show(analysis)
    if export is not None:
        _show_export(export)


def _show(analysis: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from amalgam.cli.console import out

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(analysis):
        facts.add_row(name, Text(value))
    out.print(facts)
    roles = Table("role", "weights", "parameters", "bytes", "formats")
    for role, tally in analysis.roles.items():
        found = ", ".join(name for name, _ in analysis.formats_of(role).most_common())
        roles.add_row(role, *_numbers(tally), found)
    roles.add_section()
    roles.add_row("all", *_numbers(analysis.total), "")
    out.print(roles)
    formats = Table("format", "weights", "parameters", "bytes")
    for name, tally in analysis.formats.items():
        formats.add_row(name, *_numbers(tally))
    out.print(formats)
    for note in analysis.notes:
        out.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def _facts(analysis: Any) -> list[tuple[str, str]]:
    spec, layers = analysis.spec, analysis.experts_per_layer
    family = f"family {analysis.family.name}" if analysis.family else "no family here serves it"
    facts = [
        ("model", analysis.model),
        ("architecture", f"{analysis.architecture} ({family})" if analysis.architecture else "unknown"),
        ("layers", str(analysis.num_layers)),
    ]
    if layers or analysis.roles.get("expert"):
        counts = ", ".join(f"{experts} in {number} layers" for experts, number in sorted(layers.items()))
        facts.append(("experts", (counts or "?") + (f", {spec.num_active_experts} active" if spec else "")))
        shared = analysis.num_shared_expert_layers
        facts.append(("shared experts", f"in {shared} layers" if shared else "none"))
    if spec and layers:
        facts.append(("parameters", f"{spec.num_parameters:,}, {spec.num_active_parameters:,} per token"))
    missing = f", {analysis.num_missing_shards} missing" if analysis.num_missing_shards else ""
    known_from = "headers" if analysis.has_headers else "index"
    return [*facts, ("shards", f"{analysis.num_shards}{missing}"), ("known from", known_from)]


def _numbers(tally: Any) -> tuple[str, str, str]:
    from amalgam.cli.console import human_bytes

    parameters = "?" if tally.parameters is None else f"{tally.parameters:,}"
    return f"{tally.num_weights:,}", parameters, "?" if tally.nbytes is None else human_bytes(tally.nbytes)


def _show_export(export: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from amalgam.cli.console import human_bytes, out

    def size(nbytes: int | None) -> str:
        return "?" if nbytes is None else human_bytes(nbytes)

    if export.rules:
        table = Table("role", "rule", "source", "weights", "bytes now", "about then")
        table.columns[1].overflow = "fold"
        for rule in export.rules:
            then = size(rule.new_nbytes)
            table.add_row(rule.role, Text(rule.pattern), rule.source, f"{rule.num_weights:,}", size(rule.nbytes), then)
        out.print(table)
    for note in export.notes:
        out.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"Wrote {export.file}.", markup=False, highlight=False, soft_wrap=True)
