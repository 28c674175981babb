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
    linear_attention: Annotated[str | None, _precision("linear_attention")] = None,
    mlp: Annotated[str | None, _precision("mlp")] = None,
    expert: Annotated[str | None, _precision("expert")] = None,
    shared_expert: Annotated[str | None, _precision("shared_expert")] = None,
    embedding: Annotated[str | None, _precision("embedding")] = None,
    head: Annotated[str | None, _precision("head")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.yaml.", rich_help_panel="Export")] = False,
) -> None:
    """Show a checkpoint's layers, experts, sizes and formats from its headers; write a configuration for it."""
    from amalgam.cli.console import print_json
    from amalgam.tools.analyze import analyze_checkpoint
    from amalgam.tools.export_config import export_config

    given = [path for path in (model, model_path) if path is not None]
    if len(given) != 1:
        raise ConfigError("No model is given." if not given else "Two models are given.", remedy="Give one folder.")
    wishes = {
        "attention": attention,
        "linear_attention": linear_attention,
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
    from amalgam.cli.console import print_table, say

    print_table((), _facts(analysis))
    say("")
    roles = [
        (role, *_numbers(tally), ", ".join(name for name, _ in analysis.formats_of(role).most_common()))
        for role, tally in analysis.roles.items()
    ]
    roles.append(("all", *_numbers(analysis.total), ""))
    print_table(("role", "weights", "parameters", "bytes", "formats"), roles, num_totals=1)
    say("")
    formats = [(name, *_numbers(tally)) for name, tally in analysis.formats.items()]
    print_table(("format", "weights", "parameters", "bytes"), formats)
    for note in analysis.notes:
        say(f"Note: {note}")


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
    from amalgam.base.sizes import human_bytes

    parameters = "?" if tally.parameters is None else f"{tally.parameters:,}"
    return f"{tally.num_weights:,}", parameters, "?" if tally.nbytes is None else human_bytes(tally.nbytes)


def _show_export(export: Any) -> None:
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import print_table, say

    def size(nbytes: int | None) -> str:
        return "?" if nbytes is None else human_bytes(nbytes)

    if export.rules:
        rules = [
            (rule.role, rule.pattern, rule.source, f"{rule.num_weights:,}", size(rule.nbytes), size(rule.new_nbytes))
            for rule in export.rules
        ]
        say("")
        print_table(("role", "rule", "source", "weights", "bytes now", "about then"), rules)
    for note in export.notes:
        say(f"Note: {note}")
    say(f"Wrote {export.file}.")
