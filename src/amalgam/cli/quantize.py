"""`amalgam quantize`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.base.counting import counted
from amalgam.cli.options import refuse_unused
from amalgam.errors import ConfigError

if TYPE_CHECKING:
    from amalgam.composition.quantizing.report import QuantizeReport

_MAX_NAMED = 20
_TOKENS, _LENGTH, _EXPERT_TOKENS, _DAMPING = 65_536, 512, 256, 0.01  # where nothing is said
_ITERATIONS = 200


def command(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a bf16, fp16 or fp32 checkpoint.")],
    out_folder: Annotated[
        Path, typer.Argument(help="Folder to write; must not exist. Repeat the command to resume an interrupted run.")
    ],
    format_name: Annotated[
        str,
        typer.Option("--format", "-f", help="fp8, fp8-e5m2, int8, int8-packed, int4, int3, int2 or mxfp4."),
    ],
    group_size: Annotated[
        int | None,
        typer.Option(min=1, help="Integers: inputs that share a scale. Default: 128, or less if a weight needs it."),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(help="What shares a scale: tensor, channel (a whole row), group or block (fp8: 128×128)."),
    ] = None,
    zero_points: Annotated[
        bool, typer.Option("--zero-points", help="Integers: add a zero point to each scale.")
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="How codes are chosen: round (default), search (for the best clip), gptq or awq. With --with: "
            "auto-round has signround and round; llm-compressor gptq, awq and round; gptqmodel gptq.",
        ),
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="Calibration texts: .json (list of strings), .jsonl or plain text. Repeatable."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1024, help="Calibration tokens to read.")] = _TOKENS,
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest calibration sequence, in tokens.")] = _LENGTH,
    min_expert_tokens: Annotated[
        int,
        typer.Option(min=0, help="Experts with fewer routed tokens are also shown the tokens nearest to them."),
    ] = _EXPERT_TOKENS,
    damping: Annotated[
        float, typer.Option(min=1e-6, max=1.0, help="gptq: damping, as a share of the mean diagonal.")
    ] = _DAMPING,
    act_order: Annotated[
        bool, typer.Option(help="gptq: round columns by the size of their inputs; groups stay in place.")
    ] = True,
    activations: Annotated[
        str | None,
        typer.Option(help="fp8, int8: declare 8-bit activations with dynamic or static scales, for other engines."),
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option("--with", help="Use another tool, in its own layout: auto-round, llm-compressor or gptqmodel."),
    ] = None,
    environment: Annotated[
        Path | None,
        typer.Option(
            help="--with: Python environment that has the tool. Default: one under ~/.local/state/amalgam. It is made "
            "if it is not there, which downloads the tool and PyTorch."
        ),
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="--with auto-round: steps for each layer.")] = _ITERATIONS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make a checkpoint of a model in fewer bits (compressed-tensors layout), layer by layer."""
    from amalgam.cli.console import note, print_json, progress_bar, resumable
    from amalgam.composition.quantize import make_checkpoint
    from amalgam.composition.quantizing.recipe import CalibrationTexts, Recipe
    from amalgam.formats.grid import QuantizeOptions

    about_texts = {
        "--calibration-tokens": calibration_tokens != _TOKENS,
        "--sequence-length": sequence_length != _LENGTH,
        "--min-expert-tokens": min_expert_tokens != _EXPERT_TOKENS,
    }
    if not calibrate:
        refuse_unused(about_texts, "--calibrate", "Give a file of texts.")
    texts = None
    if calibrate:
        files = tuple(file.expanduser() for file in calibrate)
        texts = CalibrationTexts(files, calibration_tokens, sequence_length, min_expert_tokens)
    options = QuantizeOptions(group_size, scale, zero_points)
    of_gptq = {"--damping": damping != _DAMPING, "--no-act-order": not act_order}
    if tool is None:
        method = method or "round"
        refuse_unused(
            {"--environment": environment is not None, "--iterations": iterations != _ITERATIONS},
            "--with",
            "Name a tool.",
        )
        if method != "gptq":
            refuse_unused(of_gptq, "--method gptq", "Add it.")
        recipe = Recipe(format_name, options, method, activations, texts, damping, act_order)  # type: ignore[arg-type]
        with resumable(), progress_bar() as progress:
            report = make_checkpoint(checkpoint, out_folder.expanduser(), recipe, progress)
    else:
        from amalgam.tools.quantizing.environment import default_folder, open_environment
        from amalgam.tools.quantizing.external import ExternalRecipe, checked_method, quantize_with, tool_of

        found = tool_of(tool)
        asked = ExternalRecipe(format_name, options, method, activations, texts, damping, act_order, iterations)
        method = checked_method(found, asked)
        if method != "gptq":
            refuse_unused(of_gptq, "--method gptq", "Add it.")
        if method != "signround":
            refuse_unused({"--iterations": iterations != _ITERATIONS}, "--with auto-round", "Add it.")
        if min_expert_tokens != _EXPERT_TOKENS:
            raise ConfigError(f"--min-expert-tokens is ours; {tool} has its own way.", remedy="Leave it out.")
        folder = environment.expanduser() if environment else default_folder(found.name, found.version)
        opened = partial(open_environment, folder, found.distribution, found.requirements, note)
        with progress_bar("steps") as progress:
            report = quantize_with(found, opened, checkpoint, out_folder.expanduser(), asked, progress)
    if as_json:
        print_json(_as_json(report))
    else:
        _show(report)


def _as_json(report: QuantizeReport) -> dict[str, Any]:
    roles = {
        name: {
            "weights": role.num_weights,
            "bytes_before": role.bytes_before,
            "bytes_after": role.bytes_after,
            "relative_error": role.error,
        }
        for name, role in report.roles.items()
    }
    experts = {name: {"sent": sent, "shown": shown} for name, (sent, shown) in report.expert_tokens.items()}
    return {
        "folder": str(report.folder),
        "format": report.format,
        "method": report.method,
        "tool": report.tool or None,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "roles": roles,
        "calibration": {"tokens": report.num_tokens, "experts": experts, "rounded": report.rounded},
        "resumed_files": report.num_resumed,
        "carried_over": report.carried,
        "left_out": {"tensors": report.left_out_tensors, "files": report.left_out_files},
        "config_changes": report.config_changes,
        "moved": report.moved,
    }


def _show(report: QuantizeReport) -> None:
    from amalgam.base.escaping import one_line
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import print_table, say

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
    title = f"{report.folder} ({', '.join(filter(None, (report.format, report.method, report.tool)))})"
    print_table(("role", "weights", "before", "after", "relative error"), rows, title, num_totals=1)
    if report.num_resumed:
        say(f"Went on behind {counted(report.num_resumed, 'file')} that an earlier run had finished.")
    if report.num_tokens:
        say(f"Calibrated with {report.num_tokens} tokens.")
    if report.expert_tokens:
        _show_experts(report)
    for what, names in (
        ("No token reached, so they were rounded", report.rounded),
        ("Copied as they are, beside the model's weights", report.carried),
        ("Not carried over: tensors", report.left_out_tensors),
        ("Not carried over: files", report.left_out_files),
        ("Changed in config.json", [f"{key}: {value}" for key, value in report.config_changes.items()]),
        ("Other than in the base checkpoint, so that blocks have to be taken from here as a whole", report.moved),
    ):
        if names:
            more = f" and {len(names) - _MAX_NAMED} more (all with --json)" if len(names) > _MAX_NAMED else ""
            say(f"{what}: {', '.join(map(one_line, names[:_MAX_NAMED]))}{more}")


def _show_experts(report: QuantizeReport) -> None:
    """For each layer: how many tokens its experts were sent, and how many of them were shown others' too."""
    from statistics import median

    from amalgam.cli.console import print_table

    layers: dict[str, list[tuple[int, int]]] = {}
    for name, tokens in report.expert_tokens.items():
        layers.setdefault(name.split(".")[1], []).append(tokens)
    rows = []
    for layer, found in layers.items():
        sent = [tokens for tokens, _ in found]
        covered = sum(shown > own for own, shown in found)
        rows.append((layer, f"{min(sent)}", f"{median(sent):g}", f"{max(sent)}", str(covered), str(sent.count(0))))
    columns = ("layer", "fewest", "median", "most", "shown others' too", "sent none")
    print_table(columns, rows, "Tokens sent to an expert")
