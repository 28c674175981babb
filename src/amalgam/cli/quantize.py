"""`amalgam quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MAX_NAMED = 20


def command(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a bf16, fp16 or fp32 checkpoint.")],
    out_folder: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    format_name: Annotated[str, typer.Option("--format", "-f", help="fp8, int8 or int4.")],
    group_size: Annotated[
        int | None, typer.Option(min=1, help="int4: inputs that share a scale. Default: 128, or less where needed.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="fp8: one scale per tensor, channel or block (128×128). Default: channel.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make an fp8, int8 or int4 checkpoint of a model (compressed-tensors layout, rounding to nearest)."""
    from amalgam.base.escaping import one_line
    from amalgam.cli.console import human_bytes, print_json, print_table, progress_bar, say
    from amalgam.composition.quantize import quantize_checkpoint
    from amalgam.formats.grid import QuantizeOptions

    with progress_bar() as progress:
        report = quantize_checkpoint(
            checkpoint, out_folder.expanduser(), format_name, QuantizeOptions(group_size, scale), progress
        )
    if as_json:
        roles = {
            name: {
                "weights": role.num_weights,
                "bytes_before": role.bytes_before,
                "bytes_after": role.bytes_after,
                "relative_error": role.error,
            }
            for name, role in report.roles.items()
        }
        totals = {"bytes_before": report.bytes_before, "bytes_after": report.bytes_after}
        beside = {
            "carried_over": report.carried,
            "left_out": {"tensors": report.left_out_tensors, "files": report.left_out_files},
            "config_changes": report.config_changes,
        }
        print_json({"folder": str(report.folder), "format": report.format, **totals, "roles": roles, **beside})
        return
    rows = [
        (
            name,
            str(role.num_weights),
            human_bytes(role.bytes_before),
            human_bytes(role.bytes_after),
            f"{role.error:.2%}" if role.squared_norm else "–",
        )
        for name, role in report.roles.items()
    ]
    rows.append(("all", "", human_bytes(report.bytes_before), human_bytes(report.bytes_after), ""))
    title = f"{report.folder} ({report.format})"
    print_table(("role", "weights", "before", "after", "relative error"), rows, title, num_totals=1)
    for what, names in (
        ("Copied as they are, beside the model's weights", report.carried),
        ("Not carried over: tensors", report.left_out_tensors),
        ("Not carried over: files", report.left_out_files),
        ("Changed in config.json", [f"{key}: {value}" for key, value in report.config_changes.items()]),
    ):
        if names:
            more = f" and {len(names) - _MAX_NAMED} more (all with --json)" if len(names) > _MAX_NAMED else ""
            say(f"{what}: {', '.join(map(one_line, names[:_MAX_NAMED]))}{more}")
